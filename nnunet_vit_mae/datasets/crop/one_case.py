"""One scan, in a process of its own: registered to a template, cropped to the region, and written with its pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.crop.contact_sheet import thumbnail, write_thumbnail
from nnunet_vit_mae.datasets.crop.qc_table import DONE, QCRow, remove_files
from nnunet_vit_mae.datasets.crop.region import (
    Box,
    Region,
    crop,
    displacement,
    find_box,
    read_region,
    resample_region,
)
from nnunet_vit_mae.datasets.crop.sources import source_columns, without_folders
from nnunet_vit_mae.errors import WriteError, reader_reason
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
from nnunet_vit_mae.imaging.scans import ENDING, Scan, ScanError, read_scan
from nnunet_vit_mae.imaging.volumes import geometry_of
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.storage.files import read_back_otherwise, replacing


@dataclass(frozen=True)
class CropSettings:
    """How all cases are cropped; templates and regions are paired, the margin is in mm."""

    output: Path
    templates: list[Path]
    regions: list[Path]
    margin: float = 0.0
    resample: bool = False


@dataclass(frozen=True)
class CropTask:
    """One case, the numbers of the templates it may be registered to, and its checksum."""

    scan: Scan
    settings: CropSettings
    candidates: list[int]
    made_of: str


def crop_case(task: CropTask) -> QCRow:
    """Register, crop and write one case; a failure becomes a row with a problem and leaves no files."""
    try:
        with single_itk_thread():
            return _crop_case(task)
    except (ScanError, RegistrationError) as error:
        row = failed_row(task, str(error))
    except WriteError:  # a full disk is nothing about this scan, and stops the others too
        raise
    except Exception as error:  # noqa: BLE001  one scan must not stop the others
        row = failed_row(task, f"{type(error).__name__}: {reader_reason(error)}")
    remove_files(row, task.settings.output)
    return row


def _crop_case(task: CropTask) -> QCRow:
    scan, settings = task.scan, task.settings
    images = {number: read_scan(path) for number, path in scan.channels.items()}
    first = next((image for image in images.values() if sitk.GetArrayViewFromImage(image).any()), None)
    if first is None:
        raise ScanError("all its images are zeros")
    images = {number: _on_the_grid(image, first, f"channel {number:04d}") for number, image in images.items()}
    label = _read_label(scan.label, first) if scan.label else None
    region, alignment = _register_to_best(task, first)
    box = find_box(region, alignment.transform, first, settings.margin)
    folder = settings.output / ("imagesTr" if label is not None else "imagesUn")
    for number, image in images.items():
        cut = _cut(image, box, region, alignment, task, label=False)
        write_image(cut, folder / channel_file_name(scan.name, number, ENDING))
    label_values, label_inside = "", None
    if label is not None:
        label_inside = _labelled_voxels(crop(label, box)) / max(1, _labelled_voxels(label))
        cut = _cut(label, box, region, alignment, task, label=True)
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
        made_of=task.made_of,
        **source_columns(scan),
    )


def _write_transform(transform: sitk.Transform, file: Path) -> None:
    with replacing(file) as temporary:
        sitk.WriteTransform(transform, str(temporary))
        is_same = sitk.ReadTransform(str(temporary)).GetParameters() == transform.GetParameters()
        if not (is_same and temporary.read_bytes().endswith(b"\n")):
            raise read_back_otherwise(temporary)


def _register_to_best(task: CropTask, image: sitk.Image) -> tuple[Region, Alignment]:
    """Register an image to each candidate and return the most similar template."""
    candidates = []
    for number in task.candidates:
        region = _cached_region(task.settings.templates[number], task.settings.regions[number])
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


def _read_label(file: Path, first: sitk.Image) -> sitk.Image:
    label = _on_the_grid(read_scan(file), first, "label")
    array = sitk.GetArrayViewFromImage(label)
    if not whole_numbers(array) or array.min() < 0:
        raise ScanError("its label has values that are not integers from 0 on")
    return label


def _labelled_voxels(label: sitk.Image) -> int:
    return int(np.count_nonzero(sitk.GetArrayViewFromImage(label)))


def _cut(
    image: sitk.Image, box: Box, region: Region, alignment: Alignment, task: CropTask, *, label: bool
) -> sitk.Image:
    if task.settings.resample:
        return resample_region(image, region, alignment.transform, task.settings.margin, label=label)
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


def failed_row(task: CropTask, problem: str) -> QCRow:
    """Return the row of a case that could not be cropped."""
    scan = task.scan
    folder, channels = "imagesTr" if scan.label else "imagesUn", " ".join(map(str, scan.channels))
    paths = [*scan.files, *task.settings.templates, *task.settings.regions]
    row = QCRow(scan.name, folder=folder, channels=channels, problem=without_folders(problem, paths))
    return replace(row, made_of=task.made_of, **source_columns(scan))
