"""Absent contrasts stay absent: a pair of transforms around nnU-Net's augmentation.

A contrast that was not acquired is a channel of exact zeros. Augmentation adds noise to it; the pair notes which
channels are zero before, and clears them after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

KEY = "absent_contrasts"


def keeping_absence(transform: BasicTransform, *, dropout: float) -> BasicTransform:
    """The transform with absent contrasts kept at zero, and each present one taken away with a probability."""
    return ComposeTransforms([NoteAbsence(dropout), transform, ClearAbsent()])


def kept_contrasts(present: np.ndarray, dropout: float) -> np.ndarray:
    """Which of the present contrasts (bools) a sample keeps: one at least, if there is any."""
    # a generator of its own each time: nnU-Net's workers are forked, and would all draw the same numbers
    random = np.random.default_rng()
    kept = present & (random.random(len(present)) >= dropout)
    if present.any() and not kept.any():
        kept[random.choice(np.flatnonzero(present))] = True
    return kept


class NoteAbsence(BasicTransform):
    """Note which channels of the image (c z y x) are zero, and with dropout some more, but never all of them."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def apply(self, data_dict: dict, **params: Any) -> dict:
        present = data_dict["image"].flatten(1).any(dim=1).numpy()
        return {**data_dict, KEY: ~kept_contrasts(present, self.dropout)}


class ClearAbsent(BasicTransform):
    """Set the channels to zero that were noted."""

    def apply(self, data_dict: dict, **params: Any) -> dict:
        data_dict["image"][data_dict.pop(KEY)] = 0
        return data_dict
