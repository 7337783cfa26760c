"""DICOM studies as scans to quantify: series become channels by the same rules as in `mae3d_convert`.

A case is named after a hash of its images, so that a folder that grows, or is divided among processes, never gives a
case the segmentation of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.datasets.convert.dicom_studies import dicom_studies
from nnunet_vit_mae.datasets.convert.one_study import ConversionTask, convert_study
from nnunet_vit_mae.datasets.convert.sources import parse_patterns, parse_reference
from nnunet_vit_mae.datasets.convert.studies import ContrastPattern, Study
from nnunet_vit_mae.errors import UserError, did_you_mean
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, channel_file_name
from nnunet_vit_mae.imaging.ct_clipping import is_ct
from nnunet_vit_mae.imaging.dicom import DicomSeries
from nnunet_vit_mae.imaging.writing import write_zeros
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.prediction import find_prediction_cases
from nnunet_vit_mae.nnunet.quantification import Scans
from nnunet_vit_mae.nnunet.trainers import OUR_TRAINERS
from nnunet_vit_mae.nnunet.volume_tables import Part, keep_earlier
from nnunet_vit_mae.presets import canonical_contrast
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_records
from nnunet_vit_mae.storage.files import short_hash

UNLABELLED = "imagesUn"  # where the conversion puts studies without labels


@dataclass(frozen=True)
class DicomInput:
    """A folder of DICOM files, and what `mae3d_convert` is told about them too: patterns, and a reference."""

    folder: Path
    contrasts: Sequence[str]
    reference: str | None = None


@dataclass(frozen=True)
class StudyCase:
    """A study and the name of its case; the images are on the grid of the contrast `reference`, or of the first."""

    name: str
    study: Study
    reference: str | None

    def series(self, contrast: str) -> DicomSeries:
        """Return the series of a contrast."""
        origin = self.study.images[contrast].origin
        assert isinstance(origin, DicomSeries)
        return origin


@dataclass(frozen=True)
class DicomScans:
    """Converted studies: the scans to quantify, and by case the series on whose slices the segmentation will lie."""

    scans: Scans
    series: dict[str, DicomSeries]


def find_study_cases(model: Model, source: DicomInput) -> tuple[list[StudyCase], int]:
    """Find the studies in a folder, and assign their series to the channels of a model.

    Returns:
        The studies, sorted by the names of their cases, and the number of damaged files that belong to none of them.

    Raises:
        UserError: If no series can be assigned, or if a channel has no pattern.
    """
    channels = _channels(model)
    patterns = _channel_patterns(model, channels, source.contrasts)
    reference = parse_reference(source.reference, channels)
    found = dicom_studies(source.folder, patterns, None)
    cases = [StudyCase(_case_name(study, reference), study, reference) for study in found.studies]
    return sorted(cases, key=lambda case: case.name), found.damaged


def convert_cases(model: Model, cases: Sequence[StudyCase], part: Part, folder: Path) -> DicomScans:
    """Write the images of a part of the studies, named as nnU-Net expects; one that fails does not stop the others."""
    unreadable, series, channels = {}, {}, _channels(model)
    ending = model.plan.file_ending
    for case in with_progress(cases[part.number :: part.of], unit="study", desc="converting"):
        converted = convert_study(ConversionTask(case.study, case.name, channels, case.reference, folder, ending))
        files = [folder / UNLABELLED / channel_file_name(case.name, number, ending) for number in range(len(channels))]
        missing = [number for number, file in enumerate(files) if not file.is_file()]
        reasons = [f"{image} {reason}" for image, reason in converted.problems.items()]
        if not reasons and not _may_be_absent(model, missing):
            reasons = [f"there is no series of {', '.join(channels[number] for number in missing)}"]
        if reasons:
            unreadable[case.name] = "; ".join(reasons)
            for file in files:
                file.unlink(missing_ok=True)
            continue
        reference = converted.row["reference"]
        series[case.name] = case.series(reference)
        for number in missing:
            write_zeros(files[number], like=files[channels.index(reference)])
    images = folder / UNLABELLED
    readable = find_prediction_cases(model.plan, images) if series else []
    return DicomScans(Scans(images, readable, [case.name for case in cases], unreadable, converted=True), series)


def write_study_table(model: Model, cases: Sequence[StudyCase], file: Path) -> None:
    """Write which case is which study of which patient, and the description of each series that is used."""
    channels = _channels(model)
    rows = [
        {"case": case.name, "patient": case.study.patient, "study": case.study.session}
        | {contrast: case.series(contrast).description for contrast in case.study.images}
        for case in cases
    ]
    columns = ["case", "patient", "study", *channels]
    keep_earlier(file, [case.name for case in cases], columns)
    write_records(rows, columns, file)


def _channels(model: Model) -> list[str]:
    """Return the model's channels by the names with which contrasts are matched."""
    return [canonical_contrast(name) for name in model.plan.channel_names]


def _channel_patterns(model: Model, channels: Sequence[str], texts: Sequence[str]) -> list[ContrastPattern]:
    """Parse the values of `--contrast`; raises `UserError` if they are not those of the model's channels."""
    listed = ", ".join(channels)
    if len(set(channels)) < len(channels):
        raise UserError(
            f"The model has two channels of one name ({listed}), but series are assigned by name: use NIfTI files."
        )
    ending = model.plan.file_ending
    if ending not in IMAGE_ENDINGS:
        raise UserError(f"The model reads {ending} files, to which DICOM cannot be converted: use files of that kind.")
    patterns = parse_patterns(texts)
    given = [pattern.contrast for pattern in patterns]
    for contrast in given:
        if contrast not in channels:
            raise UserError(
                f"--contrast {contrast} is not a channel of the model{did_you_mean(contrast, channels)}: give one of "
                f"{listed}."
            )
    lacking = [number for number, contrast in enumerate(channels) if contrast not in given]
    if given and not _may_be_absent(model, lacking):
        names = ", ".join(channels[number] for number in lacking)
        raise UserError(f"The model needs {listed}: give the series of {names} with --contrast NAME=PATTERN too.")
    return patterns


def _may_be_absent(model: Model, numbers: Sequence[int]) -> bool:
    """Return whether channels may be zeros: in an adaptive network, but not CT, which nnU-Net would shift."""
    adaptive = getattr(OUR_TRAINERS.get(model.trainer), "adaptive", False)
    return not numbers or (adaptive and not any(is_ct(model.plan.channel_names[n]) for n in numbers))


def _case_name(study: Study, reference: str | None) -> str:
    """Return a name that changes with the images of a study, and that tells nothing of the patient."""
    images = [
        (contrast, sorted(file.tags["SOPInstanceUID"] for file in source.origin.files))
        for contrast, source in study.images.items()
        if isinstance(source.origin, DicomSeries)
    ]
    content = repr((study.patient, study.session, images, reference))
    return f"study_{short_hash(content, 12)}"
