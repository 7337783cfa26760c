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


class NoteAbsence(BasicTransform):
    """Note which channels of the image (c z y x) are zero, and with dropout some more, but never all of them."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def apply(self, data_dict: dict, **params: Any) -> dict:
        present = data_dict["image"].flatten(1).any(dim=1).numpy()
        # a generator of its own each time: nnU-Net's workers are forked, and would all draw the same numbers
        kept = present & (np.random.default_rng().random(len(present)) >= self.dropout)
        if not kept.any():
            kept = present & (np.arange(len(present)) == _any_of(present))
        return {**data_dict, KEY: ~kept}


class ClearAbsent(BasicTransform):
    """Set the channels to zero that were noted."""

    def apply(self, data_dict: dict, **params: Any) -> dict:
        data_dict["image"][data_dict.pop(KEY)] = 0
        return data_dict


def _any_of(present: np.ndarray) -> int:
    """One of the present channels at random, or the first when there is none."""
    return int(np.random.default_rng().choice(np.flatnonzero(present))) if present.any() else 0
