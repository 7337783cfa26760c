"""DICOM series as volumes: frames sorted by position, and refused if some are missing or do not belong together.

A file has one frame (a slice) or, if it is an enhanced one, many. Position, orientation and pixel spacing are those
that each frame states. Volumes leave this module with voxels and geometry, and messages contain no name.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from filecmp import cmp
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.imaging.channels import visible_below
from nnunet_vit_mae.imaging.dicom_header import TRAITS, DicomHeader, Frame, is_image_class, read_header
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.limits import at_most_more, too_many_voxels

GAP = 0.02  # slice distances may differ by this share, or by 0.1 mm: positions are stored with few digits
HEADROOM = 2**29  # bytes that GDCM may take beside file and voxels; it believes every length that a file states
NO_IMAGE = "is not an image"


class SeriesError(ValueError):
    """A series that is not a volume; the message says why, names no file and has no full stop."""


class SeveralVolumesError(SeriesError):
    """A series with several slices at one position."""


@dataclass(frozen=True)
class DicomSeries:
    """The files of one series, unsorted, and whether further files of it cannot be read.

    `volume` says which of its volumes they are, if `dicom_volumes` has divided it.
    """

    files: list[DicomHeader] = field(default_factory=list)
    is_damaged: bool = False
    volume: str = ""

    def tag(self, keyword: str) -> str:
        """Return a tag of the first file, or an empty string."""
        return self.files[0].tags[keyword]

    @property
    def description(self) -> str:
        """Series description and volume, which users match with patterns."""
        text = self.tag("SeriesDescription")
        return f"{text} ({self.volume})" if self.volume else text

    @property
    def person(self) -> tuple[str, str, str]:
        """Patient ID, date of birth and sex, each empty if it is not given."""
        return self.files[0].person

    @property
    def identity(self) -> tuple[str, ...]:
        """What the volumes of one series have in common."""
        return self.files[0].series

    @property
    def kind(self) -> str:
        """What the series is: the name of its class, and the number of its slices if it is an image."""
        first = self.files[0]
        return f"{first.class_name} of {len(self.frames)} slices" if first.is_image else first.class_name

    @property
    def frames(self) -> list[Frame]:
        """All slices, unsorted."""
        return [frame for file in self.files for frame in file.frames]

    @property
    def is_derived(self) -> bool:
        """Whether the slices were computed or captured from other images."""
        return self.files[0].is_derived

    @property
    def passed_over(self) -> str:
        """Why the series is never taken for a volume; empty if it may be one."""
        first = self.files[0]
        if not first.is_image:
            return NO_IMAGE
        return "is a localizer" if first.is_localizer else ""


def find_series(folder: Path, *, progress: bool = False) -> tuple[list[DicomSeries], int]:
    """Find the DICOM series in a folder and its subfolders.

    Other files, hidden files, and second copies of an image are ignored. Localizers within a series become a series.

    Args:
        folder: The root of the tree.
        progress: Whether to show a progress bar.

    Returns:
        The series, images or not, sorted by study and series number, and the number of damaged files, or links to
        files that are gone, that belong to none of them.
    """
    files_of: dict[tuple[object, ...], list[DicomHeader]] = defaultdict(list)
    originals: dict[tuple[str, ...], DicomHeader] = {}
    damaged: Counter[str | None] = Counter()
    found = visible_below(folder)
    if gone := sum(file.is_symlink() and not file.exists() for file in found):  # slices, perhaps
        damaged[""] = gone
    files = [file for file in found if file.is_file()]
    for file in with_progress(files, unit="file", desc="reading headers", shown=progress):
        try:
            header = read_header(file)
            if header and header.is_image:
                _check_pixels(file)
        except (ValueError, RuntimeError, MemoryError):  # RuntimeError is SimpleITK's
            damaged[_series_of_damaged(file)] += 1
            continue
        if header is None:
            damaged[_series_of_damaged(file)] += 1
            continue
        original = originals.setdefault((*header.series, header.tags["SOPInstanceUID"] or str(file)), header)
        if original is header or not _is_copy(header, original):
            files_of[*header.series, header.is_image, header.is_localizer].append(header)
    uids = {files[0].tags["SeriesInstanceUID"] for files in files_of.values()}
    all_series = [DicomSeries(files, files[0].tags["SeriesInstanceUID"] in damaged) for files in files_of.values()]
    lost = sum(count for uid, count in damaged.items() if uid is not None and uid not in uids)
    return sorted(all_series, key=lambda one: (one.tag("StudyInstanceUID"), one.tag("SeriesNumber").zfill(9))), lost


def read_series(series: DicomSeries) -> sitk.Image:
    """Read the volume of a series.

    Args:
        series: A series from `find_series`.

    Returns:
        The volume in patient coordinates (mm), slices sorted along their normal.

    Raises:
        SeriesError: If the frames are not one regular stack, state no geometry, are in colour, or cannot be read.
    """
    stack = checked_stack(series)
    image = sitk.GetImageFromArray(_read_frames(stack.frames, series.files))
    image.SetDirection(stack.direction.ravel().tolist())
    image.SetOrigin(stack.origin.tolist())
    image.SetSpacing(stack.spacing)
    return image


def header_problem(series: DicomSeries) -> str:
    """Return why `read_series` refuses a series, as far as headers tell without its voxels; empty if they do not."""
    try:
        checked_stack(series)
    except SeriesError as error:
        return str(error)
    return ""


def checked_stack(series: DicomSeries) -> Stack:
    """Return the stack of a series; raises `SeriesError` as `read_series` does, but does not look at the voxels."""
    if series.passed_over:
        raise SeriesError(series.passed_over)
    if series.is_damaged:  # a missing first or last slice would go unnoticed
        raise SeriesError("has a slice that cannot be read, copy it again")
    if any(file.in_colour for file in series.files):
        raise SeriesError("is in colour, but must be in grey values")
    _refuse_incomplete(series.files)
    rows, columns = (max(file.plane[side] for file in series.files) for side in (0, 1))
    if problem := too_many_voxels((columns, rows, len(series.frames))):
        raise SeriesError(problem)
    return stack_frames(series.frames)


# ---------- geometry


@dataclass(frozen=True)
class Stack:
    """Frames sorted along their normal, and the geometry of their volume as SimpleITK has it (x y z)."""

    frames: list[Frame]
    origin: np.ndarray
    spacing: tuple[float, float, float]
    direction: np.ndarray  # 3 x 3, the axes are columns


def _refuse_incomplete(files: Sequence[DicomHeader]) -> None:
    parts = {file.tags["InConcatenationTotalNumber"] for file in files} - {""}
    if parts and parts != {str(len(files))}:
        raise SeriesError(
            f"is split into {' or '.join(sorted(parts))} files, but {len(files)} are there, copy it again"
        )
    if len({file.tags["FrameOfReferenceUID"] for file in files}) > 1:
        raise SeriesError("has slices of several frames of reference, whose positions cannot be compared")


def stack_frames(frames: Sequence[Frame]) -> Stack:
    """Sort frames along their normal; raises `SeriesError` if they are not one regular stack."""
    if len(frames) < 2:
        raise SeriesError("has only one slice")
    if any(frame.position is None or frame.orientation is None for frame in frames):
        raise SeriesError("has slices without a position")
    if any(frame.spacing is None or min(frame.spacing) <= 0 for frame in frames):
        raise SeriesError("has slices without a pixel spacing")
    if len({frame.spacing for frame in frames}) > 1:
        raise SeriesError("has slices of different sizes or pixel spacings")
    orientations = np.array([frame.orientation for frame in frames])
    positions = np.array([frame.position for frame in frames])
    if np.ptp(orientations, axis=0).max() > 1e-3:
        raise SeriesError("has slices of mixed orientation")
    row, column = orientations[0].reshape(2, 3)
    axis = np.cross(row, column)
    if not np.allclose([row @ row, column @ column, row @ column], (1, 1, 0), atol=1e-3):
        raise SeriesError("has slices whose rows and columns are not perpendicular")
    axis /= np.linalg.norm(axis)  # not quite 1 where cosines are stored with few digits
    order = np.argsort(positions @ axis, kind="stable")
    distances = np.diff(positions[order] @ axis)
    if distances.min() < 0.01:
        raise SeveralVolumesError(_why_at_same_position([frames[number] for number in order], distances))
    gap, tolerance = float(np.median(distances)), max(0.1, GAP * float(np.median(distances)))
    if np.abs(distances - gap).max() > tolerance:
        raise SeriesError(f"has a gap: slices are {distances.min():.2f} to {distances.max():.2f} mm apart")
    offsets = positions[order] - positions[order[0]]
    sideways = offsets - (offsets @ axis)[:, None] * axis  # over all slices: little from one thin slice to the next
    between_rows, between_columns = frames[0].spacing or (0.0, 0.0)
    if np.linalg.norm(sideways, axis=1).max() > max(tolerance, min(between_rows, between_columns) / 2):
        raise SeriesError("was acquired with a tilted gantry, so that its slices are sheared: resample it first")
    distance = float(offsets[-1] @ axis) / (len(frames) - 1)  # averages rounding out
    return Stack(
        [frames[number] for number in order],
        positions[order[0]],
        (between_columns, between_rows, distance),
        np.stack([row, column, axis], axis=1),
    )


def _why_at_same_position(ordered: Sequence[Frame], distances: np.ndarray) -> str:
    """Say by what the volumes of a series differ, if several were exported as one."""
    first = int(np.argmax(distances < 0.01))
    pair = [dict(ordered[number].traits) for number in (first, first + 1)]
    differing = [words for keyword, words in TRAITS.items() if pair[0].get(keyword) != pair[1].get(keyword)]
    if not differing:
        return "has two slices at the same position: if it holds several volumes, export each as a series of its own"
    by = " and ".join(dict.fromkeys(differing))
    return f"has two slices at the same position, which differ in the {by}: export each volume as a series of its own"


# ---------- voxels


def _read_frames(ordered: Sequence[Frame], files: Sequence[DicomHeader]) -> np.ndarray:
    """Return the voxels (z y x) of the frames in the given order, in the values that they stand for."""
    planes: dict[tuple[Path, int], np.ndarray] = {}
    for file in files:
        array = _read_file(file)
        if len(array) != len(file.frames):
            raise SeriesError("has another number of frames than it states, copy it again")
        first = file.frames[0].scale or (1.0, 0.0)
        for frame, plane in zip(file.frames, array, strict=True):
            planes[file.file, frame.number] = _rescaled(plane, first, frame.scale or (1.0, 0.0))
    if len({plane.shape for plane in planes.values()}) > 1:
        raise SeriesError("has slices of different sizes or pixel spacings")
    voxels = np.stack([planes[frame.file, frame.number] for frame in ordered])
    return voxels.astype(np.float32) if voxels.dtype == np.float64 else voxels


def _read_file(header: DicomHeader) -> np.ndarray:
    """Read the planes of a file (frames y x); GDCM applies the scale of the first frame to all of them."""
    try:
        voxels = math.prod(header.plane) * len(header.frames)
        with at_most_more(HEADROOM + 2 * header.file.stat().st_size + 32 * voxels):
            image = sitk.ReadImage(str(header.file), sitk.sitkUnknown, "GDCMImageIO")
    except (RuntimeError, MemoryError):  # whose messages name files, which often name the patient
        how = f", which is compressed as {header.syntax}" if "Little Endian" not in header.syntax else ""
        raise SeriesError(f"has a slice that cannot be read{how}, copy it again") from None
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise SeriesError("is in colour, but must be in grey values")
    array = sitk.GetArrayFromImage(image)
    return array.reshape(-1, *array.shape[-2:])


def _rescaled(plane: np.ndarray, applied: tuple[float, float], own: tuple[float, float]) -> np.ndarray:
    if own == applied:
        return plane
    if applied[0] == 0:
        raise SeriesError("has slices with a rescale slope of zero")
    return (plane.astype(np.float64) - applied[1]) / applied[0] * own[0] + own[1]


# ---------- files


def _check_pixels(file: Path) -> None:
    """Raise `RuntimeError` if GDCM cannot read a file, for instance because it is cut off."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    with at_most_more(HEADROOM + 2 * file.stat().st_size):
        reader.ReadImageInformation()


def _is_copy(header: DicomHeader, original: DicomHeader) -> bool:
    """Return whether two files of one UID are one image; an archive may change other tags, or compress it."""
    if cmp(header.file, original.file, shallow=False):
        return True
    if [replace(frame, file=original.file) for frame in header.frames] != list(original.frames):
        return False
    try:
        return np.array_equal(_read_file(header), _read_file(original))
    except SeriesError:
        return False


def _series_of_damaged(file: Path) -> str | None:
    """Return the series of a damaged image, "" if the file ends before that tag, or None if it is not an image."""
    with file.open("rb") as stream:
        start = stream.read(2**16)
    if start[128:132] != b"DICM":
        return "" if not start or file.suffix.lower() == ".dcm" else None
    sop_class, series = _uid(start, b"\x02\x00\x02\x00"), _uid(start, b"\x20\x00\x0e\x00")
    return series.decode() if not sop_class or is_image_class(sop_class.decode()) else None


def _uid(start: bytes, tag: bytes) -> bytes:
    """Return the UID after a tag, with explicit or implicit value representation."""
    match = re.search(re.escape(tag) + rb"(?:UI..|....)([0-9.]+)", start, flags=re.DOTALL)
    return match[1] if match else b""
