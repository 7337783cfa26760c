"""Numbers of voxels in predictions, in references and in both, and what follows from them: volumes and Dice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_vit_mae.calibration.cases import Classes


@dataclass(frozen=True)
class VoxelCounts:
    """Numbers of voxels of one case at T thresholds, for each of the C classes that the thresholds affect."""

    predicted: np.ndarray  # C T
    hit: np.ndarray  # C T, in prediction and reference
    reference: np.ndarray  # C 1
    voxel_mm3: float

    def __add__(self, other: VoxelCounts) -> VoxelCounts:
        """Add the counts of two parts of a case."""
        predicted, hit = self.predicted + other.predicted, self.hit + other.hit
        return VoxelCounts(predicted, hit, self.reference + other.reference, self.voxel_mm3)

    def of(self, classes: slice) -> VoxelCounts:
        """Return the counts of some of the classes."""
        return VoxelCounts(self.predicted[classes], self.hit[classes], self.reference[classes], self.voxel_mm3)

    def difference_mm3(self) -> np.ndarray:
        """Return the absolute volume difference (C T)."""
        return np.abs(self.predicted - self.reference) * self.voxel_mm3

    def dice(self) -> np.ndarray:
        """Return Dice (C T); 1 where prediction and reference are empty, because that is correct."""
        return dice_of_counts(self.hit, self.predicted, self.reference)


def counts_of(masks: Sequence[np.ndarray], labels: np.ndarray, classes: Classes, voxel_mm3: float) -> VoxelCounts:
    """Count the voxels of each class in its mask (n) and in the labels (n)."""
    references = [np.isin(labels, values) for values in classes.values]
    hits = [mask & reference for mask, reference in zip(masks, references, strict=True)]
    predicted, hit, reference = (np.array([[part.sum()] for part in parts]) for parts in (masks, hits, references))
    return VoxelCounts(predicted, hit, reference, voxel_mm3)


def dice_of_counts(hit: np.ndarray, predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return Dice of numbers of voxels; 1 where prediction and reference are empty."""
    total = predicted + reference
    return np.where(total > 0, 2 * hit / np.maximum(total, 1), 1.0)
