"""Cases to calibrate on: probabilities and reference labels, which are read in blocks of voxels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from nnunet_vit_mae.storage.stored_rows import StoredRows

VALUES_PER_BLOCK = 2**23  # probabilities (or counts) at a time, so that memory grows neither with voxels nor classes

Block = tuple[np.ndarray, np.ndarray]  # probabilities (channels n) and labels (n) of some voxels


@dataclass(frozen=True)
class Classes:
    """The foreground classes or regions of a model, in the order of nnU-Net's output channels.

    Classes have a softmax, with the background as channel 0. Regions have a sigmoid each, and nnU-Net paints a label
    where it finds one, so that later regions cover earlier ones.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]  # label values of each class
    painted: tuple[int, ...] = ()  # label of each region (nnU-Net's regions_class_order); empty: these are classes
    ignore: int | None = None  # ignore label: its voxels are not counted

    @property
    def regions(self) -> bool:
        """Return whether these are regions."""
        return bool(self.painted)

    @property
    def outputs(self) -> int:
        """Return the outputs of the model for each voxel."""
        return len(self.names) + (not self.regions)


@dataclass(frozen=True)
class CalibrationCase:
    """A case to calibrate on; `read` returns probabilities (channels z y x) and labels (z y x), anew for each pass."""

    name: str
    voxel_mm3: float  # volume of a voxel
    read: Callable[[], tuple[np.ndarray | StoredRows, np.ndarray]]


def blocks(probabilities: np.ndarray | StoredRows, labels: np.ndarray, classes: Classes) -> Iterator[Block]:
    """Yield probabilities (channels n) and labels (n) of the voxels of a case that count, some at a time."""
    size, labels = voxels_per_block(classes), labels.reshape(-1)
    if isinstance(probabilities, np.ndarray):
        flat = probabilities.reshape(len(probabilities), -1)
        parts = (flat[:, start : start + size] for start in range(0, len(labels), size))
    else:
        parts = probabilities.parts(size)
    for part, own in zip(parts, split(labels, size), strict=True):
        yield (part, own) if classes.ignore is None else chosen((part, own), own != classes.ignore)


def voxels_per_block(classes: Classes) -> int:
    """Return how many voxels a block has at most."""
    return max(1, VALUES_PER_BLOCK // classes.outputs)


def chosen(block: Block, voxels: np.ndarray) -> Block:
    """Return some of the voxels of a block."""
    return block[0][:, voxels], block[1][voxels]


def split(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yield `size` values at a time."""
    return (values[start : start + size] for start in range(0, len(values), size))


def members_of(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Return whether each voxel belongs to the class of each of the model's outputs (channels n)."""
    foreground = np.stack([np.isin(labels, values) for values in classes.values])
    return foreground if classes.regions else np.concatenate([~foreground.any(axis=0, keepdims=True), foreground])
