"""Thresholds for a trained model of nnU-Net, written into its checkpoints (ViTiac, section 3), and a temperature.

A shift of the bias in front of the softmax (or sigmoids) acts as a threshold on the probability. It still does after
everything else that nnU-Net does: mirroring, blending of windows, averaging of folds, linear resampling. A calibrated
model is therefore an ordinary checkpoint, with which nnU-Net's own command predicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes
from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD, MEANS
from nnunet_vit_mae.calibration.temperature import (
    Reliability,
    VoxelSample,
    fit_temperature,
    negative_log_likelihood,
    reliability_of,
    sample_voxels,
)
from nnunet_vit_mae.calibration.thresholds import Calibration, CaseVolumes, ThresholdCurve, fit_thresholds
from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.evaluation.calibration_figures import agreement_figure, curve_figure, reliability_figure
from nnunet_vit_mae.imaging.labels import as_labels
from nnunet_vit_mae.imaging.volumes import refuse_large
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.nnunet.calibrated import record_folder, write_calibrated
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.predicted_cases import PredictedCase
from nnunet_vit_mae.nnunet.prediction import open_probabilities
from nnunet_vit_mae.plots import save_figure
from nnunet_vit_mae.storage.csv_tables import write_rows
from nnunet_vit_mae.storage.files import file_hash, write_json
from nnunet_vit_mae.storage.stored_rows import StoredRows

TABLE_ROW = "{:20}  {:>9}  {:>12}  {:>12}  {:>12}  {:>11}  {:>6}  {:>8}"
RECORDED_PACKAGES = ("nnunet-vit-mae", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class FittedModel:
    """What was fitted to the cases of a calibration, and how reliable the probabilities are before and after it."""

    calibration: Calibration
    objective: str
    temperature: float  # 1 unless it was asked for
    likelihood: dict[str, float]  # mean negative log likelihood of a voxel, `before` and `after` the temperature
    reliability: dict[str, dict[str, Reliability]]  # by class; `before` and `after`


def fit(model: Model, cases: Sequence[PredictedCase], objective: str, *, temperature: bool = False) -> FittedModel:
    """Find the shifts with the smallest loss on these cases, and the best temperature if asked for.

    Raises `UserError` for files that cannot be read.
    """
    classes = classes_of(model.plan)
    readable = [
        calibration_case(
            model.plan,
            case.name,
            case.reference,
            cache(partial(open_probabilities, case.probabilities, classes.outputs)),
            source=case.probabilities,
        )
        for case in cases
    ]
    sample = sample_voxels(readable, classes)
    best = fit_temperature(sample, regions=classes.regions) if temperature else 1.0
    calibration = fit_thresholds(readable, classes, objective).at_temperature(best)
    return FittedModel(calibration, objective, best, *_reliabilities(sample, classes, best))


def write(model: Model, cases: Sequence[PredictedCase], fitted: FittedModel) -> list[Path]:
    """Write a calibrated checkpoint for each fold, the record, and curves and Bland-Altman plots.

    All files but the checkpoints of several folds are in the folder that `record_folder` names. Raises `UserError` if
    the head of the network cannot be found.
    """
    classes, folder, calibration = classes_of(model.plan), record_folder(model), fitted.calibration
    shifts = calibration.shifts if classes.regions else (0.0, *calibration.shifts)
    checkpoints = [write_calibrated(file, shifts, fitted.temperature) for file in model.files]
    curves = dict(zip(classes.names, calibration.curves, strict=True))
    figures = {
        folder / "calibration_curve.png": curve_figure(curves, calibration.thresholds),
        folder / "calibration_reliability.png": reliability_figure(fitted.reliability, fitted.temperature),
    }
    for label in classes.names:
        ending = re.sub(r"[/\\]", "_", f"_{label}") if len(classes.names) > 1 else ""  # not the names of folders
        figures[folder / f"calibration_bland_altman{ending}.png"] = agreement_figure(calibration.volumes, label)
    for file, figure in figures.items():
        save_figure(figure, file)
    _write_curves(curves, folder / "calibration_curve.csv")
    hashes = {"checkpoints": {file.relative_to(model.folder).as_posix(): file_hash(file) for file in checkpoints}}
    sources = {"made_from": {file.relative_to(model.folder).as_posix(): file_hash(file) for file in model.files}}
    record = _record(model, cases, fitted) | hashes | sources
    write_json(record, folder / CALIBRATION_RECORD)
    return [*checkpoints, folder / CALIBRATION_RECORD, folder / "calibration_curve.csv", *figures]


def threshold_table(fitted: FittedModel) -> str:
    """Return the threshold of each class, means before, after and left out, and calibration errors, as text."""
    calibration = fitted.calibration
    columns = ["class", "threshold", "mm3 before", "after", "left out", "Dice before", "after", "left out"]
    lines = [TABLE_ROW.format(*columns)]
    labels = list(dict.fromkeys(row.label for row in calibration.volumes))
    notes = ["mm3: mean absolute volume difference. Left out: each case with the threshold that the other cases give."]
    for label, threshold in zip(labels, calibration.thresholds, strict=True):
        means = [_means(calibration.volumes, label, when) for when in MEANS]
        volumes, dice = ([one[key] for one in means] for key in ("absolute_difference_mm3", "dice"))
        cells = [f"{threshold:.4g}", *(f"{value:.1f}" for value in volumes), *(f"{value:.3f}" for value in dice)]
        lines.append(TABLE_ROW.format(label, *cells))
        losses = volumes if fitted.objective == "volume" else [-value for value in dice]
        if losses[2] >= losses[0] > losses[1]:
            notes.append(
                f"{label}: the threshold does not help cases that are left out, so it may not help new ones. "
                "Calibrate with more cases."
            )
    lines += notes
    for label, errors in _calibration_errors(fitted).items():
        before, after = ("-" if error is None else f"{error:.4f}" for error in errors.values())
        tempered = f", {after} at the temperature {fitted.temperature:.3g}" if fitted.temperature != 1 else ""
        lines.append(f"{label}: expected calibration error {before}{tempered}.")
    return "\n".join(lines)


def calibration_case(
    plan: Plan, name: str, reference: Path, probabilities: Callable[[], np.ndarray | StoredRows], source: Path
) -> CalibrationCase:
    """Return a case whose probabilities (channels z y x) come from a function; `source` is named in messages.

    Raises `UserError` if the reference cannot be read, and on reading the case if it has another shape.
    """
    _, spacing = _read_reference(plan, reference)

    def read() -> tuple[np.ndarray | StoredRows, np.ndarray]:
        labels, _ = _read_reference(plan, reference)
        found = probabilities()
        if found.shape[1:] != labels.shape:
            raise UserError(
                f"{source} has {found.shape[1:]} voxels, but {reference} has {labels.shape}: "
                "predict this case again, or correct its reference."
            )
        return found, labels

    return CalibrationCase(name, float(np.prod(spacing)), read)


def _read_reference(plan: Plan, file: Path) -> tuple[np.ndarray, Sequence[float]]:
    """Return the labels (z y x) and the spacing in mm."""
    refuse_large([file])
    with reading(file):
        labels, properties = plan.plans.image_reader_writer_class().read_seg(str(file))
        return as_labels(labels[0], file), properties["spacing"]


def _reliabilities(
    sample: VoxelSample, classes: Classes, temperature: float
) -> tuple[dict[str, float], dict[str, dict[str, Reliability]]]:
    """Return likelihood, and reliability by class, before and after a temperature."""
    temperatures, regions = {"before": 1.0, "after": temperature}, classes.regions
    likelihood = {when: negative_log_likelihood(sample, value, regions=regions) for when, value in temperatures.items()}
    by_class = {
        name: {when: reliability_of(sample, value, index, regions=regions) for when, value in temperatures.items()}
        for index, name in enumerate(classes.names)
    }
    return likelihood, by_class


def _record(model: Model, cases: Sequence[PredictedCase], fitted: FittedModel) -> dict[str, Any]:
    names, calibration = classes_of(model.plan).names, fitted.calibration
    folds = {case.name: case.fold for case in cases}
    return {
        "thresholds": dict(zip(names, calibration.thresholds, strict=True)),
        "shifts": dict(zip(names, calibration.shifts, strict=True)),
        "temperature": fitted.temperature,
        "calibration_error": _calibration_errors(fitted),
        "negative_log_likelihood": fitted.likelihood,
        "objective": fitted.objective,
        "dataset": model.plan.dataset.name,
        "configuration": model.plan.name,
        "plans": model.plan.plans_name,
        "trainer": model.trainer,
        "folds": list(model.folds),
        "checkpoint": model.checkpoint,
        **{when: {name: _means(calibration.volumes, name, when) for name in names} for when in MEANS},
        "cases": [asdict(row) | {"fold": folds[row.case]} for row in calibration.volumes],
        "versions": package_versions(RECORDED_PACKAGES),
    }


def _calibration_errors(fitted: FittedModel) -> dict[str, dict[str, float | None]]:
    """Return the expected calibration error of each class before and after the temperature; None without voxels."""
    return {
        name: {when: curve.expected_error if len(curve.voxels) else None for when, curve in curves.items()}
        for name, curves in fitted.reliability.items()
    }


def _means(volumes: Sequence[CaseVolumes], label: str, when: str) -> dict[str, float]:
    rows = [asdict(row) for row in volumes if row.label == label]
    return {
        "absolute_difference_mm3": float(np.mean([abs(r[f"{when}_mm3"] - r["reference_mm3"]) for r in rows])),
        "dice": float(np.mean([r[f"{when}_dice"] for r in rows])),
    }


def _write_curves(curves: Mapping[str, ThresholdCurve], file: Path) -> None:
    rows = [
        (label, *point)
        for label, curve in curves.items()
        for point in zip(curve.thresholds.tolist(), curve.difference_mm3.tolist(), curve.dice.tolist(), strict=True)
    ]
    write_rows(("label", "threshold", "absolute_difference_mm3", "dice"), rows, file)
