"""The dataset of crops: dataset.json, contact sheets, and cases that a reader rejects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.datasets.acquisition import SCANS_TABLE
from nnunet_vit_mae.datasets.contrasts.record import CONTRAST_RECORD
from nnunet_vit_mae.datasets.crop.carried import SourceRecords, carry_over, read_case_records
from nnunet_vit_mae.datasets.crop.contact_sheet import write_sheets
from nnunet_vit_mae.datasets.crop.qc_table import (
    COMPLETE,
    DONE,
    EDITED,
    FAILED,
    FOLDERS,
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
from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.imaging.channels import channels_by_case
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.imaging.scans import ENDING
from nnunet_vit_mae.storage.files import inside, locked, write_json

KEPT = ("channel_names", "labels", "regions_class_order")  # taken from the dataset.json beside the scans
CONTENTS = {
    DESCRIPTION: "nnU-Net's description: channels, labels and number of training cases",
    "imagesTr/": "crops of the cases that have labels, one file for each channel",
    "labelsTr/": "their labels",
    "imagesUn/": "crops of the other cases, for pre-training",
    QC_TABLE: "a row for each case: its registration, the region and what failed",
    SCANS_TABLE: "how the scans were acquired, from their dataset",
    CONTRAST_RECORD: "which contrasts of each case are present, and which were filled with zeros",
    "contact_sheet_*.png": "all crops at a glance, worst first",
    "thumbnails/": "the pictures on these sheets",
    "transforms/": "from template to scan, for ITK",
    f"{EDITED}/": "labels that were edited here before their scan was cropped again",
    f"{REJECTED}/": "cases that were moved out of the dataset with --reject",
}


@dataclass(frozen=True)
class Cropping:
    """The result of a call: rows of all cases, worst first, names of the cases cropped by it, and contact sheets.

    `lost` names contrasts that a scan has and its crop has not; `ambiguities` are clauses on headers of the scans;
    `other_names` are names in the scans' dataset.json for what is called otherwise in that of the crops.
    """

    rows: list[QCRow]
    cropped: list[str] = field(default_factory=list)
    sheets: list[Path] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    ambiguities: list[str] = field(default_factory=list)
    other_names: list[str] = field(default_factory=list)

    @property
    def failed(self) -> dict[str, str]:
        """Problems by case."""
        return {row.case: row.problem for row in self.rows if row.status == FAILED}

    def failure(self) -> str:
        """Return a sentence about the cases that could not be cropped."""
        reasons = "; ".join(f"{case}: {problem}" for case, problem in sorted(self.failed.items()))
        return (
            f"{len(self.failed)} of {len(self.rows)} cases could not be cropped ({reasons}): fix or remove them and "
            "run the command again, which skips all others."
        )


def cropping_report(cropping: Cropping, output: Path) -> str:
    """Return what the command prints: the number of cases, and what the reader should check."""
    done = [row for row in cropping.rows if row.status == DONE]
    rejected = [row for row in cropping.rows if row.status == REJECTED]
    labelled = sum(row.folder == "imagesTr" for row in done)
    lines = [
        f"{output} has {labelled} cases with labels and {len(done) - labelled} without; "
        f"{len(cropping.cropped)} were cropped now, {len(rejected)} are rejected."
    ]
    if partly := [row for row in done if row.coverage is not None and row.coverage < COMPLETE]:
        lines.append(
            f"In {len(partly)} cases the region exceeds the field of view: see coverage in {output / QC_TABLE}."
        )
    if cut := [row for row in done if row.label_inside is not None and row.label_inside < 1]:
        lines.append(
            f"In {len(cut)} cases the crop cuts off labelled voxels: see label_inside in {output / QC_TABLE}, and "
            "--margin."
        )
    if cropping.lost:
        lines.append(
            f"Crops are all zeros, and count as absent in {output / CONTRAST_RECORD}, where the scan is not: "
            f"{abbreviated(cropping.lost)}."
        )
    if cropping.other_names:
        lines.append(
            f"{output / DESCRIPTION} keeps its own names of what the dataset of the scans calls "
            f"{abbreviated(cropping.other_names)}: edit it if they are outdated."
        )
    lines += [
        f"Warning: {clause}. The crops are placed as SimpleITK reads it: compare the sides with another program."
        for clause in cropping.ambiguities
    ]
    if cropping.sheets:
        lines.append(
            f"Look through {cropping.sheets[0]} from the top, worst first, until all registrations fit; write the "
            "cases that do not fit to a text file, one per line, and give it with --reject."
        )
    return "\n".join(lines)


def write_dataset(
    cropping: Cropping,
    output: Path,
    names: Sequence[str] | None = None,
    description: Mapping[str, Any] | None = None,
    source: SourceRecords | None = None,
) -> Cropping:
    """Write the tables, dataset.json, contrasts.json and the contact sheets.

    Args:
        cropping: Rows of all cases, and what was cropped.
        output: The dataset of crops.
        names: Channel names; None keeps the known ones.
        description: What the dataset.json beside the scans says, if scans were cropped. Names in that of the crops
            win, because the user may have edited them.
        source: What is known of the scans that were cropped, if any were.
    """
    rows = cropping.rows
    records = read_case_records(output, [row.case for row in rows])
    write_qc_table(rows, output)
    done = [row for row in rows if row.status == DONE]
    former = dict(read_description(output / DESCRIPTION).content) if (output / DESCRIPTION).exists() else {}
    if names:
        former["channel_names"] = {str(number): name for number, name in enumerate(names)}
    known, other_names = _completed(former, description or {})
    counts = {"numTraining": sum(row.folder == "imagesTr" for row in done), "file_ending": ENDING}
    write_json(_with_defaults(known, done) | counts, output / DESCRIPTION)
    lost = carry_over(rows, output, records, source or SourceRecords())
    folder = output / "thumbnails"
    pictures = [
        (file, "TEMPLATE " + file.name.removeprefix("template.").removesuffix(".png"))
        for file in sorted(folder.glob("template.*.png"))
    ]
    of_cases = [(inside(folder, f"{row.case}.png", source=QC_TABLE), caption(row)) for row in done]
    pictures += [(file, text) for file, text in of_cases if file.exists()]
    return replace(cropping, sheets=write_sheets(pictures, output), lost=lost, other_names=other_names)


def _completed(own: Mapping[str, Any], scans: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the dataset.json of crops, with names of the scans' one for all that has none or a default one.

    Other names in the latter, which are not taken, are returned too.
    """
    channels, other_channels = _channels(own.get("channel_names", {}), scans.get("channel_names", {}))
    labels, other_labels = _labels(own.get("labels", {}), scans.get("labels", {}))
    names = {key: named for key, named in (("channel_names", channels), ("labels", labels)) if named}
    return {**scans, **own, **names}, other_channels + other_labels


