"""What was acquired of a patient on one occasion: contrasts by name, from DICOM or BIDS (`bids.py`) alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging import dicom
from nnunet_vit_mae.imaging.dicom import Series, SeriesError, find_series, read_series
from nnunet_vit_mae.imaging.scans import ScanError, checked_volume, read_scan


@dataclass(frozen=True)
class Scanner:
    """What a header says of the machine, and the thickness of slices in mm; empty where it says nothing."""

    manufacturer: str = ""
    model: str = ""
    kernel: str = ""
    slice_thickness: str = ""


@dataclass(frozen=True)
class Source:
    """An image to read: a DICOM series or a file."""

    origin: Series | Path
    scanner: Scanner = field(default_factory=Scanner)


@dataclass(frozen=True)
class Study:
    """Images by contrast, in the order of the channels, and the label; problems by contrast, known before reading."""

    patient: str  # as the source names them: neither of the two is ever written to a data set
    session: str
    images: dict[str, Source] = field(default_factory=dict)
    label: Source | None = None
    problems: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Pattern:
    """`NAME=PATTERN`: what series or files, by a pattern with * and ?, are images of a contrast."""

    contrast: str
    pattern: str

    def fits(self, text: str) -> bool:
        """Whether a description or a file name fits; capitals do not matter."""
        return fnmatch(text.lower(), self.pattern.lower())


def read_source(source: Source) -> sitk.Image:
    """The volume without any header; raises `ScanError` with a reason that names neither file nor patient."""
    if isinstance(source.origin, Path):
        return read_scan(source.origin, "the file")
    try:
        return checked_volume(read_series(source.origin), "the series")
    except SeriesError as error:
        raise ScanError(str(error)) from None


def dicom_studies(folder: Path, patterns: Sequence[Pattern], label: str | None) -> tuple[list[Study], int]:
    """Studies in a tree of DICOM files, by patient and date; `label` is the pattern of series that hold the label.

    Of several series of one contrast the one with most slices is taken, which is the one of thinnest slices. Also
    gives how many damaged files are of no series. Raises `UserError` when there are no images, or none that fits.
    """
    series, lost = find_series(folder, progress=True)
    if not series and lost:
        raise UserError(f"None of {lost} DICOM files in {folder} can be read: copy them again.")
    if not series:
        raise UserError(f"There are no DICOM images in {folder}: give the folder that they are in with -i.")
    if not patterns:
        described = sorted({one.tag(dicom.SERIES_DESCRIPTION) or "(none)" for one in series})
        raise UserError(
            f"Say which series are which contrast with --contrast NAME=PATTERN; the descriptions in {folder} are: "
            f"{', '.join(described[:40])}."
        )
    grouped: dict[tuple[str, str], list[Series]] = {}
    for one in sorted(series, key=lambda one: (one.tag(dicom.DATE), one.tag(dicom.TIME))):
        study = one.tag(dicom.STUDY)
        grouped.setdefault((one.tag(dicom.PATIENT) or study, study), []).append(one)
    # patients by number, and their studies in the order of time, as they were put in
    studies = [_study(*key, grouped[key], patterns, label) for key in sorted(grouped, key=lambda key: key[0])]
    if not any(study.images for study in studies):
        raise UserError(f"No series in {folder} fits --contrast: compare the patterns with the series' descriptions.")
    if label and not any(study.label for study in studies):
        raise UserError(f"No series in {folder} fits --labels {label}: compare it with the series' descriptions.")
    return studies, lost


def _study(patient: str, session: str, series: list[Series], patterns: Sequence[Pattern], label: str | None) -> Study:
    images = {}
    for contrast in dict.fromkeys(pattern.contrast for pattern in patterns):
        of_contrast = [pattern for pattern in patterns if pattern.contrast == contrast]
        if found := [
            one for one in series if any(pattern.fits(one.tag(dicom.SERIES_DESCRIPTION)) for pattern in of_contrast)
        ]:
            images[contrast] = _source(_largest(found))
    labels = [one for one in series if label and Pattern("", label).fits(one.tag(dicom.SERIES_DESCRIPTION))]
    problems = {} if images else {"study": "has no series that fits --contrast"}
    return Study(patient, session, images, _source(_largest(labels)) if labels else None, problems)


def _largest(series: list[Series]) -> Series:
    """The first of those with most slices, of which a file may have many."""
    return max(series, key=lambda series: sum(one.size[2] for one in series.slices))


def _source(series: Series) -> Source:
    tags = (dicom.MANUFACTURER, dicom.MODEL, dicom.KERNEL, dicom.THICKNESS)
    return Source(series, Scanner(*(series.tag(tag).replace("\\", " ") for tag in tags)))
