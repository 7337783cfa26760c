"""From a folder of scans to an nnU-Net raw data set of crops, with all that a reader needs to check them.

`qc.csv` is the memory: a case is done when it has a row there without a problem, made of the same files in the same
way, and everything that was written for it is still there. So a call that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from glob import escape
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_vit_mae.datasets.crop.contact_sheet import thumbnail, write_thumbnail
from nnunet_vit_mae.datasets.crop.dataset import Cropping
from nnunet_vit_mae.datasets.crop.qc_table import (
    DONE,
    FAILED,
    REJECTED,
    QCRow,
    files_of,
    read_qc_table,
    remove,
    worst_first,
    write_qc_table,
)
from nnunet_vit_mae.datasets.crop.region import (
    Region,
    crop,
    displacement,
    find_box,
    geometry_of,
    name_of,
    read_region,
    resample_region,
)
from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.files import replacing
from nnunet_vit_mae.imaging.channels import channel_file_name
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
from nnunet_vit_mae.imaging.scans import ENDING, Scan, ScanError, read_scan, write_image
from nnunet_vit_mae.workers import run_each

PAUSE = 5.0  # seconds between two writes of the table: it may have thousands of rows


@dataclass(frozen=True)
class CropSettings:
    """How all cases are cropped; templates and regions are paired."""

    output: Path
    templates: list[Path]
    regions: list[Path]
    margin: float = 0.0  # mm
    resample: bool = False


@dataclass(frozen=True)
class CropTask:
    """One case, the numbers of the templates it may be registered to, and its checksum."""

    scan: Scan
    settings: CropSettings
    candidates: list[int]
    made_of: str


def crop_scans(
    scans: Sequence[Scan], settings: CropSettings, template_of: Mapping[str, str] | None, processes: int
) -> Cropping:
    """Crop all that is not done yet; `template_of` names the template of each case, else the most similar is taken.

    A scan that cannot be cropped has its reason in `qc.csv` and is tried again by the next call. Raises `UserError`
    when templates and regions do not fit, or the folder is in use by something else.
    """
    if len(settings.templates) != len(settings.regions):
        raise UserError(f"{len(settings.templates)} templates and {len(settings.regions)} regions: give one for each.")
    names = [name_of(template) for template in settings.templates]
    if len(set(names)) < len(names):
        raise UserError(f"Templates are named {', '.join(names)}: give each a name of its own.")
    for template, region in zip(settings.templates, settings.regions, strict=True):
        read_region(template, region)
    rows = {row.case: row for row in read_qc_table(settings.output)}
    jobs = []
    for scan in scans:
        try:
            candidates = _candidates(scan, names, template_of)
        except ScanError as error:
            if scan.name in rows:
                remove(rows[scan.name], settings.output)
            rows[scan.name] = QCRow(scan.name, problem=str(error), source=_source(scan))
            continue
        _refuse_other_case(rows.get(scan.name), scan)
        job = CropTask(scan, settings, candidates, _checksum(scan, settings, candidates))
        if not _is_done(rows.get(scan.name), job):
            jobs.append(job)
    cropped = _crop_all(jobs, rows, settings.output, processes)
    return Cropping(worst_first(rows.values()), cropped)


# ---------- one case, in a process of its own


def crop_case(job: CropTask) -> QCRow:
    """Register, crop and write one case; a failure is a row too, and leaves no files."""
    try:
        with single_itk_thread():
            return _crop_case(job)
    except (ScanError, RegistrationError) as error:
        row = _failed(job, str(error))
    except Exception as error:  # noqa: BLE001  one scan must not stop thousands
        row = _failed(job, f"{type(error).__name__}: {reader_reason(error)}")
    remove(row, job.settings.output)
    return row


def _crop_case(job: CropTask) -> QCRow:
    scan, settings = job.scan, job.settings
    images = {number: read_scan(path) for number, path in scan.channels.items()}
    first = next((image for image in images.values() if sitk.GetArrayViewFromImage(image).any()), None)
    if first is None:
        raise ScanError("all its images are zeros")
    label = read_scan(scan.label) if scan.label else None
    _check_grids(first, images, label)
    _check_values(label)
    region, alignment = max(
        ((region, register(region.template, first, affine=True)) for region in map(_region, *_pairs(job))),
        key=lambda found: found[1].similarity.mutual_information,
    )
    box = find_box(region, alignment.transform, first, settings.margin)
    folder = settings.output / ("imagesTr" if label is not None else "imagesUn")
    for number, image in images.items():
        cut = _cut(image, region, alignment, job, label=False) if settings.resample else crop(image, box)
        write_image(cut, folder / channel_file_name(scan.name, number, ENDING))
    values, label_inside = np.zeros(0, int), None
    if label is not None:
        label_inside = _labelled(crop(label, box)) / max(1, _labelled(label))
        cut = _cut(label, region, alignment, job, label=True) if settings.resample else crop(label, box)
        write_image(cut, settings.output / "labelsTr" / f"{scan.name}{ENDING}")
        values = np.unique(sitk.GetArrayViewFromImage(cut)).astype(int)
    write_thumbnail(thumbnail(region, first, alignment.transform), settings.output / "thumbnails" / f"{scan.name}.png")
    with replacing(settings.output / "transforms" / f"{scan.name}.tfm") as temporary:
        sitk.WriteTransform(alignment.transform, str(temporary))
    near = _similarity_near(region, first, alignment.transform)
    return QCRow(
        scan.name,
        DONE,
        folder.name,
        region.name,
        near.correlation,
        near.mutual_information,
        alignment.similarity.correlation,
        alignment.similarity.mutual_information,
        displacement(region, alignment.transform),
        rotation_degrees(alignment.transform),
        scale(alignment.transform),
        box.coverage,
        label_inside,
        " ".join(map(str, images)),
        " ".join(map(str, values)),
        "",
        job.made_of,
        _source(scan),
    )


def _pairs(job: CropTask) -> tuple[list[Path], list[Path]]:
    settings = job.settings
    return [settings.templates[i] for i in job.candidates], [settings.regions[i] for i in job.candidates]


@lru_cache(maxsize=16)
def _region(template: Path, region: Path) -> Region:
    return read_region(template, region)


def _check_grids(first: sitk.Image, images: Mapping[int, sitk.Image], label: sitk.Image | None) -> None:
    others = {f"channel {number:04d}": image for number, image in images.items()}
    for name, image in (others | ({"label": label} if label is not None else {})).items():
        if difference := geometry_of(first).difference(geometry_of(image)):
            raise ScanError(f"its {name} differs from the first channel in {difference}: resample one to the other")


def _check_values(label: sitk.Image | None) -> None:
    if label is not None:
        array = sitk.GetArrayViewFromImage(label)
        if not whole_numbers(array) or array.min() < 0:
            raise ScanError("its label has values that are not whole numbers from 0 on")


def _labelled(label: sitk.Image) -> int:
    return int(np.count_nonzero(sitk.GetArrayViewFromImage(label)))


def _cut(image: sitk.Image, region: Region, alignment: Alignment, job: CropTask, *, label: bool) -> sitk.Image:
    return resample_region(image, region, alignment.transform, job.settings.margin, label=label)


def _similarity_near(region: Region, scan: sitk.Image, transform: sitk.Transform) -> Similarity:
    """In the box of the region and half its sides around: whether this place fits, not the head as a whole."""
    extent = float(np.ptp(region.points, axis=0).mean())
    identity = sitk.Transform(3, sitk.sitkIdentity)
    place = crop(region.template, find_box(region, identity, region.template, extent / 2))
    try:
        return similarity(place, scan, transform)
    except RegistrationError:  # a sliver of it is in the scan
        return Similarity(0.0, 0.0)


def _failed(job: CropTask, problem: str) -> QCRow:
    scan = job.scan
    folder, channels = "imagesTr" if scan.label else "imagesUn", " ".join(map(str, scan.channels))
    row = QCRow(scan.name, folder=folder, channels=channels, problem=problem)
    return replace(row, made_of=job.made_of, source=_source(scan))


# ---------- what is done, and what is to do


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
    """Do the jobs and keep `rows` and the table up to date; gives the names of those that went well."""
    for job in jobs:  # what an earlier call made of other files or settings must not stay beside the new
        if row := rows.pop(job.scan.name, None):
            remove(row, output)
    _thumbnails_of_templates(jobs, output)
    cropped, written = [], time.monotonic()
    try:
        for job, row in tqdm(run_each(crop_case, jobs, processes), total=len(jobs), unit="case", disable=not jobs):
            rows[job.scan.name] = row or _failed(job, "its process was killed: give more memory or a smaller -np")
            cropped += [job.scan.name] * (rows[job.scan.name].status == DONE)
            if time.monotonic() - written > PAUSE:
                write_qc_table(rows.values(), output)
                written = time.monotonic()
    finally:  # Ctrl+C too
        write_qc_table(rows.values(), output)
    return cropped


def _thumbnails_of_templates(jobs: list[CropTask], output: Path) -> None:
    """What all others are compared with."""
    if jobs:
        for template, region in zip(jobs[0].settings.templates, jobs[0].settings.regions, strict=True):
            of_template = _region(template, region)
            picture = thumbnail(of_template, of_template.template, sitk.Transform(3, sitk.sitkIdentity))
            write_thumbnail(picture, output / "thumbnails" / f"template.{of_template.name}.png")


def _is_done(row: QCRow | None, job: CropTask) -> bool:
    if row is None or row.status == FAILED:
        return False
    if row.status == REJECTED:  # a reader's decision holds, whatever the settings are
        return True
    return row.made_of == job.made_of and all(file.exists() for file in files_of(row, job.settings.output))


def _source(scan: Scan) -> str:
    """Where the scan came from: another scan of the same name is another case."""
    return str(next(iter(scan.channels.values())).absolute())


def _refuse_other_case(row: QCRow | None, scan: Scan) -> None:
    if row and row.source and row.source != _source(scan) and Path(row.source).exists():
        raise UserError(
            f"{_source(scan)} and {row.source} would be one case, {scan.name}: rename one of them, or give another -o."
        )


def _checksum(scan: Scan, settings: CropSettings, candidates: Sequence[int]) -> str:
    """Of names, sizes and dates of all files that a case is made of, and of the settings."""
    paths = [*scan.channels.values(), *([scan.label] if scan.label else [])]
    paths += [pair[number] for number in candidates for pair in (settings.templates, settings.regions)]
    parts = [f"{settings.margin:g} {settings.resample}"]
    for path in paths:
        siblings = path.parent.glob(f"{escape(path.stem)}.*") if path.suffix in (".mhd", ".nhdr") else [path]
        files = sorted(file for file in (path.rglob("*") if path.is_dir() else siblings) if file.is_file())
        parts += [f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
