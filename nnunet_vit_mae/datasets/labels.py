"""Labelled cases of a data set: their names and files, the labels that dataset.json lists, and the voxels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.datasets.contrasts import ENDINGS
from nnunet_vit_mae.datasets.volumes import Geometry, read_geometry
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json

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


def ending_in(folder: Path, flag: str) -> str:
    """The ending of the images in a folder; raises `UserError` when there are none, or several endings."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: check {flag}.")
    found = {ending for file in visible_files(folder) for ending in ENDINGS if file.name.endswith(ending)}
    if len(found) != 1:
        raise UserError(
            f"{folder} must hold images of one format ({', '.join(ENDINGS)}), but has "
            f"{' and '.join(sorted(found)) or 'none'}: check {flag}."
        )
    return found.pop()


def cases_in(folder: Path, ending: str) -> dict[str, Path]:
    """Label images by the name of their case, sorted."""
    files = visible_files(folder) if folder.is_dir() else []
    return {file.name.removesuffix(ending): file for file in files if file.name.endswith(ending)}


def visible_files(folder: Path) -> list[Path]:
    """Files that are not hidden: copies by macOS leave others such as ._case.nii.gz."""
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


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
