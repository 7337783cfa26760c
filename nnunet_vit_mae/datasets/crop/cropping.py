"""Crop a folder of scans to an nnU-Net raw dataset, with everything that is needed to check the crops by eye.

A case is done if it has a row without a problem in `qc.csv`, made from the same files with the same settings, and if
all of its files still exist. A call that was stopped can therefore be repeated and continues where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.crop.carried import SourceRecords, read_case_records
from nnunet_vit_mae.datasets.crop.contact_sheet import thumbnail, write_thumbnail
from nnunet_vit_mae.datasets.crop.dataset import Cropping, description_beside, finish
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
from nnunet_vit_mae.datasets.crop.region import (
    Box,
    Region,
    crop,
    displacement,
    find_box,
    name_of,
    read_region,
    resample_region,
)
from nnunet_vit_mae.datasets.crop.sources import (
    files_below,
    refuse_other_case,
    short_digest,
    source_columns,
    without_folders,
)
from nnunet_vit_mae.datasets.tables import read_case_table, refuse_lost_zeros
from nnunet_vit_mae.errors import UserError, WriteError, reader_reason
from nnunet_vit_mae.imaging.channels import channel_file_name
from nnunet_vit_mae.imaging.grids import turned_onto
from nnunet_vit_mae.imaging.labels import whole_numbers
from nnunet_vit_mae.imaging.registration import (
    Alignment,
    RegistrationError,
    Similarity,
    register,
    rotation_degrees,
    scale,
    similarity,
    single_itk_thread,
)
from nnunet_vit_mae.imaging.scans import ENDING, Scan, ScanError, find_scans, read_scan
from nnunet_vit_mae.imaging.stated_geometry import ambiguities_among
from nnunet_vit_mae.imaging.volumes import geometry_of
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.files import locked, make_folder, read_back_otherwise, remove_unfinished, replacing

PAUSE = 5.0  # seconds between two writes of the table, which may have thousands of rows


@dataclass(frozen=True)
class CropSettings:
    """How all cases are cropped; templates and regions are paired, the margin is in mm."""

    output: Path
    templates: list[Path]
    regions: list[Path]
    margin: float = 0.0
    resample: bool = False


@dataclass(frozen=True)
class TemplateColumn:
    """The table that names a template for each case, its column of cases (None: detected) and of templates."""

    file: Path
    case: str | None
    template: str


@dataclass(frozen=True)
class CropTask:
    """One case, the numbers of the templates it may be registered to, and its checksum."""

    scan: Scan
    settings: CropSettings
    candidates: list[int]
    made_of: str


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
        cropping = finish(cropped, settings.output, contrasts, description, source)
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
    for template, region in zip(settings.templates, settings.regions, strict=True):
        read_region(template, region)
    rows = {row.case: row for row in read_qc_table(settings.output)}
    refuse_lost_zeros(settings.output / QC_TABLE, "case", rows, [scan.name for scan in scans])
    jobs = []
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
        job = CropTask(scan, settings, candidates, _checksum(scan, settings, candidates))
        if not _is_cropped(rows.get(scan.name), job):
            jobs.append(job)
    cropped = _crop_all(jobs, rows, settings.output, processes)
    return Cropping(worst_first(rows.values()), cropped)


# ---------- one case, in a process of its own


def crop_case(job: CropTask) -> QCRow:
    """Register, crop and write one case; a failure becomes a row with a problem and leaves no files."""
    try:
        with single_itk_thread():
            return _crop_case(job)
    except (ScanError, RegistrationError) as error:
        row = _failed(job, str(error))
    except WriteError:  # a full disk is nothing about this scan, and stops the others too
        raise
    except Exception as error:  # noqa: BLE001  one scan must not stop the others
        row = _failed(job, f"{type(error).__name__}: {reader_reason(error)}")
    remove_files(row, job.settings.output)
    return row


def _crop_case(job: CropTask) -> QCRow:
    scan, settings = job.scan, job.settings
    images = {number: read_scan(path) for number, path in scan.channels.items()}
    first = next((image for image in images.values() if sitk.GetArrayViewFromImage(image).any()), None)
    if first is None:
        raise ScanError("all its images are zeros")
    images = {number: _on_the_grid(image, first, f"channel {number:04d}") for number, image in images.items()}
    label = _on_the_grid(read_scan(scan.label), first, "label") if scan.label else None
    _check_values(label)
    region, alignment = _register_to_best(job, first)
    box = find_box(region, alignment.transform, first, settings.margin)
    folder = settings.output / ("imagesTr" if label is not None else "imagesUn")
    for number, image in images.items():
        cut = _cut(image, box, region, alignment, job, label=False)
        write_image(cut, folder / channel_file_name(scan.name, number, ENDING))
    label_values, label_inside = "", None
    if label is not None:
        label_inside = _labelled_voxels(crop(label, box)) / max(1, _labelled_voxels(label))
        cut = _cut(label, box, region, alignment, job, label=True)
        write_image(cut, settings.output / "labelsTr" / f"{scan.name}{ENDING}")
        label_values = " ".join(map(str, np.unique(sitk.GetArrayViewFromImage(cut)).astype(int)))
    write_thumbnail(thumbnail(region, first, alignment.transform), settings.output / "thumbnails" / f"{scan.name}.png")
    _write_transform(alignment.transform, settings.output / "transforms" / f"{scan.name}.tfm")
    around = _similarity_around(region, first, alignment.transform)
    return QCRow(
        scan.name,
        DONE,
        folder.name,
        region.name,
        region_correlation=around.correlation,
        region_mutual_information=around.mutual_information,
        correlation=alignment.similarity.correlation,
        mutual_information=alignment.similarity.mutual_information,
        displacement_mm=displacement(region, alignment.transform),
        rotation_degrees=rotation_degrees(alignment.transform),
        scale=scale(alignment.transform),
        coverage=box.coverage,
        label_inside=label_inside,
        channels=" ".join(map(str, images)),
        label_values=label_values,
        made_of=job.made_of,
        **source_columns(scan),
    )


def _write_transform(transform: sitk.Transform, file: Path) -> None:
    with replacing(file) as temporary:
        sitk.WriteTransform(transform, str(temporary))
        is_same = sitk.ReadTransform(str(temporary)).GetParameters() == transform.GetParameters()
        if not (is_same and temporary.read_bytes().endswith(b"\n")):
            raise read_back_otherwise(temporary)


def _register_to_best(job: CropTask, image: sitk.Image) -> tuple[Region, Alignment]:
    """Register an image to each candidate and return the most similar template."""
    candidates = []
    for number in job.candidates:
        region = _cached_region(job.settings.templates[number], job.settings.regions[number])
        candidates.append((region, register(region.template, image, affine=True)))
    return max(candidates, key=lambda candidate: candidate[1].similarity.mutual_information)


@lru_cache(maxsize=16)
def _cached_region(template: Path, region: Path) -> Region:
    return read_region(template, region)


def _on_the_grid(image: sitk.Image, first: sitk.Image, name: str) -> sitk.Image:
    """Return an image along the axes of the first channel; raises `ScanError` if its voxels lie in other places."""
    turned = turned_onto(image, first)
    if turned is None:
        difference = geometry_of(first).difference(geometry_of(image))
        raise ScanError(f"its {name} differs from the first channel in {difference}: resample one to the other")
    return turned


def _check_values(label: sitk.Image | None) -> None:
    if label is not None:
        array = sitk.GetArrayViewFromImage(label)
        if not whole_numbers(array) or array.min() < 0:
            raise ScanError("its label has values that are not integers from 0 on")


def _labelled_voxels(label: sitk.Image) -> int:
    return int(np.count_nonzero(sitk.GetArrayViewFromImage(label)))


def _cut(
    image: sitk.Image, box: Box, region: Region, alignment: Alignment, job: CropTask, *, label: bool
) -> sitk.Image:
    if job.settings.resample:
        return resample_region(image, region, alignment.transform, job.settings.margin, label=label)
    return crop(image, box)


def _similarity_around(region: Region, scan: sitk.Image, transform: sitk.Transform) -> Similarity:
    """Return the similarity around the region only, in its box and half a side around it."""
    extent = float(np.ptp(region.points, axis=0).mean())
    identity = sitk.Transform(3, sitk.sitkIdentity)
    place = crop(region.template, find_box(region, identity, region.template, extent / 2))
    try:
        return similarity(place, scan, transform)
    except RegistrationError:  # hardly any of it is in the scan
        return Similarity(0.0, 0.0)


def _failed(job: CropTask, problem: str) -> QCRow:
    scan = job.scan
    folder, channels = "imagesTr" if scan.label else "imagesUn", " ".join(map(str, scan.channels))
    paths = [*scan.files, *job.settings.templates, *job.settings.regions]
    row = QCRow(scan.name, folder=folder, channels=channels, problem=without_folders(problem, paths))
    return replace(row, made_of=job.made_of, **source_columns(scan))


# ---------- which cases are done, and which remain


def _candidates(scan: Scan, names: Sequence[str], template_of: Mapping[str, str] | None) -> list[int]:
    if template_of is None:
        return list(range(len(names)))
    if scan.name not in template_of:
        raise ScanError("it has no row in the table of templates")
    wanted = name_of(Path(template_of[scan.name]))
    if wanted not in names:
        raise ScanError(f"its template {wanted or 'in the table'} was not given with -t")
    return [names.index(wanted)]


def _crop_all(jobs: list[CropTask], rows: dict[str, QCRow], output: Path, processes: int) -> list[str]:
    """Do the jobs, keep `rows` and the table up to date, and return the names of the cropped cases."""
    for job in jobs:  # remove what an earlier call made from other files or settings
        if row := rows.pop(job.scan.name, None):
            remove_files(row, output)
    for folder in (output, *(path for path in output.iterdir() if path.is_dir())):
        remove_unfinished(folder)
    write_qc_table(rows.values(), output)  # first of all: by it the next call knows the folder for its own
    _thumbnails_of_templates(jobs, output)
    cropped, written = [], time.monotonic()
    try:
        for job, row in with_progress(
            run_each(crop_case, jobs, processes), total=len(jobs), unit="case", desc="cropping"
        ):
            rows[job.scan.name] = row or _failed(job, "its process was killed: give a smaller -np or more memory")
            if rows[job.scan.name].status == DONE:
                cropped.append(job.scan.name)
            if time.monotonic() - written > PAUSE:
                write_qc_table(rows.values(), output)
                written = time.monotonic()
    finally:  # Ctrl+C too
        write_qc_table(rows.values(), output)
    return cropped


def _thumbnails_of_templates(jobs: list[CropTask], output: Path) -> None:
    """Write the thumbnails that all others are compared with."""
    if jobs:
        for template, region_file in zip(jobs[0].settings.templates, jobs[0].settings.regions, strict=True):
            region = _cached_region(template, region_file)
            picture = thumbnail(region, region.template, sitk.Transform(3, sitk.sitkIdentity))
            write_thumbnail(picture, output / "thumbnails" / f"template.{region.name}.png")


def _is_cropped(row: QCRow | None, job: CropTask) -> bool:
    if row is None or row.status == FAILED:
        return False
    return row.made_of == job.made_of and all(file.exists() for file in files_of(row, job.settings.output))


def _checksum(scan: Scan, settings: CropSettings, candidates: Sequence[int]) -> str:
    """Return a checksum of the names, sizes and dates of all files of a case, and of the settings."""
    paths = scan.files
    paths += [pair[number] for number in candidates for pair in (settings.templates, settings.regions)]
    parts = [f"{settings.margin:g} {settings.resample}"]
    for path in paths:
        parts += [f"{file.absolute()} {size} {date}" for file, size, date in files_below(path)]
    return short_digest("\n".join(parts))
