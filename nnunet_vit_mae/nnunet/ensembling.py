"""Calibrate an ensemble, which has no checkpoint: the thresholds are fitted to the mean of its members' probabilities.

`mae3d_calibrate` shifts the logits in a model's checkpoint. The mean of probabilities has none, so its log odds are
shifted after the prediction, which is the same threshold; nnU-Net's own code then makes the segmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes
from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD
from nnunet_vit_mae.calibration.shifts import shift_probabilities
from nnunet_vit_mae.calibration.thresholds import Calibration, fit_thresholds
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.imaging.writing import write_segmentation
from nnunet_vit_mae.nnunet.calibration import calibration_case
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.prediction import find_reference, read_probabilities
from nnunet_vit_mae.storage.files import write_file, write_json
from nnunet_vit_mae.storage.pickles import read_properties


def calibrate_ensemble(plan: Plan, development: Sequence[Path], predictions: Path, output: Path) -> Path:
    """Fit the thresholds of an ensemble and segment its predictions with them.

    Args:
        plan: The plans of a member.
        development: nnU-Net's validation folder of each member, with probabilities (`--npz`).
        predictions: The ensemble's predictions with probabilities (`nnUNetv2_ensemble --save_npz`).
        output: Folder for the segmentations and the thresholds.

    Returns:
        The record of the thresholds.

    Raises:
        UserError: If there are no probabilities, or members have those of different cases.
    """
    classes = classes_of(plan)
    cases = _development_cases(plan, classes, development)
    found = fit_thresholds(cases, classes, "volume")
    output.mkdir(parents=True, exist_ok=True)
    manager = plan.label_manager
    writer, ending = plan.plans.image_reader_writer_class(), plan.file_ending
    for file in _probabilities_in(predictions):
        shifted = shift_probabilities(
            read_probabilities(file, classes.outputs).astype(np.float32), classes, found.shifts
        )
        segmentation = np.asarray(manager.convert_probabilities_to_segmentation(shifted))
        properties = read_properties(file.with_suffix(".pkl"))  # written by nnU-Net beside the probabilities
        write_segmentation(segmentation, output / f"{file.stem}{ending}", writer, properties)
    write_file((predictions / DESCRIPTION).read_bytes(), output / DESCRIPTION)
    write_json(_record(found, classes, cases), output / CALIBRATION_RECORD)
    return output / CALIBRATION_RECORD


def _development_cases(plan: Plan, classes: Classes, folders: Sequence[Path]) -> list[CalibrationCase]:
    names = {folder: [file.name for file in _probabilities_in(folder)] for folder in folders}
    for folder, others in names.items():
        if others != names[folders[0]]:
            raise UserError(f"{folders[0]} and {folder} have probabilities of different cases: predict both anew.")
    return [_case(plan, classes, [folder / name for folder in folders]) for name in names[folders[0]]]


def _case(plan: Plan, classes: Classes, files: Sequence[Path]) -> CalibrationCase:
    def read() -> np.ndarray:
        members = [read_probabilities(file, classes.outputs) for file in files]
        if any(member.shape != members[0].shape for member in members):
            raise UserError(f"{' and '.join(map(str, files))} differ in their voxels: predict both anew.")
        return np.stack(members).mean(axis=0, dtype=np.float32)

    name = files[0].stem
    return calibration_case(plan, name, find_reference(plan, name, plan.dataset.references), read, source=files[0])


def _probabilities_in(folder: Path) -> list[Path]:
    if not (files := sorted(folder.glob("[!.]*.npz"))):
        raise UserError(
            f"There are no probabilities in {folder}: train with --npz, or predict with --save_probabilities."
        )
    return files


def _record(found: Calibration, classes: Classes, cases: Sequence[CalibrationCase]) -> dict[str, object]:
    return {
        "thresholds": dict(zip(classes.names, found.thresholds, strict=True)),
        "shifts": dict(zip(classes.names, found.shifts, strict=True)),
        "objective": "volume",
        "cases": [case.name for case in cases],
    }
