"""One study, in a process of its own: its contrasts on one grid and its label, written as a case."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.acquisition import SLICE_THICKNESS
from nnunet_vit_mae.datasets.convert.label_values import HIGHEST_LABEL
from nnunet_vit_mae.datasets.convert.studies import Study, read_image_source
from nnunet_vit_mae.errors import WriteError
from nnunet_vit_mae.imaging.channels import channel_file_name
from nnunet_vit_mae.imaging.grids import turned_onto
from nnunet_vit_mae.imaging.registration import RegistrationError, register, resampled, single_itk_thread
from nnunet_vit_mae.imaging.scans import ENDING, ScanError
from nnunet_vit_mae.imaging.writing import write_image

CONVERTED = ".converted"  # what is known about studies that are done, until the dataset is complete
WAITING = f"{CONVERTED}/labels"
LABEL, WHOLE_STUDY = "label", "study"  # a problem may concern these instead of a contrast


@dataclass(frozen=True)
class ConversionTask:
    """A study, the case that it becomes, the contrasts in the order of the channels, and the ending of its files."""

    study: Study
    case: str
    contrasts: list[str]
    reference: str | None
    output: Path
    ending: str = ENDING


@dataclass(frozen=True)
class ConvertedStudy:
    """A converted study: its folder (None if nothing was usable), a row of the table, and problems by image."""

    case: str
    folder: str | None = None
    row: dict[str, str] = field(default_factory=dict)
    label_values: tuple[int, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)


def convert_study(task: ConversionTask) -> ConvertedStudy:
    """Read, register and write one study; a failure is returned as a problem."""
    problems = dict(task.study.problems)
    try:
        with single_itk_thread():
            return _convert_study(task, problems)
    except ScanError as error:
        return ConvertedStudy(task.case, problems={**problems, WHOLE_STUDY: str(error)})
    except WriteError:  # a full disk is nothing about this study, and stops the others too
        raise
    except Exception as error:  # noqa: BLE001  one study must not stop the others; messages may hold names
        return ConvertedStudy(
            task.case, problems={**problems, WHOLE_STUDY: f"could not be converted ({type(error).__name__})"}
        )


def _convert_study(task: ConversionTask, problems: dict[str, str]) -> ConvertedStudy:
    images = _read_images(task, problems)
    if not images:
        return ConvertedStudy(task.case, problems=problems or {WHOLE_STUDY: "has no image"})
    label, owner = _read_label(task.study, images, problems)
    reference = _reference(task, list(images), owner)
    written = {reference: images[reference]}
    row = _first_columns(task, reference)
    for contrast, image in images.items():
        row |= _contrast_columns(task.study, contrast, image)
        if contrast == reference:
            continue
        if (turned := turned_onto(image, images[reference])) is not None:
            written[contrast] = turned
            continue
        try:
            alignment = register(images[reference], image, affine=False)
        except RegistrationError as error:
            problems[contrast] = f"could not be registered to {reference}: {error}"
            continue
        row[f"{contrast}_mutual_information"] = f"{alignment.similarity.mutual_information:.4f}"
        written[contrast] = resampled(image, images[reference], alignment.transform, label=False)
        if label is not None and contrast == owner:
            label = resampled(label, images[reference], alignment.transform, label=True)
    if label is not None:
        label = turned_onto(label, images[reference])
        if label is None:
            problems[LABEL] = f"is on the grid of {owner}, which could not be registered to {reference}"
    return _write_case(task, written, label, row, problems)


def _read_images(task: ConversionTask, problems: dict[str, str]) -> dict[str, sitk.Image]:
    images = {}
    for contrast in task.contrasts:
        if contrast in task.study.images:
            try:
                images[contrast] = read_image_source(task.study.images[contrast])
            except ScanError as error:
                problems[contrast] = str(error)
    return images


def _write_case(
    task: ConversionTask,
    images: dict[str, sitk.Image],
    label: sitk.Image | None,
    row: dict[str, str],
    problems: dict[str, str],
) -> ConvertedStudy:
    folder = "imagesTr" if label is not None else "imagesUn"
    for contrast, image in images.items():
        number = task.contrasts.index(contrast)
        write_image(image, task.output / folder / channel_file_name(task.case, number, task.ending))
    values = np.zeros(0, int)
    if label is not None:
        values = np.unique(sitk.GetArrayViewFromImage(label)).astype(int)
        write_image(label, task.output / WAITING / f"{task.case}{task.ending}")
    row["contrasts"] = ";".join(contrast for contrast in task.contrasts if contrast in images)
    return ConvertedStudy(task.case, folder, row, tuple(values.tolist()), problems)


def _reference(task: ConversionTask, present: list[str], owner: str | None) -> str:
    """Return the contrast to register to: as asked for, else the one the label was drawn on, else the first."""
    if task.reference and task.reference in present:
        return task.reference
    return owner or present[0]


def _read_label(
    study: Study, images: dict[str, sitk.Image], problems: dict[str, str]
) -> tuple[sitk.Image | None, str | None]:
    """Return the label in integers, and the contrast on whose grid it is."""
    if study.label is None:
        return None, None
    try:
        label = read_image_source(study.label)
        values = np.unique(sitk.GetArrayViewFromImage(label))
        if np.any(values != np.round(values)) or values[0] < 0 or values[-1] > HIGHEST_LABEL:
            raise ScanError(f"has values that are not integers from 0 to {HIGHEST_LABEL}")
    except ScanError as error:
        problems[LABEL] = str(error)
        return None, None
    turned = {contrast: turned_onto(label, image) for contrast, image in images.items()}
    fitting = {contrast: one for contrast, one in turned.items() if one is not None}
    if not fitting:
        problems[LABEL] = f"is on the grid of no contrast ({', '.join(images)}): resample it to that of one of them"
        return None, None
    owner = min(fitting, key=lambda contrast: fitting[contrast] is not label)  # rather one with the same axes
    return sitk.Cast(fitting[owner], sitk.sitkUInt8), owner


def _first_columns(task: ConversionTask, reference: str) -> dict[str, str]:
    scanner = asdict(task.study.images[reference].scanner)
    thickness = {SLICE_THICKNESS: _length(scanner.pop("slice_thickness"))}
    patient, session = task.case.split("_")
    names = {"case": task.case, "patient": patient, "session": session, "contrasts": "", "reference": reference}
    return names | scanner | thickness


def _length(text: str) -> str:
    """Return a length of a header (mm), or an empty field for what some state in its place, such as 0."""
    try:
        return text if 0 < float(text) < math.inf else ""
    except ValueError:
        return ""


def _contrast_columns(study: Study, contrast: str, image: sitk.Image) -> dict[str, str]:
    """Return the columns about one contrast, as it was acquired."""
    scanner = study.images[contrast].scanner
    return {
        f"{contrast}_spacing_mm": " ".join(f"{mm:.4g}" for mm in image.GetSpacing()),
        f"{contrast}_slice_thickness_mm": _length(scanner.slice_thickness),
        f"{contrast}_model": scanner.model,
        f"{contrast}_kernel": scanner.kernel,
    }
