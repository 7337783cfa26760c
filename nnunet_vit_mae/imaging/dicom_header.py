"""The header of one DICOM file: its class, whose it is, and the geometry that it states for each of its frames.

pydicom reads headers, because it knows character sets, sequences and the names of classes. Nothing is completed here:
a frame has the position, orientation and pixel spacing that the file states, or none. Headers hold the patient's name:
they are used for grouping and for the scanner only, and no message of pydicom, which may quote them, gets out.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydicom import config, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID

TEXTS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "Manufacturer",
    "ManufacturerModelName",
    "ConvolutionKernel",
    "SliceThickness",
    "ImageType",
    "FrameOfReferenceUID",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "InConcatenationTotalNumber",
)
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
TRAITS = {  # what tells apart the volumes of one series, in the words of a message
    "TemporalPositionIdentifier": "time point",
    "TemporalPositionIndex": "time point",
    "TriggerTime": "trigger time",
    "EchoTime": "echo time",
    "EffectiveEchoTime": "echo time",
    "InversionTime": "inversion time",
    "FlipAngle": "flip angle",
    "DiffusionBValue": "b-value",
    "SequenceName": "sequence",  # of Siemens, with the b-value
    "StackID": "stack",
    "ImageType": "image type",
    "FrameType": "image type",
    "AcquisitionNumber": "acquisition",
}
IN_GROUPS = ("SliceThickness", "ConvolutionKernel")  # which enhanced files state in the groups of their frames
FRAMES, SHARED = "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"
READ = [*TEXTS, *GEOMETRY, *TRAITS, FRAMES, SHARED, "SpecificCharacterSet", "SamplesPerPixel", "Rows", "Columns"]
BINARY = ("FD", "FL", "US", "UL", "SS", "SL")  # value representations that are not text
IMAGE = " Image Storage"  # part of the names of all classes of images (DICOM part 4, annex B.5), and of no others
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # secondary capture, and its multi-frame classes
MOST_FRAMES = 100_000  # more are a damaged number, for which there would be no memory
DIRECTORY = "1.2.840.10008.1.3.10"


@dataclass(frozen=True)
class Frame:
    """One slice: its file, its number in the file, and what the file states about it; mm, None if nothing is stated.

    `spacing` is that of rows and of columns, `scale` the slope and intercept of its values, and `traits` what tells
    several volumes of one series apart.
    """

    file: Path
    number: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    scale: tuple[float, float] | None
    traits: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DicomHeader:
    """A DICOM file: its tags by keyword ("" if absent), its frames, its transfer syntax and whether it is in colour.

    `plane` has the numbers of rows and columns.
    """

    file: Path
    tags: dict[str, str]
    frames: tuple[Frame, ...]
    plane: tuple[int, int]
    syntax: str
    in_colour: bool

    @property
    def class_name(self) -> str:
        """Name of the SOP class, such as "CT Image"; an unknown class is named by its number."""
        return _name(self.tags["SOPClassUID"]).removesuffix(" Storage") or "no SOP class"

    @property
    def person(self) -> tuple[str, str, str]:
        """Patient ID, date of birth and sex, each empty if it is not given."""
        return self.tags["PatientID"], self.tags["PatientBirthDate"], self.tags["PatientSex"]

    @property
    def series(self) -> tuple[str, ...]:
        """What the files of one series have in common; some anonymisers give everybody the same UIDs."""
        return (*self.person, self.tags["StudyInstanceUID"], self.tags["SeriesInstanceUID"])

    @property
    def is_image(self) -> bool:
        """Whether the class is one of images: not of segmentations, doses, reports, presentation states or raw data."""
        return is_image_class(self.tags["SOPClassUID"])

    @property
    def is_localizer(self) -> bool:
        """Whether this is the projection on which the slices of other series were planned."""
        return "LOCALIZER" in self.tags["ImageType"].upper().split("\\")

    @property
    def is_derived(self) -> bool:
        """Whether another image was the source: a reformatted, computed or captured one."""
        kinds = self.tags["ImageType"].upper().split("\\")[:2]
        return "DERIVED" in kinds or "SECONDARY" in kinds or self.tags["SOPClassUID"].startswith(CAPTURE)


def is_image_class(uid: str) -> bool:
    """Return whether a SOP class is one of images.

    Example:
        >>> is_image_class("1.2.840.10008.5.1.4.1.1.2"), is_image_class("1.2.840.10008.5.1.4.1.1.66.4")
        (True, False)
    """
    return IMAGE in _name(uid)


def read_header(file: Path) -> DicomHeader | None:
    """Read the header of a file up to its pixels; None if it is not DICOM, or a directory of DICOM files.

    Raises:
        ValueError: If the header is damaged.
    """
    try:
        with silent_pydicom():
            dataset = _dataset(file, READ)
            if dataset is None:
                return None
            meta = getattr(dataset, "file_meta", Dataset())
            tags = {keyword: _text(dataset, keyword) for keyword in TEXTS}
            levels = [dataset, *_levels((dataset.get(FRAMES) or ())[:1]), *_levels(dataset.get(SHARED) or ())]
            tags |= {keyword: _first_text(levels, keyword) for keyword in IN_GROUPS}
            tags["SOPClassUID"] = tags["SOPClassUID"] or _text(meta, "MediaStorageSOPClassUID")
            if tags["SOPClassUID"] == DIRECTORY:
                return None
            syntax = _name(_text(meta, "TransferSyntaxUID"))
            plane = (int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0))
            return DicomHeader(file, tags, _frames(file, dataset, tags), plane, syntax, _in_colour(dataset, tags))
    except Exception as error:  # noqa: BLE001 (pydicom raises many kinds, with messages that quote the header)
        raise ValueError(f"the header is damaged ({type(error).__name__})") from None


def _name(uid: str) -> str:
    return UID(uid, validation_mode=config.IGNORE).name


def read_all_tags(file: Path) -> Dataset:
    """Read the whole header of a DICOM file, up to its pixels; raises what pydicom raises."""
    dataset = _dataset(file, None)
    if dataset is None:
        raise InvalidDicomError
    return dataset


def _dataset(file: Path, tags: list[str] | None) -> Dataset | None:
    """Read tags, or all of them, of a DICOM file; None if it is another file."""
    try:
        return dcmread(file, stop_before_pixels=True, specific_tags=tags)
    except InvalidDicomError:  # there is no preamble: an old file, which starts with group 0002 or 0008, or no DICOM
        with file.open("rb") as stream:
            start = stream.read(8)
        if start[:4] not in (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0"):
            return None
        return dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)


def _frames(file: Path, dataset: Dataset, tags: dict[str, str]) -> tuple[Frame, ...]:
    groups = dataset.get(FRAMES)
    if not groups:
        count = int(tags["NumberOfFrames"] or 1)
        if count == 1:
            return (_frame(file, 0, [dataset]),)
        if not 1 < count <= MOST_FRAMES:
            raise ValueError("no number of frames")
        return tuple(Frame(file, number, None, None, None, None) for number in range(count))
    shared = list(_levels(dataset.get(SHARED) or ()))
    return tuple(_frame(file, number, [*_levels([item]), *shared]) for number, item in enumerate(groups))


def _levels(items: Iterable[Dataset]) -> Iterator[Dataset]:
    """Yield the functional groups of frames, e.g. the item of PlanePositionSequence, except private ones.

    Philips repeats public tags in its private sequences, with other meanings.
    """
    for element in chain.from_iterable(items):
        if element.VR == "SQ" and not element.tag.is_private:
            yield from element.value


def _frame(file: Path, number: int, levels: Sequence[Dataset]) -> Frame:
    slope, intercept = (_numbers(levels, keyword, 1) for keyword in ("RescaleSlope", "RescaleIntercept"))
    return Frame(
        file,
        number,
        _numbers(levels, "ImagePositionPatient", 3),
        _numbers(levels, "ImageOrientationPatient", 6),
        _numbers(levels, "PixelSpacing", 2),
        (slope[0], intercept[0]) if slope and intercept else None,
        tuple((keyword, text) for keyword in TRAITS if (text := _first_text(levels, keyword))),
    )


def _numbers(levels: Sequence[Dataset], keyword: str, count: int) -> tuple[float, ...] | None:
    """Return the numbers of a tag, None if it is absent or holds anything else."""
    try:
        numbers = tuple(float(part) for part in _first_text(levels, keyword).split("\\"))
    except ValueError:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _first_text(levels: Sequence[Dataset], keyword: str) -> str:
    return next((text for level in levels if (text := _text(level, keyword))), "")


def _text(dataset: Dataset, keyword: str) -> str:
    """Return the value of a tag, several values with a backslash between them; "" if it is absent."""
    tag = tag_for_keyword(keyword) or 0
    raw: Any = dataset.get_item(tag)
    if raw is None:
        return ""
    is_text = isinstance(raw.value, bytes) and (raw.VR or dictionary_VR(tag)) not in BINARY
    stored = raw.value if is_text else None
    if stored is not None and stored.isascii() and b"\x1b" not in stored:  # numbers stay as they are written
        return stored.decode("ascii").strip(" \0")
    value: Any = dataset.get(keyword)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    text = "\\".join("" if part is None else str(part) for part in listed).strip(" \0")
    if "\N{REPLACEMENT CHARACTER}" in text and stored is not None:  # another character set than the file states
        return stored.decode("latin-1").strip(" \0")
    return text


def _in_colour(dataset: Dataset, tags: dict[str, str]) -> bool:
    return int(dataset.get("SamplesPerPixel") or 1) > 1 or tags["PhotometricInterpretation"] == "PALETTE COLOR"


@contextmanager
def silent_pydicom() -> Iterator[None]:
    """Silence pydicom, which quotes invalid values of any tag, and accept such values."""
    logger, mode = logging.getLogger("pydicom"), config.settings.reading_validation_mode
    was_disabled, logger.disabled = logger.disabled, True
    config.settings.reading_validation_mode = config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled
        config.settings.reading_validation_mode = mode
