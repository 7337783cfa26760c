"""A region drawn on a template, found in a scan and cropped there in the scan's own voxels.

The voxels of the region are taken into the scan's physical space, with all their corners, and the crop is the box of
indices in the scan's grid that holds them: so it does in an oblique or flipped scan too, and no voxel is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.registration import map_points
from nnunet_vit_mae.imaging.scans import ScanError, read_scan
from nnunet_vit_mae.imaging.volumes import Geometry

CENTRES = 50_000  # voxels that the share of a region is counted with


@dataclass(frozen=True)
class Region:
    """A template, the region (0 and 1) on its grid, and points of it (n, 3; x y z in mm).

    `points` are the outermost corners of its voxels, `centres` the centres of all voxels, or of many if there are more.
    """

    name: str
    template: sitk.Image
    mask: sitk.Image
    points: np.ndarray
    centres: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Of the region's box (x y z in mm)."""
        return (self.points.min(0) + self.points.max(0)) / 2


@dataclass(frozen=True)
class Box:
    """First index and size (x y z) in the grid of a scan, and the share of the region that lies in the scan."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    coverage: float


def read_region(template: Path, region: Path) -> Region:
    """Raises `UserError` when one cannot be read, their grids differ, or the region is empty."""
    try:
        image, mask = read_scan(template), read_scan(region)
    except ScanError as error:
        raise UserError(f"A template or its region is no use, {error}: mend {template} or {region}.") from None
    if difference := geometry_of(image).difference(geometry_of(mask)):
        raise UserError(f"{template} and {region} differ in {difference}: draw the region on the template's own grid.")
    mask = sitk.Cast(mask != 0, sitk.sitkUInt8)
    if not sitk.GetArrayViewFromImage(mask).any():
        raise UserError(f"{region} is empty: draw the region on {template}.")
    index = np.argwhere(sitk.GetArrayViewFromImage(mask))[:, ::-1]
    centres = physical_points(mask, index[:: max(1, len(index) // CENTRES)])
    return Region(name_of(template), image, mask, _outermost_points(mask), centres)


def name_of(template: Path) -> str:
    """A template's name in tables: that of its file without the ending."""
    return template.name.split(".")[0]


def geometry_of(image: sitk.Image) -> Geometry:
    """What `volumes.read_geometry` gives for a file."""
    return Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def find_box(region: Region, transform: sitk.Transform, scan: sitk.Image, margin: float) -> Box:
    """Where the region is in the scan, `margin` mm wider on each side; raises `ScanError` when it lies outside.

    `transform` takes points of the template to points of the scan.
    """
    size = np.array(scan.GetSize())
    centres = continuous_index(scan, map_points(transform, region.centres))
    inside = float(np.mean(np.all((centres >= -0.5) & (centres <= size - 0.5), axis=1)))
    index = continuous_index(scan, map_points(transform, region.points))
    wider = margin / np.array(scan.GetSpacing())
    # voxel i reaches from i - 0.5 to i + 0.5; rounding of headers must not cost a whole voxel more
    first = np.floor(index.min(0) - wider + 0.5 + 1e-4).astype(int).clip(0)
    last = np.ceil(index.max(0) + wider - 0.5 - 1e-4).astype(int).clip(max=size - 1)
    if inside == 0 or np.any(first > last):
        raise ScanError("the region lies outside of the scan")
    return Box(tuple(first.tolist()), tuple((last - first + 1).tolist()), inside)


def crop(image: sitk.Image, box: Box) -> sitk.Image:
    """The voxels of a box, unchanged and where they were in space."""
    return sitk.RegionOfInterest(image, box.size, box.start)


def resample_region(
    image: sitk.Image, region: Region, transform: sitk.Transform, margin: float, *, label: bool
) -> sitk.Image:
    """The image on the template's grid round the region: values of the nearest voxel for labels, else linear."""
    identity = sitk.Transform(3, sitk.sitkIdentity)
    grid = crop(region.template, find_box(region, identity, region.template, margin))
    if label:
        return sitk.Resample(image, grid, transform, sitk.sitkNearestNeighbor, 0)
    lowest = float(sitk.GetArrayViewFromImage(image).min())  # air, beyond the scan
    return sitk.Resample(image, grid, transform, sitk.sitkLinear, lowest, sitk.sitkFloat32)


def displacement(region: Region, transform: sitk.Transform) -> float:
    """How far the region's centre goes from the template to the scan, in mm."""
    return math.dist(map_points(transform, region.centre[None])[0], region.centre)


def continuous_index(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    """Points (n, 3; x y z in mm) as indices x y z, where a whole number is the centre of a voxel."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return (points - image.GetOrigin()) @ np.linalg.inv(direction).T / np.array(image.GetSpacing())


def physical_points(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """Indices (n, 3; x y z) as points in mm."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return (index * np.array(image.GetSpacing())) @ direction.T + image.GetOrigin()


def _outermost_points(mask: sitk.Image) -> np.ndarray:
    """Corners of the first and last voxel in each row along x: all others are between them, in any linear map."""
    array = sitk.GetArrayViewFromImage(mask) > 0
    rows: Sequence[np.ndarray] = np.nonzero(array.any(axis=2))  # z, y
    first = array[rows[0], rows[1]].argmax(axis=1)
    last = array.shape[2] - 1 - array[rows[0], rows[1], ::-1].argmax(axis=1)
    ends = np.concatenate([np.stack([x, rows[1], rows[0]], axis=1) for x in (first, last)])
    corners = np.array(list(product((-0.5, 0.5), repeat=3)))
    return physical_points(mask, (ends[:, None] + corners).reshape(-1, 3))
