"""The whole workflow on phantoms: the commands that a user would type, then a table and a figure of the results.

The commands run in processes of their own, so that the demonstration shows what a user gets.
"""

from __future__ import annotations

import os
import shlex
import sysconfig
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.csv_tables import write_rows
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import refuse_in_use
from nnunet_vit_mae.guard import guarded
from nnunet_vit_mae.imaging.volumes import read_image
from nnunet_vit_mae.installation import trainers_folder
from nnunet_vit_mae.phantoms.dataset import write_phantom_dataset
from nnunet_vit_mae.plots import Segmented, plot_segmentations

DATASET_ID = "900"
PLANS = "Quick"
# small regions with large plaques, so that a few minutes on a CPU are enough to learn something
PHANTOMS = {"labelled": 40, "unlabelled": 60, "extent_mm": (24.0, 32.0, 32.0), "plaque_scale": 2.5}
MODELS = {
    "ViT, pre-trained": "nnUNetTrainerViTMAE",
    "ViT, from scratch": "nnUNetTrainerViTScratch",
    "nnU-Net": "nnUNetTrainerBaseline",
}


@dataclass(frozen=True)
class CaseScore:
    """Dice and volumes (mm3) of one model on one test case."""

    model: str
    case: str
    dice: float
    reference_volume: float
    predicted_volume: float


def demonstrate(folder: Path, *, seed: int) -> list[CaseScore]:
    """Run everything in a new folder: nnU-Net's three folders, `predictions/`, `log.txt`, `results.csv`, `results.png`.

    Raises `UserError` if the folder is not empty, or if a command fails (its output is in `log.txt`).
    """
    refuse_in_use(folder)
    raw = write_phantom_dataset(folder / "raw", dataset_id=int(DATASET_ID), seed=seed, **PHANTOMS)
    print(f"Wrote {raw}: synthetic CT of the skull base, see its scans.csv", flush=True)

    shell = Shell(folder)
    shell.type(f"nnUNetv2_plan_and_preprocess -d {DATASET_ID} -c 3d_fullres -np 2 -npfp 2".split())
    shell.type(f"mae3d_preprocess -d {DATASET_ID} -np 2".split())
    shell.type(f"mae3d_plan -d {DATASET_ID} -o {PLANS} --recipe quick".split())
    shell.type(f"mae3d_pretrain -d {DATASET_ID} -p {PLANS} --seed {seed} -device cpu".split())
    scores = []
    for model, trainer in MODELS.items():
        output = folder / "predictions" / trainer
        common = f"-p {PLANS} -tr {trainer} -device cpu".split()
        shell.type([*f"nnUNetv2_train {DATASET_ID} 3d_fullres 0".split(), *common])
        folders = ["-i", str(raw / "imagesTs"), "-o", str(output)]
        shell.type(["nnUNetv2_predict", *folders, *f"-d {DATASET_ID} -c 3d_fullres -f 0".split(), *common])
        scores += [score_case(model, reference, output) for reference in sorted((raw / "labelsTs").glob("*.nii.gz"))]
    _write_scores(scores, folder / "results.csv")
    _draw_examples(raw, folder, scores)
    return scores


class Shell:
    """Runs commands in the demonstration's own environment and appends their output to `log.txt`."""

    def __init__(self, folder: Path):
        self.log = folder / "log.txt"
        self.environment: Mapping[str, str] = os.environ | {
            "nnUNet_raw": str(folder / "raw"),
            "nnUNet_preprocessed": str(folder / "preprocessed"),
            "nnUNet_results": str(folder / "results"),
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "2",
        }

    def type(self, command: Sequence[str]) -> None:
        """Run one command; raises `UserError` if it fails."""
        print(f"$ {shlex.join(command)}", end=" ", flush=True)
        started = time.monotonic()
        with self.log.open("a") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            program = Path(sysconfig.get_path("scripts")) / command[0]
            with guarded([program, *command[1:]], env=self.environment, stdout=log, stderr=log) as process:
                process.wait()
        print(f"({time.monotonic() - started:.0f} s)", flush=True)
        if process.returncode:
            raise UserError(f"The command above failed with exit code {process.returncode}: see the end of {self.log}.")


def score_case(model: str, reference_file: Path, predictions: Path) -> CaseScore:
    """Compare the prediction of the same name with a reference segmentation."""
    reference = read_image(reference_file)
    prediction = read_image(predictions / reference_file.name)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(reference, prediction)
    voxel_volume = float(np.prod(reference.GetSpacing()))
    voxels = [np.count_nonzero(sitk.GetArrayViewFromImage(image)) for image in (reference, prediction)]
    volumes = [float(count) * voxel_volume for count in voxels]
    return CaseScore(model, reference_file.name.removesuffix(".nii.gz"), overlap.GetDiceCoefficient(), *volumes)


def score_table(scores: list[CaseScore]) -> str:
    """Return the mean Dice and mean absolute volume difference of each model as text."""
    lines = [f"{'model':20} {'Dice':>6} {'volume difference':>18}"]
    for model in MODELS:
        of_model = [score for score in scores if score.model == model]
        dice = np.mean([score.dice for score in of_model])
        difference = np.mean([abs(score.predicted_volume - score.reference_volume) for score in of_model])
        lines.append(f"{model:20} {dice:6.3f} {difference:14.1f} mm3")
    lines.append("After so few steps this shows that everything works, not which model is better: docs/explanation.md.")
    return "\n".join(lines)


def _write_scores(scores: list[CaseScore], file: Path) -> None:
    write_rows(list(CaseScore.__dataclass_fields__), (vars(score).values() for score in scores), file)


def _draw_examples(raw: Path, folder: Path, scores: list[CaseScore]) -> None:
    """Draw reference and predictions of the three test cases with the largest calcifications."""
    volumes = {score.case: score.reference_volume for score in scores}
    rows = []
    for case in sorted(volumes, key=volumes.__getitem__, reverse=True)[:3]:
        masks = {"reference": _read_array(raw / "labelsTs" / f"{case}.nii.gz")}
        for model, trainer in MODELS.items():
            masks[model] = _read_array(folder / "predictions" / trainer / f"{case}.nii.gz")
        dice = {score.model: score.dice for score in scores if score.case == case}
        image = _read_array(raw / "imagesTs" / f"{case}_0000.nii.gz")
        rows.append(Segmented(f"{case}, {volumes[case]:.0f} mm3", image, masks, dice))
    plot_segmentations(rows, folder / "results.png", window=(-100, 600))


def _read_array(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(read_image(file))
