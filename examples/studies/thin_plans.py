"""Write nnU-Net's plans with a thinner U-Net and a smaller batch, for studies on a CPU.

    python examples/studies/thin_plans.py 507 --width 8 --batch 2

writes `nnUNetPlansThin.json` beside `nnUNetPlans.json`. The preprocessed files stay the same.
"""

from __future__ import annotations

import argparse

from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.storage.files import read_json, write_json

NAME = "nnUNetPlansThin"
CONFIGURATION = "3d_fullres"
WIDEST = 10  # features of the deepest stages, relative to the first: 320 and 32 in nnU-Net


def main() -> None:
    """Change features and batch in a copy of the plans."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="number or name")
    parser.add_argument("--width", type=int, default=8, help="features of the U-Net at full resolution")
    parser.add_argument("--batch", type=int, default=2, help="crops of a training step")
    arguments = parser.parse_args()
    dataset = find_dataset(arguments.dataset)
    plans = read_json(dataset.plans_file("nnUNetPlans"))
    configuration = plans["configurations"][CONFIGURATION]
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [
        min(arguments.width << stage, WIDEST * arguments.width) for stage in range(network["n_stages"])
    ]
    configuration["batch_size"] = arguments.batch
    thin = plans | {"plans_name": NAME, "configurations": {CONFIGURATION: configuration}}
    write_json(thin, dataset.plans_file(NAME))
    print(f"Wrote {dataset.plans_file(NAME)}.")


if __name__ == "__main__":
    main()
