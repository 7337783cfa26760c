"""Studies, i.e. the images of one patient's imaging session by contrast."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from unicodedata import normalize

import SimpleITK as sitk

from nnunet_vit_mae.imaging.dicom import DicomSeries, SeriesError, read_series
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

    `unused` has a description and the reason for each image, or other object, that was not used. Patient and session
    are those of the source, and are never written to a dataset.
    """

    patient: str
    session: str
    images: dict[str, ImageSource] = field(default_factory=dict)
    label: ImageSource | None = None
    problems: dict[str, str] = field(default_factory=dict)
    unused: tuple[tuple[str, str], ...] = ()

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        origins = [source.origin for source in (*self.images.values(), self.label) if source]
        return [file for one in origins for file in ([one] if isinstance(one, Path) else [f.file for f in one.files])]


@dataclass(frozen=True)
class FoundStudies:
    """The studies in a folder, the number of damaged files that belong to none of them, and warnings (sentences).

    `unused` is as in `Study`, for objects of no study that has images.
    """

    studies: list[Study]
    damaged: int = 0
    unused: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class ContrastPattern:
    """A contrast and the pattern, with * and ?, of the series descriptions or file names that belong to it."""

    contrast: str
    pattern: str

    def fits(self, text: str) -> bool:
        """Return whether a description or a file name matches, regardless of case and of how umlauts are encoded."""
        return fnmatchcase(*(normalize("NFC", one).casefold() for one in (text, self.pattern)))


def read_image_source(source: ImageSource) -> sitk.Image:
    """Read a volume without its header; raises `ScanError` whose reason names neither file nor patient."""
    if isinstance(source.origin, Path):
        return read_scan(source.origin, "the file")
    try:
        return checked_volume(read_series(source.origin), "the series")
    except SeriesError as error:
        raise ScanError(str(error)) from None
