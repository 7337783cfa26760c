"""Convert studies from DICOM or BIDS to an nnU-Net raw dataset: contrasts by name, on one grid, with pseudonyms.

Cases have running numbers: P0001_1 is the first session of the first patient. Which case belongs to which patient is
written to the `key` only, a file outside the dataset.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.acquisition import KERNEL, OF_CONTRAST, SCANS_TABLE, SLICE_THICKNESS
from nnunet_vit_mae.datasets.contrasts import fill_contrasts
from nnunet_vit_mae.datasets.convert.key import name_cases
from nnunet_vit_mae.datasets.convert.label_values import HIGHEST, are_renumbered, numbers_of, place_labels
from nnunet_vit_mae.datasets.convert.studies import FoundStudies, Study, read_image_source
from nnunet_vit_mae.datasets.split.splits import alike_names
from nnunet_vit_mae.errors import UserError, WriteError
from nnunet_vit_mae.imaging.channels import channel_file_name
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.imaging.grids import turned_onto
from nnunet_vit_mae.imaging.registration import RegistrationError, register, resampled, single_itk_thread
from nnunet_vit_mae.imaging.scans import ENDING, ScanError
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_records, write_rows
from nnunet_vit_mae.storage.files import make_folder, read_json, write_json

CONVERTED = ".converted"  # what is known about studies that are done, until the dataset is complete
WAITING = f"{CONVERTED}/labels"
PROBLEMS, UNUSED = "problems.csv", "unused.csv"
CONTENTS = {
    "dataset.json": "nnU-Net's description: channels, labels and number of training cases",
    "imagesTr/": "images of the cases that have labels, one file for each contrast",
    "labelsTr/": "their labels",
    "imagesUn/": "images without labels, for pre-training",
    SCANS_TABLE: "scanner, slice thickness and protocol of each image",
    PROBLEMS: "what could not be converted, and why",
    UNUSED: "what was not used, and why",
    "contrasts.json": "which contrasts of each case are present, and which were filled with zeros",
}
LABEL, WHOLE_STUDY = "label", "study"  # a problem may concern these instead of a contrast
ALL, UNKNOWN = "all", "unknown"  # a problem may concern these instead of a case
UNUSED_SHOWN = 10  # kinds of images not used that are printed
UNUSED_FIELDS = ("case", "image", "reason")


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


@dataclass(frozen=True)
class Conversion:
    """All converted studies by case, problems of no single case, and the reason why contrasts were not filled.

    `labels` has the number of each value. `unused` counts what was not used, by description and reason. `alike` are
    numbers of patients with similar IDs.
    """

    studies: list[ConvertedStudy]
    labels: Mapping[int, int] = field(default_factory=dict)
    unused: Mapping[tuple[str, str], int] = field(default_factory=dict)
    alike: Sequence[Sequence[str]] = ()
    unfilled: str = ""

    @property
    def problems(self) -> list[str]:
        """Problems of all studies, one clause each."""
        return [f"{study.case} {image}: {reason}" for study in self.studies for image, reason in study.problems.items()]

    def unfinished(self, output: Path) -> str:
        """Return what could not be done and how to proceed, or an empty string."""
        sentences = [self.unfilled] if self.unfilled else []
        if self.problems:
            sentences.append(
                f"Some images could not be converted ({'; '.join(self.problems)}); all others were. The reasons are in "
                f"{output / PROBLEMS}, and the file given with --key tells which case belongs to which patient."
            )
        return " ".join(sentences)


def convert(
    found: FoundStudies,
    contrasts: Sequence[str],
    reference: str | None,
    output: Path,
    key: Path | None,
    processes: int,
) -> Conversion:
    """Write all studies to the new raw dataset `output`, which the caller holds (`new_folder`).

    An unusable study or image does not stop the others.

    Absent contrasts are filled as by `mae3d_fill_contrasts`. Raises `UserError` if the dataset or the key cannot be
    written, or if nothing could be converted.
    """
    studies = found.studies
    if key is not None and output.resolve() in key.resolve().parents:
        raise UserError(f"{key} is inside the dataset and would be shared with it: give another folder with --key.")
    make_folder(output)
    names = name_cases(studies, key)
    jobs = [
        ConversionTask(study, names[study.patient, study.session], list(contrasts), reference, output)
        for study in studies
    ]
    by_case = _converted_before(output, studies, names)
    left = [job for job in jobs if job.case not in by_case]
    for job, result in with_progress(
        run_each(convert_study, left, processes), total=len(left), unit="study", desc="converting"
    ):
        lost = ConvertedStudy(job.case, problems={WHOLE_STUDY: "needs more memory than is available: lower -np"})
        by_case[job.case] = result or lost
        if result:
            write_json(asdict(result), output / CONVERTED / f"{job.case}.json")
    converted = [by_case[case] for case in sorted(by_case)] + _of_no_case(
        list(by_case.values()), contrasts, found.damaged
    )
    unused = [(names[study.patient, study.session], *of_study) for study in studies for of_study in study.unused]
    unused += [("", *object_) for object_ in found.unused]
    counts, alike = Counter((image, reason) for _, image, reason in unused), _alike_patients(names)
    _write_conversion_tables(converted, contrasts, output)
    if unused:
        write_rows(UNUSED_FIELDS, unused, output / UNUSED)
    if not any(study.folder for study in converted):
        shutil.rmtree(output / CONVERTED)
        reasons = "; ".join(Conversion(converted).problems[:5])
        raise UserError(f"None of {len(jobs)} studies could be converted ({reasons}): see {output / PROBLEMS}.")
    labels = numbers_of(value for study in converted for value in study.label_values)
    place_labels(output / WAITING, output / "labelsTr", labels)
    content = {
        "channel_names": {str(number): name for number, name in enumerate(contrasts)},
        "labels": {"background": 0} | {f"label_{value}": number for value, number in labels.items()},
        "numTraining": sum(study.folder == "imagesTr" for study in converted),
        "file_ending": ENDING,
    }
    write_json(content, output / DESCRIPTION)
    shutil.rmtree(output / CONVERTED)
    try:
        fill_contrasts(output, is_locked=True)
    except UserError as error:  # nothing has to be converted again
        return Conversion(converted, labels, counts, alike, f"{str(error).rstrip('.')}, then run mae3d_fill_contrasts.")
    return Conversion(converted, labels, counts, alike)


def _alike_patients(names: Mapping[tuple[str, str], str]) -> list[list[str]]:
    """Return the numbers of patients whose IDs differ only in case or leading zeros, of the key too."""
    numbers = {patient: case.split("_")[0] for (patient, _), case in names.items()}
    return [[numbers[patient] for patient in group] for group in alike_names(numbers)]


def _converted_before(
    output: Path, studies: Sequence[Study], names: Mapping[tuple[str, str], str]
) -> dict[str, ConvertedStudy]:
    """Return what a conversion of the same studies had done when it was stopped, by case.

    Raises `UserError` if it was of other studies, or with other names for them.
    """
    folder, note = output / CONVERTED, output / CONVERTED / "studies.json"
    files = [file for study in studies for file in study.files]
    states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in files]
    # of all studies together, so that nobody can find a patient by trying
    content = {"studies": hashlib.sha256(repr((studies, sorted(names.items()), states)).encode()).hexdigest()}
    done = sorted(folder.glob("P*.json"))
    if not done:
        write_json(content, note)
    elif read_json(note) != content:
        raise UserError(f"{output} is an unfinished conversion of other files, or with another key: remove it.")
    before = (ConvertedStudy(**read_json(file)) for file in done)
    return {study.case: replace(study, label_values=tuple(study.label_values)) for study in before}


def _of_no_case(studies: list[ConvertedStudy], contrasts: Sequence[str], damaged: int) -> list[ConvertedStudy]:
    """Return problems that only show once all studies have been converted."""
    present = {name for study in studies for name in study.row.get("contrasts", "").split(";")}
    zeros = "is in no case, so that this channel is all zeros"
    files = f"{damaged} files cannot be read and belong to no readable series, copy them again: slices may be missing"
    return [
        ConvertedStudy(ALL, problems={name: zeros for name in contrasts if name not in present}),
        ConvertedStudy(UNKNOWN, problems={WHOLE_STUDY: files} if damaged else {}),
    ]


def conversion_report(conversion: Conversion, contrasts: Sequence[str], output: Path, key: Path | None) -> str:
    """Return what the command prints about the new dataset and what its user has to know."""
    folders = [study.folder for study in conversion.studies]
    lines = [
        f"{output} has {folders.count('imagesTr')} cases with labels and {folders.count('imagesUn')} without, with "
        f"contrasts {', '.join(contrasts)}; the scanners are listed in {output / SCANS_TABLE}."
    ]
    by_count = sorted(conversion.unused.items(), key=lambda item: (-item[1], item[0]))
    lines += [f"Not used: {count} x {image}: {reason}." for (image, reason), count in by_count[:UNUSED_SHOWN]]
    if by_count:
        lines.append(f"{output / UNUSED} lists all {sum(conversion.unused.values())} that were not used, by case.")
    if conversion.alike:
        lines.append(
            f"Are these different patients? {'; '.join(map(', '.join, conversion.alike))}: their IDs differ only in "
            "upper and lower case or in leading zeros."
        )
    if are_renumbered(conversion.labels):
        changes = ", ".join(f"{value} is now {number}" for value, number in conversion.labels.items())
        lines.append(f"Labels have new values, because nnU-Net requires 1, 2 and so on: {changes}.")
    if conversion.labels:
        lines.append(
            f"Name the labels in {output / DESCRIPTION} before you plan (they are called "
            f"{', '.join(f'label_{value}' for value in conversion.labels)}): names with left or right turn mirroring "
            "off."
        )
    if key is None:
        lines.append("Nothing records which case belongs to which patient, because --key was not given.")
    return "\n".join(lines)


# ---------- one study, in a process of its own


def convert_study(job: ConversionTask) -> ConvertedStudy:
    """Read, register and write one study; a failure is returned as a problem."""
    problems = dict(job.study.problems)
    try:
        with single_itk_thread():
            return _convert_study(job, problems)
    except ScanError as error:
        return ConvertedStudy(job.case, problems={**problems, WHOLE_STUDY: str(error)})
    except WriteError:  # a full disk is nothing about this study, and stops the others too
        raise
    except Exception as error:  # noqa: BLE001  one study must not stop the others; messages may hold names
        return ConvertedStudy(
            job.case, problems={**problems, WHOLE_STUDY: f"could not be converted ({type(error).__name__})"}
        )


def _convert_study(job: ConversionTask, problems: dict[str, str]) -> ConvertedStudy:
    images = _read_images(job, problems)
    if not images:
        return ConvertedStudy(job.case, problems=problems or {WHOLE_STUDY: "has no image"})
    label, owner = _read_label(job.study, images, problems)
    reference = _reference(job, list(images), owner)
    written = {reference: images[reference]}
    row = _first_columns(job, reference)
    for contrast, image in images.items():
        row |= _contrast_columns(job.study, contrast, image)
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
    return _write_case(job, written, label, row, problems)


def _read_images(job: ConversionTask, problems: dict[str, str]) -> dict[str, sitk.Image]:
    images = {}
    for contrast in job.contrasts:
        if contrast in job.study.images:
            try:
                images[contrast] = read_image_source(job.study.images[contrast])
            except ScanError as error:
                problems[contrast] = str(error)
    return images


def _write_case(
    job: ConversionTask,
    images: dict[str, sitk.Image],
    label: sitk.Image | None,
    row: dict[str, str],
    problems: dict[str, str],
) -> ConvertedStudy:
    folder = "imagesTr" if label is not None else "imagesUn"
    for contrast, image in images.items():
        write_image(image, job.output / folder / channel_file_name(job.case, job.contrasts.index(contrast), job.ending))
    values = np.zeros(0, int)
    if label is not None:
        values = np.unique(sitk.GetArrayViewFromImage(label)).astype(int)
        write_image(label, job.output / WAITING / f"{job.case}{job.ending}")
    row["contrasts"] = ";".join(contrast for contrast in job.contrasts if contrast in images)
    return ConvertedStudy(job.case, folder, row, tuple(values.tolist()), problems)


def _reference(job: ConversionTask, present: list[str], owner: str | None) -> str:
    """Return the contrast to register to: as asked for, else the one the label was drawn on, else the first."""
    if job.reference and job.reference in present:
        return job.reference
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
        if np.any(values != np.round(values)) or values[0] < 0 or values[-1] > HIGHEST:
            raise ScanError(f"has values that are not integers from 0 to {HIGHEST}")
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


# ---------- tables


def _first_columns(job: ConversionTask, reference: str) -> dict[str, str]:
    scanner = asdict(job.study.images[reference].scanner)
    thickness = {SLICE_THICKNESS: _length(scanner.pop("slice_thickness"))}
    patient, session = job.case.split("_")
    return (
        {"case": job.case, "patient": patient, "session": session, "contrasts": "", "reference": reference}
        | scanner
        | thickness
    )


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


def _write_conversion_tables(studies: Sequence[ConvertedStudy], contrasts: Sequence[str], output: Path) -> None:
    first = ("case", "patient", "session", "contrasts", "reference", "manufacturer", "model", KERNEL)
    columns = [*first, SLICE_THICKNESS, *(f"{name}_{column}" for name in contrasts for column in OF_CONTRAST)]
    write_records([study.row for study in studies if study.folder], columns, output / SCANS_TABLE)
    problems = ((study.case, *problem) for study in studies for problem in study.problems.items())
    write_rows(("case", "image", "problem"), problems, output / PROBLEMS)
