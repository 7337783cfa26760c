"""Studies, i.e. the images of one patient's imaging session by contrast, and how they are found in DICOM files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging import dicom
from nnunet_vit_mae.imaging.dicom import DicomSeries, SeriesError, find_series, read_series
from nnunet_vit_mae.imaging.scans import ScanError, checked_volume, read_scan


@dataclass(frozen=True)
class Scanner:
    """Scanner and slice thickness (mm) from an image header; empty where the header has no entry."""

    manufacturer: str = ""
    model: str = ""
    kernel: str = ""
    slice_thickness: str = ""


@dataclass(frozen=True)
class ImageSource:
    """Where an image is read from, a DICOM series or a file, and its scanner."""

    origin: DicomSeries | Path
    scanner: Scanner = field(default_factory=Scanner)


@dataclass(frozen=True)
class Study:
    """Images by contrast, in the order of the channels, the label, and problems by contrast known before reading.

    Patient and session are those of the source, and are never written to a dataset.
    """

    patient: str
    session: str
    images: dict[str, ImageSource] = field(default_factory=dict)
    label: ImageSource | None = None
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ContrastPattern:
    """A contrast and the pattern, with * and ?, of the series descriptions or file names that belong to it."""

    contrast: str
    pattern: str

    def fits(self, text: str) -> bool:
        """Return whether a description or a file name matches, regardless of case."""
        return fnmatch(text.lower(), self.pattern.lower())


def read_image_source(source: ImageSource) -> sitk.Image:
    """Read a volume without its header; raises `ScanError` whose reason names neither file nor patient."""
    if isinstance(source.origin, Path):
        return read_scan(source.origin, "the file")
    try:
        return checked_volume(read_series(source.origin), "the series")
    except SeriesError as error:
        raise ScanError(str(error)) from None


def dicom_studies(folder: Path, patterns: Sequence[ContrastPattern], label: str | None) -> tuple[list[Study], int]:
    """Find the studies in a tree of DICOM files, by patient and date.

    Of several series of one contrast, the one with the most slices is used, which has the thinnest slices. `label` is
    the pattern of series that hold the label. Also returns the number of damaged files that belong to no series.
    Raises `UserError` if there are no images, or none that matches.
    """
    all_series, damaged = find_series(folder, progress=True)
    if not all_series and damaged:
        raise UserError(f"None of {damaged} DICOM files in {folder} can be read: copy them again.")
    if not all_series:
        raise UserError(f"There are no DICOM images in {folder}: give the folder that holds them with -i.")
    if not patterns:
        described = sorted({series.description or "(none)" for series in all_series})
        raise UserError(
            "Give the series of each contrast with --contrast NAME=PATTERN; the series descriptions in "
            f"{folder} are: {', '.join(described[:40])}."
        )
    grouped: dict[tuple[str, str], list[DicomSeries]] = {}
    for series in sorted(all_series, key=lambda series: (series.tag(dicom.DATE), series.tag(dicom.TIME))):
        study = series.tag(dicom.STUDY)
        grouped.setdefault((series.tag(dicom.PATIENT) or study, study), []).append(series)
    # sorted by patient; the studies of a patient stay in the order of time
    studies = [_dicom_study(*key, grouped[key], patterns, label) for key in sorted(grouped, key=lambda key: key[0])]
    if not any(study.images for study in studies):
        raise UserError(f"No series in {folder} matches --contrast: compare the patterns with the series descriptions.")
    if label and not any(study.label for study in studies):
        raise UserError(f"No series in {folder} matches --labels {label}: compare it with the series descriptions.")
    return studies, damaged


def _dicom_study(
    patient: str, session: str, all_series: list[DicomSeries], patterns: Sequence[ContrastPattern], label: str | None
) -> Study:
    images = {}
    for contrast in dict.fromkeys(pattern.contrast for pattern in patterns):
        of_contrast = [pattern for pattern in patterns if pattern.contrast == contrast]
        matching = [s for s in all_series if any(pattern.fits(s.description) for pattern in of_contrast)]
        if matching:
            images[contrast] = _image_source(_largest(matching))
    labels = [s for s in all_series if label and ContrastPattern("", label).fits(s.description)]
    problems = {} if images else {"study": "has no series that matches --contrast"}
    return Study(patient, session, images, _image_source(_largest(labels)) if labels else None, problems)


def _largest(all_series: list[DicomSeries]) -> DicomSeries:
    """Return the first of the series with the most slices; a file may hold several slices."""
    return max(all_series, key=lambda series: sum(file.size[2] for file in series.slices))


def _image_source(series: DicomSeries) -> ImageSource:
    tags = (dicom.MANUFACTURER, dicom.MODEL, dicom.KERNEL, dicom.THICKNESS)
    return ImageSource(series, Scanner(*(series.tag(tag).replace("\\", " ") for tag in tags)))
