"""A pair of transforms around nnU-Net's augmentation that keeps absent contrasts absent.

A contrast that was not acquired is a channel of exact zeros. Augmentation would add noise to it; the pair notes which
channels are zero before augmentation, and sets them to zero again after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

KEY = "absent_contrasts"


def keeping_absence(transform: BasicTransform, *, dropout: float) -> BasicTransform:
    """Return the transform with absent contrasts kept at zero; `dropout` is the probability to drop a present one."""
    return ComposeTransforms([NoteAbsence(dropout), transform, ClearAbsent()])


def kept_contrasts(present: np.ndarray, dropout: float) -> np.ndarray:
    """Draw which of the present contrasts (bools) a sample keeps: at least one, if there is any."""
    if not dropout:
        return present  # without a draw, so that nnU-Net's own draws stay what they were
    # numpy's global generator: the trainer seeds it, and nnU-Net seeds it in each of its forked workers
    kept = present & (np.random.random(len(present)) >= dropout)  # noqa: NPY002
    if present.any() and not kept.any():
        kept[np.random.choice(np.flatnonzero(present))] = True  # noqa: NPY002
    return kept


class NoteAbsence(BasicTransform):
    """Note which channels of the image (c z y x) are zero, and drop others at random, but never all of them."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def apply(self, data_dict: dict, **params: Any) -> dict:
        present = data_dict["image"].flatten(1).any(dim=1).numpy()
        return {**data_dict, KEY: ~kept_contrasts(present, self.dropout)}


class ClearAbsent(BasicTransform):
    """Set the noted channels to zero."""

    def apply(self, data_dict: dict, **params: Any) -> dict:
        data_dict["image"][data_dict.pop(KEY)] = 0
        return data_dict
