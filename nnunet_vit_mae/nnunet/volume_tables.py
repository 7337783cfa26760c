"""Tables of volumes and the files beside them: which call, or which part of one, may write them, and what stays.

With `-num_parts`, each part writes a table of its own, and the part that ends last joins them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.storage.csv_tables import read_cells, read_frame, write_frame
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import read_json, set_aside, write_json

logger = logging.getLogger(__name__)

MODEL_NOTE = "model.json"
OTHER_MODEL = "segmentations of another model"
COLUMNS = (  # of a table
    *("case", "label", "volume_mm3", "risk_group", "threshold", "slice_thickness_mm", "warnings"),
    *("volume_low_mm3", "volume_high_mm3", "expected_dice", "model"),
)


@dataclass(frozen=True)
class Part:
    """One of several processes among which the cases are divided, as nnU-Net divides them."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise UserError(
                f"-part_id {self.number} is not one of the parts 0 to {self.of - 1} of -num_parts {self.of}."
            )

    @property
    def name(self) -> str:
        """Return what tells its files from those of other parts."""
        return f"part{self.number}of{self.of}"

    def table(self, table: Path) -> Path:
        """Return the file for the rows of this part."""
        return table if self.of == 1 else table.with_name(f"{table.stem}_{self.name}{table.suffix}")

    def note(self, table: Path) -> Path:
        """Return the file that says which cases and options the table of this part belongs to."""
        return segmentations_beside(table) / f".{self.name}.json"


def segmentations_beside(table: Path) -> Path:
    """Return the folder of the segmentations from which a table is made."""
    return table.with_name(f"{table.stem}_segmentations")


def refuse_other_table(table: Path) -> None:
    """Raise `UserError` if a table cannot be written by that name, or if there is one that is not of this command."""
    if table.is_dir() or table.suffix != ".csv":
        raise UserError(f"-o {table} is not a file name that ends in .csv: name the table to write.")
    if table.is_file() and not {"case", "label", "warnings", "model"} <= {*(read_cells(table) or [[]])[0]}:
        raise UserError(f"{table} is there already, and is not a table of mae3d_quantify: give another -o.")


def refuse_other_content(folder: Path, note: Mapping[str, str], other: str) -> None:
    """Raise `UserError` for a folder that was written with another note in it, or without one; `other` is its content.

    The note says with which model the content was made. Names that begin with a dot do not count: another part may be
    writing its note.
    """
    content = [entry for entry in folder.iterdir() if not entry.name.startswith(".")] if folder.exists() else []
    # The note is looked for after its folder, so that one that appears meanwhile is not taken for other content.
    file = folder / MODEL_NOTE
    if file.is_file() and read_entries(dict[str, str], file, "remove that folder") != note:
        raise UserError(f"{folder} holds {other}: give another -o, or remove that folder.")
    if content and not file.is_file():
        raise UserError(f"{folder} is not empty: give another -o, or remove that folder.")


def write_part(rows: Sequence[Mapping[str, Any]], table: Path, part: Part, made_from: Mapping[str, Any]) -> None:
    """Write the table of a part, and a note of what it is made from: `model`, `cases` of all parts, and options."""
    # with more parts than cases, a part has no rows
    frame = pd.DataFrame(rows, columns=None if rows else ["case", "label", "warnings"])
    _write_sorted(frame.assign(model=made_from["model"]), part.table(table), made_from["cases"])
    write_json(made_from, part.note(table))


def join_parts(table: Path, of: int, made_from: Mapping[str, Any]) -> bool:
    """Join the tables of all parts, and return True, if all are there and made from the same as this part.

    The log names the others.
    """
    parts = [Part(number, of) for number in range(of)]
    if not all(part.table(table).is_file() for part in parts):
        return False
    notes = {part: read_json(part.note(table)) if part.note(table).is_file() else None for part in parts}
    if others := [part.table(table).name for part, note in notes.items() if note != made_from]:
        logger.warning(
            "%s: made with another model, for other cases or with other options than this part, and not joined into "
            "%s: run these parts again.",
            ", ".join(others),
            table.name,
        )
        return False
    frames = [read_frame(part.table(table), dtype=str, na_filter=False) for part in parts]
    _write_sorted(pd.concat(frames), table, made_from["cases"])
    return True


def keep_earlier(table: Path, cases: Collection[str], columns: Collection[str]) -> None:
    """Move a table aside if the next one will lack cases of it, whose scans are gone, or columns that somebody added.

    Args:
        table: The table, which need not exist.
        cases: Of the next table.
        columns: That the next table may have.
    """
    header, *rows = (read_cells(table) if table.is_file() else []) or [[]]
    known = {row[header.index("case")] for row in rows} if "case" in header else set()
    more = known - {*cases, ""} or {*header} - {*columns, ""}
    if more:
        with suppress(FileNotFoundError):  # another part has moved it
            logger.warning(
                "%s has cases or columns that the new table will lack (%s), and was moved to %s.",
                table,
                abbreviated(sorted(more)),
                set_aside(table),
            )


def _write_sorted(frame: pd.DataFrame, table: Path, cases: Collection[str]) -> None:
    keep_earlier(table, cases, COLUMNS)
    write_frame(frame.sort_values("case", kind="stable"), table)
