"""The record that `mae3d_calibrate` writes beside a model, as the report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json

CALIBRATION_RECORD = "calibration.json"


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
        raise UserError(f"{file} is missing: run mae3d_calibrate, or check --calibration.")
    content = read_json(file)
    thresholds = content.get("thresholds") if isinstance(content, dict) else None
    if not isinstance(thresholds, dict) or not all(isinstance(value, int | float) for value in thresholds.values()):
        raise UserError(
            f"{file} has no thresholds by label, so it is not a calibration: give the {CALIBRATION_RECORD} that "
            "mae3d_calibrate wrote."
        )
    for when in ("before", "after"):
        means = content.get(when, {})
        if not isinstance(means, dict) or not all(isinstance(entry, dict) for entry in means.values()):
            raise UserError(
                f"{file} is not a calibration, because its {when!r} is not a table by label: give the "
                f"{CALIBRATION_RECORD} that mae3d_calibrate wrote."
            )
    return CalibrationRecord(content, file.parent)
