"""DICOM series as volumes: sorted by position, and refused where slices are missing or do not belong together.

Headers are read by ITK's GDCM. The tags of a slice have the patient's ID, by which studies are grouped, and are for
nothing but grouping and the scanner: volumes leave this module with voxels and geometry, messages without a name.
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

PATIENT, STUDY, SERIES, INSTANCE = "0010|0020", "0020|000d", "0020|000e", "0008|0018"
DATE, TIME = "0008|0020", "0008|0030"
SERIES_DESCRIPTION, SERIES_NUMBER, MODALITY = "0008|103e", "0020|0011", "0008|0060"
MANUFACTURER, MODEL, KERNEL, THICKNESS = "0008|0070", "0008|1090", "0018|1210", "0018|0050"
POSITION, ORIENTATION = "0020|0032", "0020|0037"
INTERCEPT, SLOPE = "0028|1052", "0028|1053"
GAP = 0.02  # distances of slices may differ by this share, or by 0.1 mm: positions are written with few digits
# SOP classes (DICOM part 4, annex B.5) without spectra, waveforms, presentation states, raw data, reports and plans
NO_IMAGE = rb"4\.2$|(?:9|11|67|88|104)(?:\.|$)|66(?:$|\.(?!4$))|481\.(?!1$)"
IMAGE = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(?!" + NO_IMAGE + rb")")


class SeriesError(ValueError):
    """A series that is no volume; the message says why, names no file and has no full stop."""


@dataclass(frozen=True)
class DicomSlice:
    """A file, its tags (only those above), and its size in voxels and spacing in mm (x y z)."""

    file: Path
    tags: dict[str, str]
    size: tuple[int, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """The slices of one series, in no order, and whether there are more that cannot be read."""

    slices: list[DicomSlice] = field(default_factory=list)
    is_damaged: bool = False

    def tag(self, key: str) -> str:
        """What the first slice says; empty when it says nothing."""
        return self.slices[0].tags.get(key, "")


def find_series(folder: Path, *, progress: bool = False) -> tuple[list[Series], int]:
    """All series in a tree of folders, by study and series number, and how many damaged files are of none of them.

    Files that are no images are passed over, and so are second copies of a file.
    """
    found: dict[tuple[str, str], list[DicomSlice]] = defaultdict(list)
    originals: dict[str, Path] = {}
    damaged: Counter[str | None] = Counter()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in tqdm(files, unit="file", desc="reading headers", disable=not progress):
        if not (one := _read_header(file)):
            damaged[_series_of_damaged(file)] += 1
            continue
        original = originals.setdefault(one.tags.get(INSTANCE, str(file)), file)
        if original == file or not cmp(original, file, shallow=False):
            found[one.tags.get(STUDY, ""), one.tags.get(SERIES, "")].append(one)
    series = [Series(slices, of[1] in damaged) for of, slices in found.items()]
    known = {None, *(of[1] for of in found)}
    lost = sum(count for of, count in damaged.items() if of not in known)
    return sorted(series, key=lambda series: (series.tag(STUDY), series.tag(SERIES_NUMBER).zfill(9))), lost


def read_series(series: Series) -> sitk.Image:
    """The volume of a series; raises `SeriesError` when its slices are no regular stack or cannot be read."""
    if series.is_damaged:  # the first or the last slice would be missed by nobody
        raise SeriesError("has a slice that cannot be read, copy it again")
    ordered, gap, axis = _stack(series.slices)
    files = [str(one.file) for one in ordered]
    same_scale = len({(one.tags.get(SLOPE), one.tags.get(INTERCEPT)) for one in ordered}) == 1
    # by the type of the first slice, often whole numbers, the values of the others would be cut off
    kind = sitk.sitkUnknown if same_scale else sitk.sitkFloat32
    try:  # a list of one file of many frames would be read as a volume over time
        image = sitk.ReadImage(files[0] if axis is None else files, kind, "GDCMImageIO")
    except RuntimeError:  # its text names files, and these often name the patient
        raise SeriesError("has a slice that cannot be read, copy it again") from None
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise SeriesError("is in colour, but grey values are needed")
    if axis is not None:
        row, column = _numbers(ordered[0], ORIENTATION).reshape(2, 3)
        image.SetDirection(np.stack([row, column, axis], axis=1).ravel().tolist())
        image.SetOrigin(_numbers(ordered[0], POSITION).tolist())
        image.SetSpacing((*image.GetSpacing()[:2], gap))
    return image


def _stack(slices: list[DicomSlice]) -> tuple[list[DicomSlice], float, np.ndarray | None]:
    """Slices along their normal, the distance in mm, and the normal; a file of many frames has its own geometry."""
    if len(slices) == 1 and slices[0].size[2] > 1:
        return slices, slices[0].spacing[2], None
    if len(slices) < 2:
        raise SeriesError("has one slice only")
    if any(not (one.tags.get(POSITION) and one.tags.get(ORIENTATION)) for one in slices):
        raise SeriesError("has slices without a position")
    if len({(one.size, one.spacing[:2]) for one in slices}) > 1:
        raise SeriesError("has slices of different sizes or pixel spacings")
    orientations = np.array([_numbers(one, ORIENTATION) for one in slices])
    if np.ptp(orientations, axis=0).max() > 1e-3:
        raise SeriesError("has slices of mixed orientation")
    axis = np.cross(orientations[0, :3], orientations[0, 3:])
    positions = np.array([_numbers(one, POSITION) for one in slices])
    order = np.argsort(positions @ axis, kind="stable")
    steps = np.diff(positions[order], axis=0)
    distances = steps @ axis
    gap, tolerance = float(np.median(distances)), max(0.1, GAP * float(np.median(distances)))
    if distances.min() < 0.01:
        raise SeriesError("has two slices at one position")
    if np.abs(distances - gap).max() > tolerance:
        raise SeriesError(f"has a gap: slices are {distances.min():.2f} to {distances.max():.2f} mm apart")
    if np.abs(steps - distances[:, None] * axis).max() > tolerance:
        raise SeriesError("was acquired with a tilted gantry, so that its slices are sheared: resample it first")
    mean = float((positions[order[-1]] - positions[order[0]]) @ axis) / (len(slices) - 1)  # rounding averages out
    return [slices[number] for number in order], mean, axis


def _read_header(file: Path) -> DicomSlice | None:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # a report, an index of the disc, a text file
        return None
    wanted = (
        PATIENT,
        STUDY,
        SERIES,
        INSTANCE,
        INTERCEPT,
        SLOPE,
        DATE,
        TIME,
        SERIES_DESCRIPTION,
        SERIES_NUMBER,
        MODALITY,
    )
    wanted += (MANUFACTURER, MODEL, KERNEL, THICKNESS, POSITION, ORIENTATION)
    tags = {key: reader.GetMetaData(key).strip().strip("\0") for key in wanted if reader.HasMetaDataKey(key)}
    return DicomSlice(file, tags, tuple(reader.GetSize()), tuple(reader.GetSpacing()))


def _series_of_damaged(file: Path) -> str | None:
    """The series of an image that cannot be read, empty when the file ends before that; None for what is no image."""
    with file.open("rb") as stream:
        start = stream.read(2**16)
    if start[128:132] != b"DICM":
        is_copy = (not start or file.suffix.lower() == ".dcm") and not file.name.startswith(".")  # macOS adds ._NAME
        return "" if is_copy else None
    kind, series = _uid(start, b"\x02\x00\x02\x00"), _uid(start, b"\x20\x00\x0e\x00")
    return series.decode() if not kind or IMAGE.match(kind) else None


def _uid(start: bytes, tag: bytes) -> bytes:
    """What follows a tag with or without its type, and its length."""
    match = re.search(re.escape(tag) + rb"(?:UI..|....)([0-9.]+)", start, flags=re.DOTALL)
    return match[1] if match else b""


def _numbers(one: DicomSlice, key: str) -> np.ndarray:
    return np.array([float(number) for number in one.tags[key].split("\\")])