def _channels(own: Mapping[str, str], scans: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    edited = {number: name for number, name in own.items() if name != f"channel_{number}"}
    return {**own, **scans, **edited}, [name for number, name in scans.items() if edited.get(number, name) != name]


def _labels(own: Mapping[str, Any], scans: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """As `_channels`; a label of the scans is taken if it has values without a name, and may be a region."""
    edited = {name: value for name, value in own.items() if name != f"label_{value}"}
    named = {int(value) for values in edited.values() for value in np.atleast_1d(values)}
    taken = {name: value for name, value in scans.items() if not named.issuperset(np.atleast_1d(value))}
    kept = {name: value for name, value in own.items() if name in edited or value not in taken.values()}
    others = [name for name, value in scans.items() if value in edited.values() and edited.get(name) != value]
    return {**kept, **{name: value for name, value in taken.items() if name not in kept}}, others


def _with_defaults(known: dict[str, Any], done: Sequence[QCRow]) -> dict[str, Any]:
    """Complete the known channel names and labels by default names for all that occur."""
    labels = known.get("labels", {"background": 0})
    named = {int(value) for values in labels.values() for value in np.atleast_1d(values)}
    values = sorted({int(value) for row in done for value in row.label_values.split()} - named)
    channels = sorted({number for row in done for number in row.channels.split()} or {"0"}, key=int)
    return {
        **known,
        "channel_names": {number: f"channel_{number}" for number in channels} | known.get("channel_names", {}),
        "labels": labels | {f"label_{value}": value for value in values},
    }


def reject_cases(output: Path, decisions: Path, names: Sequence[str] | None = None) -> Cropping:
    """Move the cases listed in a text file to the folder `rejected` and record it in the table; nothing is deleted.

    Args:
        output: The dataset of crops.
        decisions: Text file with a case per line.
        names: Channel names for dataset.json; None keeps the known ones.

    Raises:
        UserError: If the folder has no cropped cases, or not these, or if another process is writing to it.
    """
    if not (output / QC_TABLE).exists():
        raise UserError(f"{output} has no {QC_TABLE}: check -o.")
    with locked(output):
        rows = {row.case: row for row in read_qc_table(output)}
        filled = {folder: channels_by_case(output / folder, ENDING)[0] for folder in FOLDERS if folder}
        for name in read_names(decisions, rows, "--reject"):
            others = filled.get(rows[name].folder, {}).get(name, {}).values()  # of mae3d_fill_contrasts
            for file in {*files_of(rows[name], output), *others}:
                if file.exists():
                    target = output / REJECTED / file.relative_to(output)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
            rows[name] = replace(rows[name], status=REJECTED)
        return write_dataset(Cropping(worst_first(rows.values())), output, names)


def description_beside(images: Path) -> dict[str, Any]:
    """Return channel names and labels of the dataset that `images` belongs to, if any."""
    source = images.absolute().parent / DESCRIPTION
    content = read_description(source).content if source.exists() else {}
    return {key: content[key] for key in KEPT if key in content}
