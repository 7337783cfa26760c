"""A region drawn on a template, located in a scan and cropped in the scan's own voxels.

The corners of all voxels of the region are mapped to the scan's physical space. The crop is the box of indices in the
scan's grid that holds them, in an oblique or flipped scan too, and nothing is interpolated.
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
from nnunet_vit_mae.imaging.registration import map_points, resampled
from nnunet_vit_mae.imaging.scans import ScanError, read_scan
from nnunet_vit_mae.imaging.volumes import geometry_of

CENTRES = 50_000  # voxels with which the share of a region in view is counted


@dataclass(frozen=True)
class Region:
    """A template, the region (0 and 1) on its grid, and points of the region (n, 3; x y z in mm).

    `points` are the outermost corners of its voxels, `centres` the centres of its voxels, or a sample of them.
    """

    name: str
    template: sitk.Image
    mask: sitk.Image
    points: np.ndarray
    centres: np.ndarray

    @property
    def centre(self) -> np.ndarray:
        """Centre of the region's bounding box (x y z in mm)."""
        return (self.points.min(0) + self.points.max(0)) / 2


@dataclass(frozen=True)
class Box:
    """First index and size (x y z) in the grid of a scan, and the share of the region that lies in the scan."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    coverage: float


def read_region(template: Path, region: Path) -> Region:
    """Read a template and its region.

    Raises `UserError` if one of them cannot be read, their grids differ, or the region is empty.
    """
    try:
        image, mask = read_scan(template), read_scan(region)
    except ScanError as error:
        raise UserError(f"A template or its region is unusable, {error}: repair {template} or {region}.") from None
    if difference := geometry_of(image).difference(geometry_of(mask)):
        raise UserError(f"{template} and {region} differ in {difference}: draw the region on the template's own grid.")
    mask = sitk.Cast(mask != 0, sitk.sitkUInt8)
    if not sitk.GetArrayViewFromImage(mask).any():
        raise UserError(f"{region} is empty: draw the region on {template}.")
    index = np.argwhere(sitk.GetArrayViewFromImage(mask))[:, ::-1]
    centres = physical_points(mask, index[:: max(1, len(index) // CENTRES)])
    return Region(name_of(template), image, mask, _outermost_points(mask), centres)


def name_of(template: Path) -> str:
    """Return a template's name in tables, its file name without the ending."""
    return template.name.split(".")[0]


def find_box(region: Region, transform: sitk.Transform, scan: sitk.Image, margin: float) -> Box:
    """Find the box of a region in a scan.

    Args:
        region: The region on its template.
        transform: Maps points of the template to points of the scan (mm).
        scan: The image to crop.
        margin: Width added on each side, in mm.

    Raises:
        ScanError: If the region lies outside the scan.
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
        raise ScanError("the region lies outside the scan")
    return Box(tuple(first.tolist()), tuple((last - first + 1).tolist()), inside)


def crop(image: sitk.Image, box: Box) -> sitk.Image:
    """Return the voxels of a box, unchanged and at their place in space."""
    return sitk.RegionOfInterest(image, box.size, box.start)


def resample_region(
    image: sitk.Image, region: Region, transform: sitk.Transform, margin: float, *, label: bool
) -> sitk.Image:
    """Resample an image to the template's grid around the region: nearest neighbour for labels, else linear."""
    identity = sitk.Transform(3, sitk.sitkIdentity)
    grid = crop(region.template, find_box(region, identity, region.template, margin))
    return resampled(image, grid, transform, label=label)


def displacement(region: Region, transform: sitk.Transform) -> float:
    """Return the distance in mm by which the transform moves the region's centre."""
    return math.dist(map_points(transform, region.centre[None])[0], region.centre)


def continuous_index(image: sitk.Image, points: np.ndarray) -> np.ndarray:
    """Convert points (n, 3; x y z in mm) to continuous indices x y z; integers are the centres of voxels."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return (points - image.GetOrigin()) @ np.linalg.inv(direction).T / np.array(image.GetSpacing())


def physical_points(image: sitk.Image, index: np.ndarray) -> np.ndarray:
    """Convert indices (n, 3; x y z) to points in mm."""
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return (index * np.array(image.GetSpacing())) @ direction.T + image.GetOrigin()


def _outermost_points(mask: sitk.Image) -> np.ndarray:
    """Return the corners of the first and last voxel in each row along x; all others lie between them."""
    array = sitk.GetArrayViewFromImage(mask) > 0
    rows: Sequence[np.ndarray] = np.nonzero(array.any(axis=2))  # z, y
    first = array[rows[0], rows[1]].argmax(axis=1)
    last = array.shape[2] - 1 - array[rows[0], rows[1], ::-1].argmax(axis=1)
    ends = np.concatenate([np.stack([x, rows[1], rows[0]], axis=1) for x in (first, last)])
    corners = np.array(list(product((-0.5, 0.5), repeat=3)))
    return physical_points(mask, (ends[:, None] + corners).reshape(-1, 3))
