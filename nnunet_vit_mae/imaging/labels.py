"""Segmentations: the labels that dataset.json lists, and the voxels of label images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json
from nnunet_vit_mae.imaging.volumes import Geometry, read_geometry

IGNORE = "ignore"


@dataclass(frozen=True)
class Labels:
    """Values by name as in dataset.json, several for a region; `ignore` marks voxels that nobody has judged."""

    values: Mapping[str, tuple[int, ...]]
    ignore: int | None = None

    @property
    def foreground(self) -> tuple[int, ...]:
        """Values that mean something, ascending."""
        return tuple(sorted({value for values in self.values.values() for value in values} - {0}))

    @property
    def known(self) -> set[int]:
        """All values that a label image may hold."""
        return {0, *self.foreground} | (set() if self.ignore is None else {self.ignore})


def read_labels(file: Path) -> Labels:
    """What a `dataset.json` lists; raises `UserError` when it lists no labels as nnU-Net wants them."""
    content = read_json(file)
    listed: Any = content.get("labels") if isinstance(content, dict) else None
    try:
        values = {str(name): tuple(int(number) for number in np.atleast_1d(value)) for name, value in listed.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f'{file} has no labels as nnU-Net writes them, such as "labels": {{"tumour": 1}}.') from None
    ignore = values.pop(IGNORE, (None,))[0]
    return Labels({name: numbers for name, numbers in values.items() if set(numbers) != {0}}, ignore)


def read_volume(file: Path) -> tuple[np.ndarray, Geometry]:
    """Voxels z y x, and the geometry; raises an error of some kind when the file is no volume, or damaged."""
    geometry = read_geometry(file)
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    if array.ndim != 3:
        raise ValueError(f"{file.name} has {array.ndim} dimensions, but three are needed")
    return array, geometry


def whole_numbers(array: np.ndarray) -> bool:
    """Whether all voxels are integers, in whatever type they are stored; NaN and infinity are none."""
    return array.dtype.kind in "iub" or bool(np.isfinite(array).all() and np.array_equal(array, np.rint(array)))
