"""The whole workflow on phantoms: the commands that a user would type, ending with the report of `mae3d_evaluate`.

The commands run in processes of their own, so that the demonstration shows what a user gets.
"""

from __future__ import annotations

import os
import shlex
import sysconfig
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.volumes import read_volume
from nnunet_vit_mae.installation import trainers_folder
from nnunet_vit_mae.phantoms.dataset import write_phantom_dataset
from nnunet_vit_mae.plots import Segmented, plot_segmentations
from nnunet_vit_mae.processes.guard import guarded
from nnunet_vit_mae.storage.csv_tables import read_rows
from nnunet_vit_mae.storage.files import refuse_in_use
from nnunet_vit_mae.storage.readme import write_readme

DATASET_ID = "900"
PLANS = "Quick"
UNET = "nnU-Net"
MODELS = {
    "ViT, pre-trained": "nnUNetTrainerViTMAE",
    "ViT, from scratch": "nnUNetTrainerViTScratch",
    UNET: "nnUNetTrainerBaseline",
}
CONTENTS = {
    "report/": "the report of mae3d_evaluate: open index.html in a browser",
    "results.png": "reference and predictions of some test cases",
    "raw/": "the synthetic CT, as an nnU-Net dataset (nnUNet_raw)",
    "preprocessed/": "what nnU-Net trains on (nnUNet_preprocessed)",
    "results/": "the pre-training with its reconstructions, and the trained models (nnUNet_results)",
    "predictions/": "segmentations of the test cases, by trainer",
    "logs/": "what each command has said",
}
EXAMPLES = 3  # rows of the figure


@dataclass(frozen=True)
class Workload:
    """How much is drawn, trained and predicted.

    Attributes:
        phantoms: Arguments of `write_phantom_dataset`.
        recipe: The recipe of `mae3d_plan`: a name, or a file.
    """

    phantoms: Mapping[str, Any]
    recipe: str


# small regions with large plaques, so that a few minutes on a CPU are enough to learn something
MINUTES = Workload(
    {"labelled": 40, "unlabelled": 60, "test": 16, "extent_mm": (20.0, 26.0, 26.0), "plaque_scale": 3.0}, "quick"
)


def demonstrate(folder: Path, *, seed: int, workload: Workload = MINUTES) -> Path:
    """Run everything in a new folder: nnU-Net's three folders, `predictions/`, `report/`, `logs/` and `results.png`.

    The same seed gives the same results on the same kind of processor. Returns the page of the report.
    Raises `UserError` if the folder is not empty, or if a command fails (its output is in `logs/`).
    """
    refuse_in_use(folder)
    raw = write_phantom_dataset(folder / "raw", dataset_id=int(DATASET_ID), seed=seed, **workload.phantoms)
    print(f"Wrote {raw}: synthetic CT of the skull base, see its scans.csv", flush=True)

    write_readme(folder, CONTENTS)
    shell = Shell(folder)
    dataset = f"-d {DATASET_ID} -c 3d_fullres"
    # nnU-Net's planner takes the number of augmentation processes for a number of threads, of which there is none in 0
    shell.type(f"nnUNetv2_plan_and_preprocess {dataset} -np 1 -npfp 1", nnUNet_n_proc_DA="1")
    shell.type(f"mae3d_preprocess {dataset} -np 1")
    shell.type(f"mae3d_plan {dataset} -o {PLANS} --recipe {quote(workload.recipe)} --seed {seed}")
    pretrain = f"mae3d_pretrain {dataset} -p {PLANS} --seed {seed} -device cpu"
    train = {
        model: f"nnUNetv2_train {DATASET_ID} 3d_fullres 0 -p {PLANS} -tr {trainer} -device cpu"
        for model, trainer in MODELS.items()
    }
    shell.type(pretrain, train[UNET])
    shell.type(*(command for model, command in train.items() if model != UNET))
    predictions = {model: folder / "predictions" / trainer for model, trainer in MODELS.items()}
    images, labels = quote(str(raw / "imagesTs")), quote(str(raw / "labelsTs"))
    shell.type(
        *(
            f"nnUNetv2_predict -i {images} -o {quote(str(predictions[model]))} {dataset} -f 0 -p {PLANS} -tr {trainer} "
            "-device cpu -npp 1 -nps 1"
            for model, trainer in MODELS.items()
        )
    )
    report = folder / "report"
    models = " ".join(f"-p {quote(f'{model}={output}')}" for model, output in predictions.items())
    shell.type(f"mae3d_evaluate -r {labels} {models} -i {images} -o {quote(str(report))} --seed {seed}", shown=True)
    _draw_examples(raw, predictions, report / "cases.csv", folder / "results.png")
    return report / "index.html"


class Shell:
    """Runs commands in the demonstration's own environment; the output of each one goes to a file in `logs/`."""

    def __init__(self, folder: Path):
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.typed = 0
        self.environment: Mapping[str, str] = os.environ | {
            "nnUNet_raw": str(folder / "raw"),
            "nnUNet_preprocessed": str(folder / "preprocessed"),
            "nnUNet_results": str(folder / "results"),
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "0",  # augmentation in the process that trains: the only one that a seed repeats
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",  # two commands run at once
            "OMP_WAIT_POLICY": "passive",  # nnUNetv2_predict starts a thread for each core, whatever else is running
        }

    def type(self, *commands: str, shown: bool = False, **variables: str) -> None:
        """Run commands side by side and wait for all of them.

        Args:
            commands: The commands as they are typed.
            shown: Print their output in place of writing it to a file.
            variables: Further environment variables.

        Raises:
            UserError: If a command fails; the others are ended.
        """
        started = time.monotonic()
        with ExitStack() as stack:
            running = []
            for command in commands:
                print(f"$ {command}", flush=True)
                self.typed += 1
                program, *arguments = shlex.split(command)
                log = self.logs / f"{self.typed:02}_{program}.txt"
                stream = None if shown else stack.enter_context(log.open("w"))
                process = guarded(
                    [Path(sysconfig.get_path("scripts")) / program, *arguments],
                    env={**self.environment, **variables},
                    stdout=stream,
                    stderr=stream,
                )
                running.append((stack.enter_context(process), command, log))
            for process, command, log in running:
                if code := process.wait():
                    place = "" if shown else f": see the end of {log}"
                    raise UserError(f"{shlex.split(command)[0]} failed with exit code {code}{place}.")
        print(f"({time.monotonic() - started:.0f} s)", flush=True)


def _draw_examples(raw: Path, predictions: Mapping[str, Path], cases: Path, figure: Path) -> None:
    """Draw reference and predictions of the test cases with the largest calcifications."""
    entries = read_rows(cases)
    volumes = {entry["case"]: float(entry["reference_mm3"]) for entry in entries}
    rows = []
    for case in sorted(volumes, key=volumes.__getitem__, reverse=True)[:EXAMPLES]:
        masks = {"reference": read_volume(raw / "labelsTs" / f"{case}.nii.gz")[0]}
        masks |= {model: read_volume(folder / f"{case}.nii.gz")[0] for model, folder in predictions.items()}
        dice = {entry["model"]: float(entry["dice"]) for entry in entries if entry["case"] == case}
        image, _ = read_volume(raw / "imagesTs" / f"{case}_0000.nii.gz")
        rows.append(Segmented(f"{case}, {volumes[case]:.0f} mm3", image, masks, dice))
    plot_segmentations(rows, figure, window=(-100, 600))
