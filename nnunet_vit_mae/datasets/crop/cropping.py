"""Crop a folder of scans to an nnU-Net raw dataset, with everything that is needed to check the crops by eye.

A case is done if it has a row without a problem in `qc.csv`, made from the same files with the same settings, and if
all of its files still exist. A call that was stopped can therefore be repeated and continues where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import SimpleITK as sitk

from nnunet_vit_mae.datasets.crop.carried import SourceRecords, read_case_records
from nnunet_vit_mae.datasets.crop.contact_sheet import thumbnail, write_thumbnail
from nnunet_vit_mae.datasets.crop.dataset import Cropping, description_beside, write_dataset
from nnunet_vit_mae.datasets.crop.one_case import CropSettings, CropTask, crop_case, failed_row
from nnunet_vit_mae.datasets.crop.qc_table import (
    DONE,
    FAILED,
    QC_TABLE,
    REJECTED,
    QCRow,
    files_of,
    read_qc_table,
    remove_files,
    worst_first,
    write_qc_table,
)
from nnunet_vit_mae.datasets.crop.region import Region, name_of, read_region
from nnunet_vit_mae.datasets.crop.sources import files_below, refuse_other_case, short_digest, source_columns
from nnunet_vit_mae.datasets.tables import read_case_table, refuse_lost_zeros
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.scans import Scan, ScanError, find_scans
from nnunet_vit_mae.imaging.stated_geometry import ambiguities_among
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.files import locked, make_folder, remove_unfinished

PAUSE = 5.0  # seconds between two writes of the table, which may have thousands of rows


@dataclass(frozen=True)
class TemplateColumn:
    """The table that names a template for each case, its column of cases (None: detected) and of templates."""

    file: Path
    case: str | None
    template: str


def crop_folder(
    images: Path,
    labels: Path | None,
    settings: CropSettings,
    column: TemplateColumn | None,
    contrasts: Sequence[str] | None,
    processes: int,
) -> Cropping:
    """Crop all scans in a folder and describe them in dataset.json.

    Args:
        images: Folder of scans.
        labels: Folder of their labels, if there are any.
        settings: How to crop.
        column: The templates of the cases; None uses the most similar template.
        contrasts: Channel names; None uses those of the dataset that the scans belong to.
        processes: Number of processes.

    Raises:
        UserError: If scans, templates or the table are unusable, or if the output holds something else.
    """
    scans = find_scans(images, labels)
    above = {*images.absolute().parents, *images.resolve().parents}
    if above & {settings.output.absolute(), settings.output.resolve()}:  # whatever links or ".." are on the way
        raise UserError(f"{settings.output} holds the scans themselves: give another dataset with -o.")
    template_of = None
    if column:
        table = read_case_table(column.file, column.case, [scan.name for scan in scans])
        template_of = table.column(column.template, "--template_column")
    make_folder(settings.output)
    with locked(settings.output):
        description = description_beside(images)
        names = [scan.name for scan in scans]
        records = read_case_records(images.absolute().parent, names)
        source = SourceRecords(records, images.absolute().name, names, settings.resample)
        cropped = crop_scans(scans, settings, template_of, processes)
        cropping = write_dataset(cropped, settings.output, contrasts, description, source)
    return replace(cropping, ambiguities=ambiguities_among(file for scan in scans for file in scan.files))


def crop_scans(
    scans: Sequence[Scan], settings: CropSettings, template_of: Mapping[str, str] | None, processes: int
) -> Cropping:
    """Crop all scans that are not done yet; `template_of` names each case's template, else the most similar is used.

    A scan that cannot be cropped has its reason in `qc.csv` and is tried again by the next call. Raises `UserError` if
    templates and regions do not match, or if the folder holds something else.
    """
    if len(settings.templates) != len(settings.regions):
        raise UserError(f"{len(settings.templates)} templates and {len(settings.regions)} regions: give one for each.")
    names = [name_of(template) for template in settings.templates]
    if len(set(names)) < len(names):
        raise UserError(f"Several templates have the same name ({', '.join(names)}): rename them.")
    regions = [read_region(*pair) for pair in zip(settings.templates, settings.regions, strict=True)]
    rows = {row.case: row for row in read_qc_table(settings.output)}
    refuse_lost_zeros(settings.output / QC_TABLE, "case", rows, [scan.name for scan in scans])
    tasks = []
    for scan in scans:
        if (row := rows.get(scan.name)) and row.status == REJECTED:
            refuse_other_case(row, scan)
            continue  # a reader's decision holds, whatever the settings and the table of templates
        try:
            candidates = _candidates(scan, names, template_of)
        except ScanError as error:
            if scan.name in rows:
                remove_files(rows[scan.name], settings.output)
            rows[scan.name] = QCRow(scan.name, problem=str(error), **source_columns(scan))
            continue
        refuse_other_case(rows.get(scan.name), scan)
        task = CropTask(scan, settings, candidates, _checksum(scan, settings, candidates))
        if not _is_cropped(rows.get(scan.name), task):
            tasks.append(task)
    _remove_earlier(tasks, rows, settings.output)
    if tasks:
        _write_thumbnails_of_templates(regions, settings.output)
    cropped = _crop_all(tasks, rows, settings.output, processes)
    return Cropping(worst_first(rows.values()), cropped)


def _candidates(scan: Scan, names: Sequence[str], template_of: Mapping[str, str] | None) -> list[int]:
    if template_of is None:
        return list(range(len(names)))
    if scan.name not in template_of:
        raise ScanError("it has no row in the table of templates")
    wanted = name_of(Path(template_of[scan.name]))
    if wanted not in names:
        raise ScanError(f"its template {wanted or 'in the table'} was not given with -t")
    return [names.index(wanted)]


def _remove_earlier(tasks: Sequence[CropTask], rows: dict[str, QCRow], output: Path) -> None:
    """Remove what an earlier call made of these cases from other files or settings, and what it left unfinished."""
    for task in tasks:
        if row := rows.pop(task.scan.name, None):
            remove_files(row, output)
    for folder in (output, *(path for path in output.iterdir() if path.is_dir())):
        remove_unfinished(folder)
    write_qc_table(rows.values(), output)  # first of all: by it the next call knows the folder for its own


def _write_thumbnails_of_templates(regions: Sequence[Region], output: Path) -> None:
    """Write the thumbnails that all others are compared with."""
    for region in regions:
        picture = thumbnail(region, region.template, sitk.Transform(3, sitk.sitkIdentity))
        write_thumbnail(picture, output / "thumbnails" / f"template.{region.name}.png")


def _crop_all(tasks: Sequence[CropTask], rows: dict[str, QCRow], output: Path, processes: int) -> list[str]:
    """Do the tasks, keep `rows` and the table up to date, and return the names of the cropped cases."""
    cropped, written = [], time.monotonic()
    try:
        for task, row in with_progress(
            run_each(crop_case, tasks, processes), total=len(tasks), unit="case", desc="cropping"
        ):
            rows[task.scan.name] = row or failed_row(task, "its process was killed: give a smaller -np or more memory")
            if rows[task.scan.name].status == DONE:
                cropped.append(task.scan.name)
            if time.monotonic() - written > PAUSE:
                write_qc_table(rows.values(), output)
                written = time.monotonic()
    finally:  # Ctrl+C too
        write_qc_table(rows.values(), output)
    return cropped


def _is_cropped(row: QCRow | None, task: CropTask) -> bool:
    if row is None or row.status == FAILED:
        return False
    return row.made_of == task.made_of and all(file.exists() for file in files_of(row, task.settings.output))


def _checksum(scan: Scan, settings: CropSettings, candidates: Sequence[int]) -> str:
    """Return a checksum of the names, sizes and dates of all files of a case, and of the settings."""
    paths = scan.files
    paths += [pair[number] for number in candidates for pair in (settings.templates, settings.regions)]
    parts = [f"{settings.margin:g} {settings.resample}"]
    for path in paths:
        parts += [f"{file.absolute()} {size} {date}" for file, size, date in files_below(path)]
    return short_digest("\n".join(parts))
