"""`qc.csv`: how well each scan fits its template, and whether it was cropped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import channel_file_name
from nnunet_vit_mae.imaging.scans import ENDING
from nnunet_vit_mae.storage.csv_tables import read_rows, write_rows
from nnunet_vit_mae.storage.files import inside, set_aside

logger = logging.getLogger(__name__)

QC_TABLE = "qc.csv"
DONE, FAILED, REJECTED = "done", "failed", "rejected"
COMPLETE = 0.999  # coverage from which a region counts as fully in view
LABELS, EDITED = "labelsTr", "edited"  # folders, the second one for labels that were edited by hand
FOLDERS = ("imagesTr", "imagesUn", "")  # of the images; a case without a template has none


@dataclass(frozen=True)
class QCRow:
    """A row of `qc.csv`; fields that a failed case lacks are empty."""

    case: str
    status: str = FAILED  # or done, or rejected
    folder: str = ""  # imagesTr or imagesUn
    template: str = ""
    region_correlation: float | None = None  # in the region's box, normalised (-1 to 1)
    region_mutual_information: float | None = None  # 0 to 1
    correlation: float | None = None  # where template and scan overlap
    mutual_information: float | None = None
    displacement_mm: float | None = None  # of the region's centre
    rotation_degrees: float | None = None
    scale: float | None = None  # above 1: the scan's head is larger than the template's
    coverage: float | None = None  # share of the region that the scan's field of view holds
    label_inside: float | None = None  # share of the labelled voxels that the crop holds
    channels: str = ""  # their numbers
    label_values: str = ""
    problem: str = ""
    made_of: str = ""  # files and settings, as a checksum
    source: str = ""  # name of the file or folder of its first channel
    source_place: str = ""  # checksum of its path
    source_files: str = ""  # checksum of its names, sizes and dates


def read_qc_table(output: Path) -> list[QCRow]:
    """Read the rows of an earlier call, if any; raises `UserError` if the folder holds something else."""
    file = output / QC_TABLE
    if not file.exists():
        if output.exists() and not (output.is_dir() and all(_is_half_written(file) for file in output.iterdir())):
            raise UserError(f"{output} exists, but has no {QC_TABLE}: give a new folder with -o, or remove it.")
        return []
    try:
        return [_qc_row(line) for line in read_rows(file)]
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{file} was not written by mae3d_crop_roi: give a new folder with -o.") from None


def _is_half_written(file: Path) -> bool:
    return file.name.startswith(".") and file.name.endswith(f".{QC_TABLE}")


def worst_first(rows: Iterable[QCRow]) -> list[QCRow]:
    """Sort rows for the reader: failed cases first, then by increasing similarity, rejected cases last."""
    order = (FAILED, DONE, REJECTED)
    return sorted(rows, key=lambda row: (order.index(row.status), row.region_mutual_information or 0.0, row.case))


def write_qc_table(rows: Iterable[QCRow], output: Path) -> None:
    """Write all rows; the file is complete at any time."""
    columns = [field.name for field in fields(QCRow)]
    cells = ([_cell(getattr(row, column)) for column in columns] for row in rows)
    write_rows(columns, cells, output / QC_TABLE)


def _cell(value: Any) -> Any:
    return f"{value:.4f}" if isinstance(value, float) else value


def _qc_row(line: Mapping[str, str]) -> QCRow:
    numbers = {field.name for field in fields(QCRow) if "float" in str(field.type)}
    values: dict[str, Any] = {
        name: (float(text) if text else None) if name in numbers else text for name, text in line.items()
    }
    row = QCRow(**values)
    if row.folder not in FOLDERS or not all(number.isdecimal() for number in row.channels.split()):
        raise ValueError(row.folder)
    return row


def caption(row: QCRow) -> str:
    """Return the caption of a thumbnail."""
    partly = "" if row.coverage is None or row.coverage >= COMPLETE else f", {100 * row.coverage:.0f}% in view"
    return (
        f"{row.case}: MI {row.region_mutual_information or 0:.2f}, r {row.region_correlation or 0:.2f}, "
        f"{row.displacement_mm or 0:.0f} mm, {row.rotation_degrees or 0:.0f}°, x{row.scale or 0:.2f}{partly}"
    )


def files_of(row: QCRow, output: Path) -> list[Path]:
    """Return all files that are written for a case."""
    if not row.folder:
        return []
    names = [(row.folder, channel_file_name(row.case, int(number), ENDING)) for number in row.channels.split()]
    if row.folder == "imagesTr":
        names.append((LABELS, f"{row.case}{ENDING}"))
    names += [("transforms", f"{row.case}.tfm"), ("thumbnails", f"{row.case}.png")]
    return [inside(output, *parts, source=output / QC_TABLE) for parts in names]


def remove_files(row: QCRow, output: Path) -> None:
    """Delete the files that were written for a case; a label that has been edited since is moved to `edited`."""
    last = output / "transforms" / f"{row.case}.tfm"  # that is written
    written = last.stat().st_mtime_ns if last.is_file() else math.inf
    for file in files_of(row, output):
        if file.parent.name == LABELS and file.is_file() and file.stat().st_mtime_ns > written:
            kept = set_aside(file, output / EDITED)
            logger.warning("%s was edited after it was cropped, and is now %s.", file, kept.relative_to(output))
        file.unlink(missing_ok=True)
