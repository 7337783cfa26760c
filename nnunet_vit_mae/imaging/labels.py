"""Segmentations: the labels in dataset.json and the voxels of label images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.imaging.description import read_description
from nnunet_vit_mae.imaging.volumes import Geometry, all_finite, read_volume

IGNORE = "ignore"


@dataclass(frozen=True)
class Labels:
    """Label values by name as in dataset.json, several for a region; `ignore` marks voxels without annotation."""

    values: Mapping[str, tuple[int, ...]]
    ignore: int | None = None

    @property
    def foreground(self) -> tuple[int, ...]:
        """Foreground values, ascending."""
        return tuple(sorted({value for values in self.values.values() for value in values} - {0}))

    @property
    def known(self) -> set[int]:
        """All values that a label image may hold."""
        return {0, *self.foreground} | (set() if self.ignore is None else {self.ignore})


def read_labels(file: Path) -> Labels:
    """Read the labels from a `dataset.json`. Raises `UserError` if it lists none in nnU-Net's format."""
    values = dict(read_description(file).needed("labels"))
    ignore = values.pop(IGNORE, (None,))[0]
    return Labels({name: numbers for name, numbers in values.items() if set(numbers) != {0}}, ignore)


def whole_numbers(array: np.ndarray) -> bool:
    """Return whether all voxels are integers, whatever the data type; NaN and Inf are not.

    >>> whole_numbers(np.array([0.0, 2.0])), whole_numbers(np.array([0.5]))
    (True, False)
    """
    # plane by plane, because a volume of comparisons takes as much memory as the volume
    return array.dtype.kind in "iub" or all(
        bool(np.isfinite(plane).all() and np.array_equal(plane, np.rint(plane))) for plane in array
    )


def values_in(array: np.ndarray) -> set[int]:
    """Return the labels that occur in a segmentation (z y x)."""
    return {int(value) for plane in array for value in np.unique(plane)}


def as_labels(array: np.ndarray, file: Path) -> np.ndarray:
    """Return a segmentation in a small integer type that holds its labels.

    Args:
        array: What was read (z y x).
        file: The file that was read, for messages.

    Raises:
        UserError: If it holds numbers that are not integers, or NaN.
    """
    if not whole_numbers(array) or not all_finite(array, file):
        raise UserError(f"{file} holds numbers that are not integers, or NaN: use segmentations, not probabilities.")
    ends = [np.min_scalar_type(int(end)) for end in (array.min(), array.max())]
    return array.astype(np.promote_types(*ends), copy=False)


def read_mask(file: Path) -> np.ndarray:
    """Read a segmentation (z y x, of an integer type).

    Raises `UserError` if the file cannot be read, is cut off, or holds numbers that are not integers.
    """
    return read_segmentation(file)[0]


def read_segmentation(file: Path) -> tuple[np.ndarray, Geometry]:
    """Read a segmentation and its geometry; see `read_mask`."""
    with reading(file):
        array, geometry = read_volume(file)
    return as_labels(array, file), geometry
