"""DICOM series as volumes: sorted by position, and refused where slices are missing or do not belong together.

Headers are read by ITK's GDCM. Nothing of a patient leaves this module but the `identity` of a series, by which
studies are grouped: the volumes have a geometry and voxels, and no other header.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

PATIENT, STUDY, SERIES = "0010|0020", "0020|000d", "0020|000e"
DATE, TIME = "0008|0020", "0008|0030"
DESCRIPTION, NUMBER, MODALITY = "0008|103e", "0020|0011", "0008|0060"
MANUFACTURER, MODEL, KERNEL, THICKNESS = "0008|0070", "0008|1090", "0018|1210", "0018|0050"
POSITION, ORIENTATION = "0020|0032", "0020|0037"
GAP = 0.02  # distances of slices may differ by this share, or by 0.1 mm: positions are written with few digits


class SeriesError(ValueError):
    """A series that is no volume; the message says why, names no file and has no full stop."""


@dataclass(frozen=True)
class Slice:
    """A file, its tags (only those above), and its size in voxels and spacing in mm (x y z)."""

    file: Path
    tags: dict[str, str]
    size: tuple[int, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """The slices of one series, in no order, and whether there are more that cannot be read."""

    slices: list[Slice] = field(default_factory=list)
    is_damaged: bool = False

    def tag(self, key: str) -> str:
        """What the first slice says; empty when it says nothing."""
        return self.slices[0].tags.get(key, "")


def find_series(folder: Path) -> list[Series]:
    """All series in a tree of folders, by study and series number; files that are no images are passed over."""
    found: dict[tuple[str, str], list[Slice]] = defaultdict(list)
    damaged = set()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if one := _read_header(file):
            found[one.tags.get(STUDY, ""), one.tags.get(SERIES, "")].append(one)
        else:
            damaged.add(_series_of_damaged(file))
    series = [Series(slices, of[1] in damaged) for of, slices in found.items()]
    return sorted(series, key=lambda series: (series.tag(STUDY), series.tag(NUMBER).zfill(9)))


def read_series(series: Series) -> sitk.Image:
    """The volume of a series; raises `SeriesError` when its slices are no regular stack or cannot be read."""
    if series.is_damaged:  # the first or the last slice would be missed by nobody
        raise SeriesError("has a slice that cannot be read, copy it again")
    ordered, gap, axis = _stack(series.slices)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(one.file) for one in ordered])
    try:
        image = reader.Execute()
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


def _stack(slices: list[Slice]) -> tuple[list[Slice], float, np.ndarray | None]:
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


def _read_header(file: Path) -> Slice | None:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # a report, an index of the disc, a text file
        return None
    wanted = (PATIENT, STUDY, SERIES, DATE, TIME, DESCRIPTION, NUMBER, MODALITY)
    wanted += (MANUFACTURER, MODEL, KERNEL, THICKNESS, POSITION, ORIENTATION)
    tags = {key: reader.GetMetaData(key).strip().strip("\0") for key in wanted if reader.HasMetaDataKey(key)}
    return Slice(file, tags, tuple(reader.GetSize()), tuple(reader.GetSpacing()))


def _series_of_damaged(file: Path) -> str | None:
    """The series that a file says it is of, which ends too early to be read; None for other kinds of files."""
    with file.open("rb") as stream:
        start = stream.read(2**16)
    match = (
        re.search(rb"\x20\x00\x0e\x00(?:UI)?[\x00-\xff]{2,4}?([0-9.]+)", start) if start[128:132] == b"DICM" else None
    )
    return match[1].decode() if match else None


def _numbers(one: Slice, key: str) -> np.ndarray:
    return np.array([float(number) for number in one.tags[key].split("\\")])
