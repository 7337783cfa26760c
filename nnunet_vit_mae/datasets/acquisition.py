"""How scans were acquired, as far as the table `scans.csv` of a dataset knows it. `mae3d_convert` writes one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

from nnunet_vit_mae.datasets.tables import CaseTable, read_case_table
from nnunet_vit_mae.errors import UserError

SCANS_TABLE = "scans.csv"
CASE, PATIENT, KERNEL, SLICE_THICKNESS = "case", "patient", "kernel", "slice_thickness_mm"
CONTRASTS, REFERENCE = "contrasts", "reference"  # names of contrasts, the first separated by semicolons
OF_CONTRAST = ("spacing_mm", "slice_thickness_mm", "model", "kernel", "mutual_information")  # after its name and _


def find_scans_table(folders: Iterable[Path]) -> Path | None:
    """Return the first table of scans in these folders, if there is any."""
    return next((file for folder in folders if (file := folder / SCANS_TABLE).is_file()), None)


def read_scans_table(file: Path, cases: Collection[str]) -> CaseTable:
    """Read a table of scans. Raises `UserError` if it cannot be used, see `read_case_table`."""
    if file.name != SCANS_TABLE:
        return read_case_table(file, None, cases)
    return read_case_table(file, CASE, cases, f"name the column of the cases {CASE}")


def slice_thickness(table: CaseTable) -> dict[str, float]:
    """Return the slice thickness in mm by case, of the cases for which the table has one.

    Raises `UserError` if a field holds something else than a number above 0.
    """
    return {case: _millimetres(text, case, table.file) for case, text in table.known(SLICE_THICKNESS).items()}


def _millimetres(text: str, case: str, file: Path) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(
            f"{file} has the {SLICE_THICKNESS} {text!r} for {case}: give a number above 0, or leave the field empty."
        )
    return value
