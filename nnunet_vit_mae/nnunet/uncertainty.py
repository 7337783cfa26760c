"""Intervals of volumes and expected Dice: validated on cases with a reference, then given for new cases.

`mae3d_calibrate --uncertainty` predicts the cases of the calibration with each member by itself and keeps what the
members say beside the reference, in `calibration.json`. `mae3d_quantify --uncertainty` compares new cases with them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import FiniteFloat

from nnunet_vit_mae.calibration.conformal import (
    TOGETHER,
    Residual,
    Validated,
    VolumeEstimate,
    coverage,
    fewest_cases,
    volume_interval,
)
from nnunet_vit_mae.calibration.expected_dice import ExpectedDice, fit_expected_dice
from nnunet_vit_mae.calibration.record import (
    CALIBRATION_RECORD,
    UNCERTAINTY,
    CalibrationRecord,
    shifts_of,
)
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation.voxels import overlap
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.imaging.labels import read_mask
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk
from nnunet_vit_mae.nnunet.calibrated import read_calibration_of
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.nnunet.predicted_cases import PredictedCase, calibration_folder
from nnunet_vit_mae.nnunet.predicted_members import CaseUncertainty, predict_members, remove_lone_maps
from nnunet_vit_mae.nnunet.prediction import PredictionCase, find_prediction_cases, remove_outdated
from nnunet_vit_mae.storage.entries import checked_entries
from nnunet_vit_mae.storage.files import write_json
from nnunet_vit_mae.storage.layout import CALIBRATED
from nnunet_vit_mae.units import rounded_mm3

logger = logging.getLogger(__name__)

LEVEL = 0.9  # of the intervals whose coverage is reported, and the default

LabelColumns = dict[str, dict[str, float | None]]  # numbers of a case by label and column


@dataclass(frozen=True)
class ValidatedCase:
    """A case of the calibration and one label of it."""

    case: str
    predictor: str
    label: str
    volume_mm3: FiniteFloat
    spread_mm3: FiniteFloat
    voxel_mm3: FiniteFloat
    reference_mm3: FiniteFloat
    dice: FiniteFloat | None  # None where both masks are empty
    soft_dice: FiniteFloat | None

    @property
    def validated(self) -> Validated:
        """The volumes."""
        estimate = VolumeEstimate(self.volume_mm3, self.spread_mm3, self.voxel_mm3)
        return Validated(self.predictor, estimate, self.reference_mm3)


@dataclass(frozen=True)
class Uncertainty:
    """The validated cases of a model, with which new cases are compared."""

    cases: list[ValidatedCase]
    expected_dice: dict[str, ExpectedDice | None] = field(default_factory=dict)  # by label

    def columns(self, case: CaseUncertainty, level: float) -> LabelColumns:
        """Return the ends of the interval and the expected Dice of a new case, by label; None where there are none."""
        columns = {}
        for label, soft in case.soft_dice.items():
            estimates = {predictor: by_label[label] for predictor, by_label in case.estimates.items()}
            interval = volume_interval(estimates, self.residuals(label, estimates), level)
            low, high = interval or (None, None)
            line = self.expected_dice.get(label)
            columns[label] = {
                "volume_low_mm3": None if low is None else rounded_mm3(low),
                "volume_high_mm3": None if high is None else rounded_mm3(high),
                "expected_dice": None if line is None or soft is None else round(line.of(soft), 4),
            }
        return columns

    def residuals(self, label: str, predictors: Collection[str]) -> list[Residual]:
        """Return the errors of the cases of a label that these predictors predicted."""
        return [row.validated.residual for row in self.cases if row.label == label and row.predictor in predictors]


def add_uncertainty(model: Model, cases: Sequence[PredictedCase], images: Path, device: str) -> dict[str, Any]:
    """Predict the cases of a calibration with each member, and add what they say to the record of the calibration.

    Args:
        model: The model, whose calibrated checkpoints are written already.
        cases: The cases that the thresholds were fitted to.
        images: The folder of their images.
        device: The device to predict on.

    Returns:
        The section that was added.

    Raises:
        UserError: If there are ignored voxels, whose volume no one knows, or if an image cannot be read.
    """
    model = replace(model, checkpoint=CALIBRATED)
    record = read_calibration_of(model)
    shifts = _shifts_in(record, model)
    known = {case.name: case for case in find_prediction_cases(model.plan, images)}
    rows: list[ValidatedCase] = []
    for fold in dict.fromkeys(case.fold for case in cases):
        own = [case for case in cases if case.fold == fold]
        predicting = model if fold is None else replace(model, folds=(fold,))
        work = calibration_folder(model, fold) / "members"
        images_of = [known[case.name] for case in own]
        remove_outdated(model.plan, images_of, work)
        remove_lone_maps(model, work, work / UNCERTAINTY)
        found = predict_members(predicting, shifts, images_of, work, work / UNCERTAINTY, device)
        for case in own:
            segmentation = work / f"{case.name}{model.plan.file_ending}"
            rows += _validated_rows(predicting, case, segmentation, found[case.name])
    section = _section(rows)
    write_json({**record.content, UNCERTAINTY: section}, record.folder / CALIBRATION_RECORD)
    return section


def refuse_without_volumes(model: Model) -> None:
    """Raise `UserError` for a dataset with an ignore label: the volumes of its references are not known."""
    if classes_of(model.plan).ignore is not None:
        raise UserError(
            f"{model.plan.dataset.name} has an ignore label, so the volumes of its references are not known: leave out "
            "--uncertainty."
        )


def read_uncertainty(model: Model) -> Uncertainty:
    """Return the validated cases of a model.

    Raises `UserError` if it was calibrated without them, or if the record of its calibration is damaged.
    """
    advice = _advice(model)
    if model.checkpoint != CALIBRATED:
        raise UserError(f"--uncertainty needs a calibrated checkpoint, but this is {model.checkpoint}: {advice}.")
    record = read_calibration_of(model)
    file = record.folder / CALIBRATION_RECORD
    if UNCERTAINTY not in record.content:
        raise UserError(f"{file} has no entry for uncertainty: {advice}.")
    found = checked_entries(Uncertainty, record.content[UNCERTAINTY], f"{UNCERTAINTY} in {file}", advice)
    if {row.label for row in found.cases} != {*classes_of(model.plan).names}:
        raise UserError(f"{UNCERTAINTY} in {file} has other labels than the model: {advice}.")
    _shifts_in(record, model)  # refused before anything is predicted
    return found


def _advice(model: Model) -> str:
    return f"run mae3d_calibrate with -f {' '.join(model.folds)} --uncertainty"


def _shifts_in(record: CalibrationRecord, model: Model) -> list[float]:
    file = record.folder / CALIBRATION_RECORD
    return shifts_of(record.content, classes_of(model.plan).names, str(file), _advice(model))


def _say_what_is_missing(model: Model, uncertainty: Uncertainty, level: float) -> None:
    """Tell in the log why a column will be empty."""
    predictors = (*model.folds, TOGETHER)
    for label in classes_of(model.plan).names:
        cases = len(uncertainty.residuals(label, predictors))
        if cases < fewest_cases(level):
            logger.warning(
                "%s: an interval at level %g needs %d cases with a reference, but the calibration has %d: there is "
                "none. Calibrate with more cases, or ask for a lower --coverage.",
                label,
                level,
                fewest_cases(level),
                cases,
            )
        if uncertainty.expected_dice.get(label) is None:
            logger.warning("%s: the calibration has too few cases with a Dice: there is no expected Dice.", label)


def predict_with_uncertainty(
    model: Model,
    uncertainty: Uncertainty,
    cases: Sequence[PredictionCase],
    output: Path,
    maps: Path,
    *,
    device: str,
    level: float,
) -> dict[str, LabelColumns]:
    """Predict new cases as `predict_members` does, and return the columns of `mae3d_quantify`, by case and label.

    Beside the segmentations, `dataset.json` names their labels, as nnU-Net's own command has it: `mae3d_evaluate` looks
    for the names there. Raises `UserError` as `predict_members` does, or if the record of the calibration is damaged.
    """
    _say_what_is_missing(model, uncertainty, level)
    write_json(model.plan.dataset_json, output / DESCRIPTION)
    shifts = _shifts_in(read_calibration_of(model), model)
    said = predict_members(model, shifts, cases, output, maps, device)
    return {name: uncertainty.columns(case, level) for name, case in said.items()}


def summary_text(section: Mapping[str, Any]) -> str:
    """Return the coverage and the quality of the expected Dice on the cases of a calibration, as text."""
    lines = []
    for label, shares in section["coverage"].items():
        listed = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
        lines.append(f"{label}: intervals at level {section['level']:g} hold the reference volume: {listed or 'none'}")
        line = section["expected_dice"][label]
        if line is not None:
            correlation = line["rank_correlation"]
            lines.append(
                f"{label}: expected and true Dice differ by {line['mean_absolute_error']:.3f} on average "
                f"({line['mean_absolute_error_of_the_mean']:.3f} with the mean Dice for all), rank correlation "
                f"{'-' if correlation is None else f'{correlation:.2f}'}"
            )
    return "\n".join(lines)


def _validated_rows(
    model: Model, case: PredictedCase, segmentation: Path, said: CaseUncertainty
) -> list[ValidatedCase]:
    with without_warnings_of_itk():
        predicted, reference = read_mask(segmentation), read_mask(case.reference)
    predictor = model.folds[0] if len(model.folds) == 1 else TOGETHER
    classes, rows = classes_of(model.plan), []
    for label, values in zip(classes.names, classes.values, strict=True):
        estimate, truth = said.estimates[predictor][label], np.isin(reference, values)
        dice = overlap(truth, np.isin(predicted, values))["dice"]
        rows.append(
            ValidatedCase(
                case=case.name,
                predictor=predictor,
                label=label,
                **asdict(estimate),
                reference_mm3=float(truth.sum()) * estimate.voxel_mm3,
                dice=None if math.isnan(dice) else dice,
                soft_dice=said.soft_dice[label],
            )
        )
    return rows


def _section(rows: Sequence[ValidatedCase]) -> dict[str, Any]:
    by_label: dict[str, list[ValidatedCase]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    lines = {
        label: fit_expected_dice([_number(row.soft_dice) for row in own], [_number(row.dice) for row in own])
        for label, own in by_label.items()
    }
    return {
        "level": LEVEL,
        "coverage": {label: coverage([row.validated for row in own], LEVEL) for label, own in by_label.items()},
        "expected_dice": {label: None if line is None else asdict(line) for label, line in lines.items()},
        "cases": [asdict(row) for row in rows],
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value
