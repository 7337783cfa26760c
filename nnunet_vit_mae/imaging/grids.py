"""The same voxels stored along other axes, as viewers save them: turned to the axes of another file.

A grid is the places of voxels in mm, whatever the order in which a file stores them.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.volumes import Geometry, geometry_of


def turned_like(array: np.ndarray, geometry: Geometry, like: Geometry) -> tuple[np.ndarray, Geometry]:
    """Store a volume along the axes of another geometry; each voxel keeps its place in mm.

    Args:
        array: The volume (z y x).
        geometry: Its geometry.
        like: The geometry whose axes are taken, as far as axes can be swapped and flipped.

    Returns:
        A view of the volume (z y x), and its geometry.
    """
    order, flipped = _axes_along(geometry, like)
    turned = array.transpose([2 - order[2 - axis] for axis in range(3)])  # arrays are z y x, geometries x y z
    turned = np.flip(turned, tuple(2 - axis for axis in range(3) if flipped[axis]))
    return turned, turned_geometry(geometry, like)


def turned_onto(image: sitk.Image, like: sitk.Image) -> sitk.Image | None:
    """Return an image along the axes of another one, or None if their voxels lie in other places.

    No voxel is interpolated. An image that is stored along the same axes is returned itself.
    """
    geometry, other = geometry_of(image), geometry_of(like)
    if geometry.difference(other) is None:
        return image
    if turned_geometry(geometry, other).difference(other):
        return None
    array, _ = turned_like(sitk.GetArrayViewFromImage(image), geometry, other)
    turned = sitk.GetImageFromArray(np.ascontiguousarray(array))
    turned.CopyInformation(like)
    return turned


def turned_geometry(geometry: Geometry, like: Geometry) -> Geometry:
    """Return the geometry that `turned_like` returns, without the voxels."""
    order, flipped = _axes_along(geometry, like)
    directions, origin = geometry.directions, np.array(geometry.origin)
    for axis in range(3):
        if flipped[axis]:
            old = order[axis]
            origin = origin + directions[:, old] * geometry.spacing[old] * (geometry.size[old] - 1)
    turned = directions[:, list(order)] * np.where(flipped, -1, 1)
    return Geometry(
        tuple(geometry.size[axis] for axis in order),
        tuple(geometry.spacing[axis] for axis in order),
        tuple(origin.tolist()),
        tuple(turned.ravel().tolist()),
    )


def on_grid(
    file: Path, array: np.ndarray, geometry: Geometry, other_file: Path, other: Geometry
) -> tuple[np.ndarray, Geometry]:
    """Turn a volume so that its voxels can be compared with those of another file, one by one.

    Args:
        file: The file of the volume, for messages.
        array: The volume (z y x), stored along any axes.
        geometry: Its geometry.
        other_file: The other file.
        other: Its geometry.

    Returns:
        The volume (z y x) and its geometry, along the axes of the other file.

    Raises:
        UserError: If the voxels of the two files do not lie in the same places, up to a voxel.
    """
    array, geometry = turned_like(array, geometry, other)
    refuse_other_grid(file, geometry, other_file, other)
    return array, geometry


def refuse_other_grid(file: Path, geometry: Geometry, other_file: Path, other: Geometry) -> None:
    """Raise `UserError` unless the voxels of two files lie in the same places in mm, up to a voxel."""
    difference = geometry.difference(other)
    if difference and difference.startswith(("size", "spacing")):
        raise UserError(f"{file} does not fit {other_file}: they differ in {difference}; resample one to the other.")
    if difference and (distance := distance_mm(geometry, other)) > min(other.spacing):
        raise UserError(
            f"{file} does not fit {other_file}: their voxels lie up to {distance:.4g} mm apart ({difference}); "
            "resample one to the other, or correct the header that is wrong."
        )


def distance_mm(geometry: Geometry, other: Geometry) -> float:
    """Return how far apart the voxels of two geometries lie at most; they have the same size."""
    corners = np.array(list(product(*((0, side - 1) for side in geometry.size))))
    places = [
        np.array(each.origin) + corners * np.array(each.spacing) @ each.directions.T for each in (geometry, other)
    ]
    return float(np.linalg.norm(places[0] - places[1], axis=1).max())


def _axes_along(geometry: Geometry, like: Geometry) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return, for each axis of `like` (x y z), the axis of a geometry that is closest to it, and if it is opposite."""
    cosines = like.directions.T @ geometry.directions
    order = np.abs(cosines).argmax(axis=1)
    if len(set(order.tolist())) < 3:  # halfway between two axes
        order = np.arange(3)
    return tuple(order.tolist()), tuple(bool(cosines[axis, old] < 0) for axis, old in enumerate(order))
