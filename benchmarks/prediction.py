"""nnU-Net's sliding window with the ViT against the U-Net, on the same windows of the same plans: time and memory.

Weights are random, for they change no time. A volume of `--windows` windows along each axis is predicted by nnU-Net's
own predictor, with its mirroring, in turns. Memory in fresh processes.

    python benchmarks/prediction.py -d 505                       # prints the table of docs/speed.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from measuring import peak_memory, printed_apart, taken_in_turn
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import Plan, load_plan
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline, nnUNetTrainerViTScratch
from nnunet_vit_mae.units import MIB

TRAINERS = {"ViT": nnUNetTrainerViTScratch, "U-Net": nnUNetTrainerBaseline}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    plan = load_plan(find_dataset(arguments.dataset), arguments.plans, arguments.configuration)
    prepare = partial(prediction, plan, arguments.windows, torch.device(arguments.device))
    if arguments.memory_of:
        print(peak_memory(partial(prepare, arguments.memory_of), times=1))
        return
    taken = taken_in_turn({name: prepare(name) for name in TRAINERS}, arguments.rounds)
    ratio = statistics.median(vit / unet for vit, unet in zip(*taken.values(), strict=True))
    flags = ["-d", arguments.dataset, "-c", arguments.configuration, "-p", arguments.plans, "--device", "cpu"]
    flags += ["--windows", str(arguments.windows), "--memory_of"]
    peaks = {name: int(printed_apart(__file__, *flags, name).split()[-1]) / MIB for name in TRAINERS}
    network = plan.settings.network
    print(f"Patch {plan.patch_size}, {network.size}, token {network.token}, decoder {network.decoder}.\n")
    print("| | s per volume | peak memory, MiB |\n|---|---|---|")
    for name, seconds in taken.items():
        print(f"| {name} | {statistics.median(seconds):.1f} | {peaks[name]:.0f} |")
    print(f"| ViT / U-Net | {ratio:.2f} | {peaks['ViT'] / peaks['U-Net']:.2f} |")


def prediction(plan: Plan, windows: int, device: torch.device, name: str) -> Callable[[], None]:
    """Return a prediction of a volume by nnU-Net's predictor, ready to be repeated."""
    trainer = TRAINERS[name]
    configuration = plan.configuration
    network = trainer.build_network_architecture(
        plan.plans, configuration, len(plan.channel_names), plan.outputs, enable_deep_supervision=False
    )
    predictor = nnUNetPredictor(device=device, perform_everything_on_device=device.type == "cuda", allow_tqdm=False)
    weights = [network.state_dict()]
    predictor.manual_initialization(
        network, plan.plans, configuration, weights, plan.dataset_json, trainer.__name__, (0, 1, 2)
    )
    # nnU-Net's windows overlap by half
    volume = torch.randn(len(plan.channel_names), *(side * (windows + 1) // 2 for side in plan.patch_size))
    return lambda: predictor.predict_sliding_window_return_logits(volume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
