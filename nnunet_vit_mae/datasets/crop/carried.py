"""What the dataset of the scans records of its cases, carried over to the crops as far as it is true of them.

How a scan was acquired (`scans.csv`) stays true of its crop. Which contrasts are present (`contrasts.json`) may not: a
crop can lie outside of an image that covers less than the others, and then holds its zeros only. The voxels decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_vit_mae.datasets.acquisition import (
    CONTRASTS,
    OF_CONTRAST,
    REFERENCE,
    SCANS_TABLE,
    read_scans_table,
)
from nnunet_vit_mae.datasets.contrasts.cases import find_case_images, sort_contrasts
from nnunet_vit_mae.datasets.contrasts.record import (
    Channels,
    ContrastRecord,
    Contrasts,
    read_channels,
    read_contrasts,
    write_contrasts,
)
from nnunet_vit_mae.datasets.crop.qc_table import DONE, QCRow
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk
from nnunet_vit_mae.storage.csv_tables import write_records

Rows = dict[str, dict[str, str]]  # by case, then by column


@dataclass(frozen=True)
class CaseRecords:
    """Names of a dataset's channels by number, rows of its `scans.csv`, and its `contrasts.json`."""

    names: Mapping[str, str] = field(default_factory=dict)
    scans: Rows = field(default_factory=dict)
    contrasts: ContrastRecord = field(default_factory=dict)

    def with_names(self, names: Mapping[str, str]) -> CaseRecords:
        """Return the records with other names of the channels, such as those of `--contrasts`."""
        new = {name: names.get(number, name) for number, name in self.names.items()}
        columns = {f"{old}_{of}": f"{new[old]}_{of}" for old in new for of in OF_CONTRAST}
        scans = {case: {columns.get(key, key): text for key, text in row.items()} for case, row in self.scans.items()}
        for row in scans.values():
            for column in {CONTRASTS, REFERENCE} & {*row}:
                row[column] = ";".join(new.get(name, name) for name in row[column].split(";"))
        contrasts = {
            folder: {case: _renamed(contrasts, new) for case, contrasts in cases.items()}
            for folder, cases in self.contrasts.items()
        }
        return CaseRecords(names, scans, contrasts)


def read_case_records(raw: Path, cases: Sequence[str]) -> CaseRecords:
    """Read the records of a dataset; those that it lacks are empty, and so are all of a folder that is no dataset.

    Raises `UserError` if one of its files is something else.
    """
    if not (raw / DESCRIPTION).is_file():
        return CaseRecords()
    description = read_description(raw / DESCRIPTION)
    names = description.channel_names or description.modality or {}
    scans: Rows = {}
    if (raw / SCANS_TABLE).is_file():
        scans = read_scans_table(raw / SCANS_TABLE, cases).rows
    return CaseRecords(names, scans, read_contrasts(raw))


@dataclass(frozen=True)
class SourceRecords:
    """Records of the dataset that scans come from, the folder and names of these scans, and if they are resampled."""

    records: CaseRecords = field(default_factory=CaseRecords)
    folder: str = ""  # such as imagesTr
    cases: Sequence[str] = ()
    resampled: bool = False


def carry_over(rows: Sequence[QCRow], output: Path, former: CaseRecords, source: SourceRecords) -> list[str]:
    """Write `scans.csv` and `contrasts.json` of a dataset of crops.

    Other columns of its `scans.csv`, and what it has on other cases, stay.

    Args:
        rows: All cases of the dataset.
        output: The dataset, with its `dataset.json`.
        former: Its records until now.
        source: What is known of the scans that this call crops, if it crops any.

    Returns:
        Contrasts that a scan has and its crop has not, each with the case.
    """
    channels = read_channels(output)
    names = {str(number): name for number, name in enumerate(channels.names)}
    known = source.records.with_names(names)
    renamed = former.with_names(names)
    if not (known.scans or known.contrasts or renamed.contrasts) or len({*channels.names}) < len(channels.names):
        return []  # contrasts are recorded by name
    done = [row for row in rows if row.status == DONE]
    given = {row.case: renamed.contrasts.get(row.folder, {}).get(row.case, Contrasts()) for row in done}
    given |= known.contrasts.get(source.folder, {})
    crops = _contrasts_of_crops(done, given, output, channels)
    if known.contrasts or renamed.contrasts:
        record = {folder: dict(cases) for folder, cases in renamed.contrasts.items()}
        for cases in record.values():
            for row in rows:
                cases.pop(row.case, None)
        for row in done:
            if row.case in crops:
                record.setdefault(row.folder, {})[row.case] = crops[row.case]
        write_contrasts({folder: dict(sorted(cases.items())) for folder, cases in sorted(record.items())}, output)
    scans = dict(renamed.scans)
    for case in [case for case in source.cases if case in crops and case in known.scans]:
        scans[case] = scans.get(case, {}) | _row_of_crop(known.scans[case], crops[case], source)
    if scans != former.scans:
        columns = dict.fromkeys(column for cells in scans.values() for column in cells)
        write_records([scans[case] for case in sorted(scans)], list(columns), output / SCANS_TABLE)
    return [f"{name} of {case}" for case in crops for name in given[case].present if name not in crops[case].present]


def _contrasts_of_crops(
    done: Sequence[QCRow], given: Mapping[str, Contrasts], output: Path, channels: Channels
) -> dict[str, Contrasts]:
    """Return the contrasts of each case, by the voxels of its crop and by those `given` as filled."""
    images = {(case.folder.name, case.name): case for case in find_case_images(output, channels)}
    crops = {}
    with without_warnings_of_itk():
        for row in done:
            case = images.get((row.folder, row.case))
            if not (case and case.files):  # removed by hand
                continue
            former = {row.folder: {row.case: given[row.case]}}
            sorted_case = sort_contrasts(case, channels, former)
            crops[row.case] = sorted_case.contrasts or Contrasts(blank=channels.names)
    return crops


def _row_of_crop(cells: Mapping[str, str], crop: Contrasts, source: SourceRecords) -> dict[str, str]:
    """Return a row of `scans.csv` as it is true of a crop."""
    row = dict(cells)
    if CONTRASTS in row:
        row[CONTRASTS] = ";".join(name for name in row[CONTRASTS].split(";") if name in crop.present)
    if REFERENCE in row and source.resampled:
        row[REFERENCE] = ""  # the crop is on the grid of the template
    return row


def _renamed(contrasts: Contrasts, new: Mapping[str, str]) -> Contrasts:
    kinds = (contrasts.present, contrasts.filled, contrasts.blank)
    return Contrasts(*([new.get(name, name) for name in kind] for kind in kinds))
