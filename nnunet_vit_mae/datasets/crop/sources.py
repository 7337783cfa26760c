"""Which scan a case of `qc.csv` was made of, without its path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import escape
from pathlib import Path
from typing import Any

from nnunet_vit_mae.datasets.crop.qc_table import QCRow
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import visible_below
from nnunet_vit_mae.imaging.scans import Scan
from nnunet_vit_mae.storage.files import short_hash


def source_columns(scan: Scan) -> dict[str, Any]:
    """Return the name of a scan's first channel, and checksums of where it lies and of its files: no path is kept."""
    source = next(iter(scan.channels.values()))
    content = "\n".join(f"{file.name} {size} {date}" for file, size, date in files_below(source))
    return {
        "source": source.name,
        "source_place": short_digest(str(source.absolute())),
        "source_files": short_digest(content),
    }


def refuse_other_case(row: QCRow | None, scan: Scan) -> None:
    """Raise `UserError` if the row is of another scan of that name; a scan that was moved, or edited, is the same."""
    columns = source_columns(scan)
    if (
        row
        and row.source_place
        and all(getattr(row, name) != columns[name] for name in ("source_place", "source_files"))
    ):
        raise UserError(
            f"{next(iter(scan.channels.values()))} and an earlier scan, {row.source}, would be one case, {scan.name}: "
            "rename one of them, or give another dataset with -o."
        )


def short_digest(text: str) -> str:
    """Return a checksum from which a text cannot be read."""
    return short_hash(text, 16)


def files_below(path: Path) -> list[tuple[Path, int, int]]:
    """Return the files that a path stands for (a folder, a header with its data), with their sizes and dates."""
    siblings = path.parent.glob(f"{escape(path.stem)}.*") if path.suffix in (".mhd", ".nhdr") else [path]
    files = sorted(file for file in (visible_below(path) if path.is_dir() else siblings) if file.is_file())
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def without_folders(text: str, paths: Sequence[Path]) -> str:
    """Return a message with names in place of the paths of these files, which libraries put into theirs."""
    for path in paths:
        for folder in (path.parent.resolve(), path.parent.absolute(), path.parent):
            text = text.replace(f"{folder}{os.sep}", "")
    return text
