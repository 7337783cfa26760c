"""From studies of DICOM or BIDS to an nnU-Net raw data set: contrasts by name, on one grid, without patients' names.

Cases are running numbers, P0001_1 the first session of the first patient, so that a table can still tell whose they
are. Which number is whom is written only where `key` says, which must be outside of the data set.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_vit_mae.datasets.contrasts import fill_contrasts
from nnunet_vit_mae.datasets.convert.studies import Study, read_source
from nnunet_vit_mae.datasets.crop.region import geometry_of
from nnunet_vit_mae.datasets.tables import read_case_table
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import make_folder, replacing, write_json
from nnunet_vit_mae.imaging.channels import channel_file_name
from nnunet_vit_mae.imaging.registration import RegistrationError, register, single_itk_thread
from nnunet_vit_mae.imaging.scans import ENDING, ScanError, write_image
from nnunet_vit_mae.workers import run_each

SCANS_TABLE, PROBLEMS = "scans.csv", "problems.csv"
LABEL, WHOLE_STUDY = "label", "study"  # what a problem can be of, beside a contrast
ALL, UNKNOWN = "all", "unknown"  # whose it can be, beside a case
KEY_FIELDS = ("case", "patient", "session")


@dataclass(frozen=True)
class ConversionTask:
    """One study, what it is called from now on, and the contrasts in the order of the channels."""

    study: Study
    case: str
    contrasts: list[str]
    reference: str | None
    output: Path


@dataclass(frozen=True)
class Done:
    """What became of a study: its folder (None when nothing could be used), a row of the table, problems by image."""

    case: str
    folder: str | None = None
    row: dict[str, str] = field(default_factory=dict)
    label_values: tuple[int, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """All studies by case, problems that are of no case, and what keeps absent contrasts from being filled."""

    done: list[Done]
    unfilled: str = ""

    @property
    def problems(self) -> list[str]:
        """One phrase for each."""
        return [f"{one.case} {what}: {why}" for one in self.done for what, why in one.problems.items()]


def convert(
    studies: Sequence[Study],
    contrasts: Sequence[str],
    reference: str | None,
    output: Path,
    key: Path | None,
    processes: int,
    lost: int = 0,
) -> Conversion:
    """Write all studies to the new raw data set `output`; a study or image that is no use stops none of the others.

    Absent contrasts are filled as `mae3d_fill_contrasts` does it. `lost` is the number of damaged files of no study.
    Raises `UserError` when the data set or the key cannot be written, and when nothing could be converted.
    """
    if key is not None and output.resolve() in key.resolve().parents:
        raise UserError(f"{key} is inside of the data set, which would go along with it: give --key another folder.")
    names = _pseudonyms(studies, key)
    make_folder(output)
    if key is not None:
        _write_key(names, key)
    jobs = [
        ConversionTask(study, names[study.patient, study.session], list(contrasts), reference, output)
        for study in studies
    ]
    results = {}
    for job, done in tqdm(run_each(convert_study, jobs, processes), total=len(jobs), unit="study"):
        results[job.case] = done or Done(job.case, problems={WHOLE_STUDY: "needs more memory than there is: lower -np"})
    done = [results[case] for case in sorted(results)] + _of_no_case(list(results.values()), contrasts, lost)
    _write_tables(done, contrasts, output)
    if not any(one.folder for one in done):
        reasons = "; ".join(Conversion(done).problems[:5])
        raise UserError(f"None of {len(jobs)} studies could be converted ({reasons}): see {output / PROBLEMS}.")
    values = sorted({value for one in done for value in one.label_values} - {0})
    content = {
        "channel_names": {str(number): name for number, name in enumerate(contrasts)},
        "labels": {"background": 0} | {f"label_{value}": value for value in values},
        "numTraining": sum(one.folder == "imagesTr" for one in done),
        "file_ending": ENDING,
    }
    write_json(content, output / "dataset.json")
    try:
        fill_contrasts(output)
    except UserError as error:  # nothing has to be converted again
        return Conversion(done, f"{str(error).rstrip('.')}, then run mae3d_fill_contrasts.")
    return Conversion(done)


def _of_no_case(done: list[Done], contrasts: Sequence[str], lost: int) -> list[Done]:
    """Problems that only show when all studies are done."""
    found = {name for one in done for name in one.row.get("contrasts", "").split(";")}
    zeros = "is in no case, so that this channel is zeros everywhere"
    files = f"{lost} files cannot be read and are of no series that can, copy them again: series may lack slices"
    return [
        Done(ALL, problems={name: zeros for name in contrasts if name not in found}),
        Done(UNKNOWN, problems={WHOLE_STUDY: files} if lost else {}),
    ]


# ---------- one study, in a process of its own


def convert_study(job: ConversionTask) -> Done:
    """Read, bring together and write one study; a failure is a result too."""
    problems = dict(job.study.problems)
    try:
        with single_itk_thread():
            return _convert_study(job, problems)
    except ScanError as error:
        return Done(job.case, problems={**problems, WHOLE_STUDY: str(error)})
    except Exception as error:  # noqa: BLE001  one study must not stop thousands; texts may hold names
        return Done(job.case, problems={**problems, WHOLE_STUDY: f"could not be converted ({type(error).__name__})"})


def _convert_study(job: ConversionTask, problems: dict[str, str]) -> Done:
    images = _read_images(job, problems)
    if not images:
        return Done(job.case, problems=problems or {WHOLE_STUDY: "has no image"})
    label, owner = _read_label(job.study, images, problems)
    reference = _reference(job, list(images), owner)
    written = {reference: images[reference]}
    row = _first_columns(job, reference)
    for contrast, image in images.items():
        row |= _columns(job.study, contrast, image)
        if contrast == reference:
            continue
        if geometry_of(images[reference]).difference(geometry_of(image)) is None:
            written[contrast] = image
            continue
        try:
            found = register(images[reference], image, affine=False)
        except RegistrationError as error:
            problems[contrast] = f"could not be brought to {reference}: {error}"
            continue
        row[f"{contrast}_mutual_information"] = f"{found.similarity.mutual_information:.4f}"
        written[contrast] = _onto(image, images[reference], found.transform, label=False)
        if label is not None and contrast == owner:
            label = _onto(label, images[reference], found.transform, label=True)
    if label is not None and geometry_of(label).difference(geometry_of(images[reference])):
        label, problems[LABEL] = None, f"is on the grid of {owner}, which could not be brought to {reference}"
    return _write(job, written, label, row, problems)


def _read_images(job: ConversionTask, problems: dict[str, str]) -> dict[str, sitk.Image]:
    images = {}
    for contrast in job.contrasts:
        if contrast in job.study.images:
            try:
                images[contrast] = read_source(job.study.images[contrast])
            except ScanError as error:
                problems[contrast] = str(error)
    return images


def _write(
    job: ConversionTask,
    images: dict[str, sitk.Image],
    label: sitk.Image | None,
    row: dict[str, str],
    problems: dict[str, str],
) -> Done:
    folder = "imagesTr" if label is not None else "imagesUn"
    for contrast, image in images.items():
        write_image(image, job.output / folder / channel_file_name(job.case, job.contrasts.index(contrast), ENDING))
    values = np.zeros(0, int)
    if label is not None:
        values = np.unique(sitk.GetArrayViewFromImage(label)).astype(int)
        write_image(label, job.output / "labelsTr" / f"{job.case}{ENDING}")
    row["contrasts"] = ";".join(contrast for contrast in job.contrasts if contrast in images)
    return Done(job.case, folder, row, tuple(values.tolist()), problems)


def _reference(job: ConversionTask, present: list[str], owner: str | None) -> str:
    """What the others are brought to: as asked for, else what the label was drawn on, else the first one."""
    return job.reference if job.reference in present and job.reference else owner or present[0]


def _read_label(
    study: Study, images: dict[str, sitk.Image], problems: dict[str, str]
) -> tuple[sitk.Image | None, str | None]:
    """The label as whole numbers, and the contrast whose grid it is on."""
    if study.label is None:
        return None, None
    try:
        label = read_source(study.label)
        values = np.unique(sitk.GetArrayViewFromImage(label))
        if np.any(values != np.round(values)) or values[0] < 0 or values[-1] > 255:
            raise ScanError("has values that are no whole numbers from 0 to 255")
    except ScanError as error:
        problems[LABEL] = str(error)
        return None, None
    for contrast, image in images.items():
        if geometry_of(label).difference(geometry_of(image)) is None:
            return sitk.Cast(label, sitk.sitkUInt8), contrast
    problems[LABEL] = f"is on the grid of none of {', '.join(images)}"
    return None, None


def _onto(image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, *, label: bool) -> sitk.Image:
    if label:
        return sitk.Resample(image, reference, transform, sitk.sitkNearestNeighbor, 0)
    lowest = float(sitk.GetArrayViewFromImage(image).min())
    return sitk.Resample(image, reference, transform, sitk.sitkLinear, lowest, sitk.sitkFloat32)


# ---------- tables


def _first_columns(job: ConversionTask, reference: str) -> dict[str, str]:
    scanner = asdict(job.study.images[reference].scanner)
    thickness = {"slice_thickness_mm": scanner.pop("slice_thickness")}
    patient, session = job.case.split("_")
    return (
        {"case": job.case, "patient": patient, "session": session, "contrasts": "", "reference": reference}
        | scanner
        | thickness
    )


def _columns(study: Study, contrast: str, image: sitk.Image) -> dict[str, str]:
    """Of one contrast, as it was acquired."""
    scanner = study.images[contrast].scanner
    return {
        f"{contrast}_spacing_mm": " ".join(f"{mm:.4g}" for mm in image.GetSpacing()),
        f"{contrast}_slice_thickness_mm": scanner.slice_thickness,
        f"{contrast}_model": scanner.model,
        f"{contrast}_kernel": scanner.kernel,
    }


def _write_tables(done: Iterable[Done], contrasts: Sequence[str], output: Path) -> None:
    done = list(done)
    first = ("case", "patient", "session", "contrasts", "reference", "manufacturer", "model", "kernel")
    of_contrast = ("spacing_mm", "slice_thickness_mm", "model", "kernel", "mutual_information")
    columns = [*first, "slice_thickness_mm", *(f"{name}_{one}" for name in contrasts for one in of_contrast)]
    _write_rows([one.row for one in done if one.folder], columns, output / SCANS_TABLE)
    rows = [{"case": one.case, "image": what, "problem": why} for one in done for what, why in one.problems.items()]
    _write_rows(rows, ("case", "image", "problem"), output / PROBLEMS)


def _write_rows(rows: Iterable[dict[str, str]], columns: Sequence[str], file: Path) -> None:
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


# ---------- who is who


def _pseudonyms(studies: Sequence[Study], key: Path | None) -> dict[tuple[str, str], str]:
    """Case by patient and session; those that an earlier key names keep their numbers, new ones come after them."""
    names: dict[tuple[str, str], str] = {}
    if key is not None and key.exists():
        names = _read_key(key)
    patients = {patient: case.split("_")[0] for (patient, _), case in names.items()}
    for study in studies:
        if (study.patient, study.session) in names:
            continue
        last = max((int(name[1:]) for name in patients.values()), default=0)
        patient = patients.setdefault(study.patient, f"P{last + 1:04d}")
        sessions = [int(case.split("_")[1]) for case in names.values() if case.split("_")[0] == patient]
        names[study.patient, study.session] = f"{patient}_{max(sessions, default=0) + 1}"
    return names


def _read_key(key: Path) -> dict[tuple[str, str], str]:
    no_key = UserError(f"{key} is no key of an earlier conversion: give --key another file.")
    try:
        columns = read_case_table(key, "case", ()).columns
        names = {(columns["patient"][case], columns["session"][case]): case for case in columns["case"]}
    except (KeyError, UserError):  # whose texts may hold names
        raise no_key from None
    if not all(re.fullmatch(r"P[0-9]{4,}_[0-9]+", case) for case in names.values()):
        raise no_key
    return names


def _write_key(names: dict[tuple[str, str], str], key: Path) -> None:
    """Before the first image is, so that whatever happens later, who is who is known."""
    try:
        _write_rows([dict(zip(KEY_FIELDS, (case, *of), strict=True)) for of, case in names.items()], KEY_FIELDS, key)
    except OSError as error:
        raise UserError(
            f"{key} cannot be written ({error.strerror}): give a file with --key where you may write."
        ) from None
