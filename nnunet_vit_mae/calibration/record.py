"""The record that `mae3d_calibrate` writes beside a model: the one place where its content is checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.entries import checked_entries
from nnunet_vit_mae.storage.files import read_json

CALIBRATION_RECORD = "calibration.json"
MEANS = ("before", "after", "left_out")  # its sections with means over the cases that thresholds were fitted to
UNCERTAINTY = "uncertainty"  # its section on intervals of volumes and expected Dice


@dataclass(frozen=True)
class CalibrationEntries:
    """What is checked of every record."""

    thresholds: dict[str, Annotated[FiniteFloat, Field(ge=0, le=1)]]
    shifts: dict[str, FiniteFloat] = field(default_factory=dict)  # of logits; only uncertainty needs them
    before: dict[str, dict[str, Any]] = field(default_factory=dict)
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, dict[str, Any]] = field(default_factory=dict)  # earlier versions wrote none
    checkpoints: dict[str, str] = field(default_factory=dict)  # hashes of the calibrated ones, by path in the model
    made_from: dict[str, str] = field(default_factory=dict)  # hashes of those that were calibrated


@dataclass(frozen=True)
class CalibrationRecord:
    """The content of a `calibration.json` and its folder, which holds the figures of the calibration."""

    content: Mapping[str, Any]
    folder: Path


def read_calibration(path: Path) -> CalibrationRecord:
    """Read the record of a calibration.

    Args:
        path: The `calibration.json`, or the folder that holds it.

    Returns:
        Its content and folder.

    Raises:
        UserError: If the file is missing or is not the record of a calibration.
    """
    file = path / CALIBRATION_RECORD if path.is_dir() else path
    if not file.is_file():
        of_folds = ", ".join(str(found) for found in sorted(path.glob(f"fold_*/{CALIBRATION_RECORD}")))
        advice = f"give that of a fold ({of_folds})" if of_folds else "run mae3d_calibrate, or check --calibration"
        raise UserError(f"{file} is missing: {advice}.")
    content = read_json(file)
    checked_entries(CalibrationEntries, content, str(file), f"give the {CALIBRATION_RECORD} that mae3d_calibrate wrote")
    return CalibrationRecord(content, file.parent)


def shifts_of(content: Mapping[str, Any], labels: Iterable[str], source: str, advice: str) -> list[float]:
    """Return the shift of the logit of each label.

    Args:
        content: The content of a record.
        labels: The labels of the model.
        source: What the error calls the record.
        advice: The end of its sentence.

    Raises:
        UserError: If the content is not that of a record, or if a label has no shift.
    """
    shifts = checked_entries(CalibrationEntries, content, source, advice).shifts
    if missing := [label for label in labels if label not in shifts]:
        raise UserError(f"{source} has no shift of {missing[0]}, which its {UNCERTAINTY} needs: {advice}.")
    return [shifts[label] for label in labels]
