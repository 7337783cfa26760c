"""A data set of crops as a whole: dataset.json, contact sheets, and what a reader decides on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.datasets.crop.contact_sheet import write_sheets
from nnunet_vit_mae.datasets.crop.qc_table import (
    DONE,
    FAILED,
    QC_TABLE,
    REJECTED,
    QCRow,
    caption,
    files_of,
    read_qc_table,
    worst_first,
    write_qc_table,
)
from nnunet_vit_mae.datasets.tables import read_names
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json, write_json
from nnunet_vit_mae.imaging.scans import ENDING

KEPT = ("channel_names", "labels", "regions_class_order")  # of the dataset.json beside the scans


@dataclass(frozen=True)
class Cropping:
    """What a call did: rows of all cases, worst first, names of those cropped now, and the sheets."""

    rows: list[QCRow]
    cropped: list[str] = field(default_factory=list)
    sheets: list[Path] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Problems by case."""
        return {row.case: row.problem for row in self.rows if row.status == FAILED}


def finish(cropping: Cropping, output: Path, describe: Mapping[str, Any]) -> Cropping:
    """Write the table, dataset.json and the contact sheets; `describe` has channel_names and labels where known."""
    rows = cropping.rows
    write_qc_table(rows, output)
    done = [row for row in rows if row.status == DONE]
    former = read_json(output / "dataset.json") if (output / "dataset.json").exists() else {}
    counts = {"numTraining": sum(row.folder == "imagesTr" for row in done), "file_ending": ENDING}
    write_json(_with_defaults({**former, **describe}, done) | counts, output / "dataset.json")
    pictures = [(output / "thumbnails" / f"{row.case}.png", caption(row)) for row in done]
    pictures = [(file, text) for file, text in pictures if file.exists()]
    templates = sorted((output / "thumbnails").glob("template.*.png"))
    pictures = [
        (file, "TEMPLATE " + file.name.removeprefix("template.").removesuffix(".png")) for file in templates
    ] + pictures
    return Cropping(rows, cropping.cropped, write_sheets(pictures, output))


def _with_defaults(known: dict[str, Any], done: Sequence[QCRow]) -> dict[str, Any]:
    """Channels and labels that occur, with the names that are known for them."""
    labels = known.get("labels", {"background": 0})
    named = {int(value) for values in labels.values() for value in np.atleast_1d(values)}
    values = sorted({int(value) for row in done for value in row.label_values.split()} - named)
    channels = sorted({number for row in done for number in row.channels.split()} or {"0"}, key=int)
    return {
        **known,
        "channel_names": {number: f"channel_{number}" for number in channels} | known.get("channel_names", {}),
        "labels": labels | {f"label_{value}": value for value in values},
    }


def reject(output: Path, decisions: Path) -> Cropping:
    """Move the cases that a list names (one a line) to `rejected`, and say so in the table; nothing is deleted.

    Raises `UserError` when the folder has no cropped cases, or not those.
    """
    if not (output / QC_TABLE).exists():
        raise UserError(f"{output} has no {QC_TABLE}: check -o.")
    rows = {row.case: row for row in read_qc_table(output)}
    for name in read_names(decisions, rows, "--reject"):
        for file in files_of(rows[name], output):
            if file.exists():
                target = output / REJECTED / file.relative_to(output)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        rows[name] = replace(rows[name], status=REJECTED)
    return Cropping(worst_first(rows.values()))


def describe_like(images: Path, names: Sequence[str] | None) -> dict[str, Any]:
    """Channel names and labels of the data set that `images` belongs to, as far as there is one; `names` come first."""
    source = images.absolute().parent / "dataset.json"
    content = read_json(source) if source.exists() else {}
    known: dict[str, Any] = {key: content[key] for key in KEPT if key in content}
    return known | ({"channel_names": {str(number): name for number, name in enumerate(names)}} if names else {})
