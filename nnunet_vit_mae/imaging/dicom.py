"""DICOM series as volumes: sorted by position, and refused if slices are missing or do not belong together.

Headers are read by GDCM in ITK. The tags of a slice include the patient ID. They are used for grouping and for the
scanner only: volumes leave this module with voxels and geometry, and messages contain no name.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from filecmp import cmp
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_vit_mae.limits import too_many_voxels

PATIENT, STUDY, SERIES, INSTANCE = "0010|0020", "0020|000d", "0020|000e", "0008|0018"
DATE, TIME = "0008|0020", "0008|0030"
SERIES_DESCRIPTION, SERIES_NUMBER, MODALITY = "0008|103e", "0020|0011", "0008|0060"
MANUFACTURER, MODEL, KERNEL, THICKNESS = "0008|0070", "0008|1090", "0018|1210", "0018|0050"
POSITION, ORIENTATION = "0020|0032", "0020|0037"
INTERCEPT, SLOPE = "0028|1052", "0028|1053"
IDENTITY_TAGS = (PATIENT, STUDY, SERIES, INSTANCE, DATE, TIME, SERIES_DESCRIPTION, SERIES_NUMBER, MODALITY)
TAGS = (*IDENTITY_TAGS, MANUFACTURER, MODEL, KERNEL, THICKNESS, POSITION, ORIENTATION, INTERCEPT, SLOPE)
GAP = 0.02  # slice distances may differ by this share, or by 0.1 mm: positions are stored with few digits
# SOP classes of images (DICOM part 4, annex B.5): no spectra, waveforms, presentation states, raw data, reports, plans
NO_IMAGE = rb"4\.2$|(?:9|11|67|88|104)(?:\.|$)|66(?:$|\.(?!4$))|481\.(?!1$)"
IMAGE = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(?!" + NO_IMAGE + rb")")


class SeriesError(ValueError):
    """A series that is not a volume; the message says why, names no file and has no full stop."""


@dataclass(frozen=True)
class DicomSlice:
    """A file with one slice (or several frames), its tags as listed above, size in voxels and spacing in mm (x y z)."""

    file: Path
    tags: dict[str, str]
    size: tuple[int, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class DicomSeries:
    """The slices of one series, unsorted, and whether further slices cannot be read."""

    slices: list[DicomSlice] = field(default_factory=list)
    is_damaged: bool = False

    def tag(self, key: str) -> str:
        """Return a tag of the first slice, or an empty string."""
        return self.slices[0].tags.get(key, "")

    @property
    def description(self) -> str:
        """Series description, which users match with patterns."""
        return self.tag(SERIES_DESCRIPTION)


def find_series(folder: Path, *, progress: bool = False) -> tuple[list[DicomSeries], int]:
    """Find the DICOM series in a folder and its subfolders. Other files and second copies of a file are ignored.

    Args:
        folder: The root of the tree.
        progress: Whether to show a progress bar.

    Returns:
        The series, sorted by study and series number, and the number of damaged files that belong to none of them.
    """
    slices_of: dict[tuple[str, str], list[DicomSlice]] = defaultdict(list)
    originals: dict[str, Path] = {}
    damaged: Counter[str | None] = Counter()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in tqdm(files, unit="file", desc="reading headers", disable=not progress):
        if not (header := _read_header(file)):
            damaged[_series_of_damaged(file)] += 1
            continue
        original = originals.setdefault(header.tags.get(INSTANCE, str(file)), file)
        if original == file or not cmp(original, file, shallow=False):
            slices_of[header.tags.get(STUDY, ""), header.tags.get(SERIES, "")].append(header)
    all_series = [DicomSeries(slices, uid in damaged) for (_, uid), slices in slices_of.items()]
    known = {None, *(uid for _, uid in slices_of)}
    lost = sum(count for uid, count in damaged.items() if uid not in known)
    return sorted(all_series, key=lambda series: (series.tag(STUDY), series.tag(SERIES_NUMBER).zfill(9))), lost


def read_series(series: DicomSeries) -> sitk.Image:
    """Read the volume of a series.

    Args:
        series: A series from `find_series`.

    Returns:
        The volume in patient coordinates (mm), slices sorted along their normal.

    Raises:
        SeriesError: If the slices are not a regular stack, are in colour, or cannot be read.
    """
    if series.is_damaged:  # a missing first or last slice would go unnoticed
        raise SeriesError("has a slice that cannot be read, copy it again")
    ordered, gap, axis = _stack(series.slices)
    sides = ordered[0].size
    if problem := too_many_voxels(sides if axis is None else (*sides[:2], len(ordered))):
        raise SeriesError(problem)
    files = [str(file.file) for file in ordered]
    same_scale = len({(file.tags.get(SLOPE), file.tags.get(INTERCEPT)) for file in ordered}) == 1
    # in the data type of the first slice, often integer, the values of the others would be rounded
    kind = sitk.sitkUnknown if same_scale else sitk.sitkFloat32
    try:  # a list with a single multi-frame file would be read as a 4D volume
        image = sitk.ReadImage(files[0] if axis is None else files, kind, "GDCMImageIO")
    except RuntimeError:  # its message names files, which often name the patient
        raise SeriesError("has a slice that cannot be read, copy it again") from None
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise SeriesError("is in colour, but must be in grey values")
    if axis is not None:
        row, column = _tag_numbers(ordered[0], ORIENTATION).reshape(2, 3)
        image.SetDirection(np.stack([row, column, axis], axis=1).ravel().tolist())
        image.SetOrigin(_tag_numbers(ordered[0], POSITION).tolist())
        image.SetSpacing((*image.GetSpacing()[:2], gap))
    return image


def _stack(slices: list[DicomSlice]) -> tuple[list[DicomSlice], float, np.ndarray | None]:
    """Return slices sorted along their normal, their distance in mm, and the normal (None for a multi-frame file)."""
    if len(slices) == 1 and slices[0].size[2] > 1:
        return slices, slices[0].spacing[2], None
    if len(slices) < 2:
        raise SeriesError("has only one slice")
    if any(not (file.tags.get(POSITION) and file.tags.get(ORIENTATION)) for file in slices):
        raise SeriesError("has slices without a position")
    if len({(file.size, file.spacing[:2]) for file in slices}) > 1:
        raise SeriesError("has slices of different sizes or pixel spacings")
    orientations = np.array([_tag_numbers(file, ORIENTATION) for file in slices])
    if np.ptp(orientations, axis=0).max() > 1e-3:
        raise SeriesError("has slices of mixed orientation")
    axis = np.cross(orientations[0, :3], orientations[0, 3:])
    positions = np.array([_tag_numbers(file, POSITION) for file in slices])
    order = np.argsort(positions @ axis, kind="stable")
    steps = np.diff(positions[order], axis=0)
    distances = steps @ axis
    gap, tolerance = float(np.median(distances)), max(0.1, GAP * float(np.median(distances)))
    if distances.min() < 0.01:
        raise SeriesError("has two slices at the same position")
    if np.abs(distances - gap).max() > tolerance:
        raise SeriesError(f"has a gap: slices are {distances.min():.2f} to {distances.max():.2f} mm apart")
    if np.abs(steps - distances[:, None] * axis).max() > tolerance:
        raise SeriesError("was acquired with a tilted gantry, so that its slices are sheared: resample it first")
    distance = float((positions[order[-1]] - positions[order[0]]) @ axis) / (len(slices) - 1)  # averages rounding out
    return [slices[number] for number in order], distance, axis


def _read_header(file: Path) -> DicomSlice | None:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # a report, a DICOMDIR, a text file
        return None
    tags = {key: reader.GetMetaData(key).strip().strip("\0") for key in TAGS if reader.HasMetaDataKey(key)}
    return DicomSlice(file, tags, tuple(reader.GetSize()), tuple(reader.GetSpacing()))


def _series_of_damaged(file: Path) -> str | None:
    """Return the series of a damaged image, "" if the file ends before that tag, or None if it is not an image."""
    with file.open("rb") as stream:
        start = stream.read(2**16)
    if start[128:132] != b"DICM":
        was_image = (not start or file.suffix.lower() == ".dcm") and not file.name.startswith(".")  # macOS adds ._NAME
        return "" if was_image else None
    sop_class, series = _uid(start, b"\x02\x00\x02\x00"), _uid(start, b"\x20\x00\x0e\x00")
    return series.decode() if not sop_class or IMAGE.match(sop_class) else None


def _uid(start: bytes, tag: bytes) -> bytes:
    """Return the UID after a tag, with explicit or implicit value representation."""
    match = re.search(re.escape(tag) + rb"(?:UI..|....)([0-9.]+)", start, flags=re.DOTALL)
    return match[1] if match else b""


def _tag_numbers(file: DicomSlice, key: str) -> np.ndarray:
    return np.array([float(number) for number in file.tags[key].split("\\")])
