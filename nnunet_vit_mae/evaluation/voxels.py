"""Measures that count the voxels of two masks: overlap, volumes and lesions. Arrays are z y x."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

NEIGHBOURS = np.ones((3, 3, 3), bool)  # 26-connected: voxels that share a corner belong to one lesion


def overlap(reference: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Compute Dice, precision and recall of two boolean masks, by voxels."""
    both, first, second = (int(mask.sum()) for mask in (reference & prediction, reference, prediction))
    return {
        "dice": _ratio(2 * both, first + second),
        "precision": _ratio(both, second),
        "recall": _ratio(both, first),
    }


def volumes(reference: int, prediction: int, voxel_mm3: float) -> dict[str, float]:
    """Compute volumes and their signed, absolute and relative difference.

    Args:
        reference: Number of reference voxels.
        prediction: Number of predicted voxels.
        voxel_mm3: Volume of a voxel in mm3.

    Returns:
        Volumes and differences by column name.

    Example:
        >>> volumes(4, 6, 0.5)["relative_difference"]
        0.5
    """
    difference = prediction - reference
    return {
        "reference_voxels": reference,
        "predicted_voxels": prediction,
        "reference_mm3": reference * voxel_mm3,
        "predicted_mm3": prediction * voxel_mm3,
        "difference_mm3": difference * voxel_mm3,
        "absolute_difference_mm3": abs(difference) * voxel_mm3,
        "relative_difference": _ratio(abs(difference), reference),
    }


def lesions(reference: np.ndarray, prediction: np.ndarray, smallest: int) -> dict[str, float]:
    """Measure the detection of lesions, which are 26-connected components.

    A reference lesion is found when at least one predicted voxel lies in it. A predicted lesion is false when no
    reference voxel lies in it. Smaller components are not counted, but their voxels still make the lesions that they
    touch found or true.

    Args:
        reference: Boolean mask (z y x).
        prediction: Boolean mask of the same shape.
        smallest: Smallest number of voxels of a lesion.

    Returns:
        Numbers of lesions, recall, precision and F1 by column name; NaN where a measure is not defined.

    Example:
        >>> reference, prediction = np.zeros((2, 1, 1, 9), bool)
        >>> reference[0, 0, [0, 1, 4]] = prediction[0, 0, [1, 7]] = True
        >>> lesions(reference, prediction, smallest=1)["lesion_f1"]
        0.5
    """
    found = _touched(reference, prediction, smallest)
    true = _touched(prediction, reference, smallest)
    number_found, missed, false = int(found.sum()), int((~found).sum()), int((~true).sum())
    return {
        "reference_lesions": len(found),
        "predicted_lesions": len(true),
        "found_lesions": number_found,
        "false_lesions": false,
        "lesion_recall": _ratio(number_found, len(found)),
        "lesion_precision": _ratio(len(true) - false, len(true)),
        # counts reference lesions: two lesions that one predicted component covers are both found
        "lesion_f1": _ratio(2 * number_found, 2 * number_found + missed + false),
    }


def _touched(mask: np.ndarray, other: np.ndarray, smallest: int) -> np.ndarray:
    """Return, for each component of `mask` that is large enough, whether `other` has a voxel in it."""
    components, count = ndimage.label(mask, NEIGHBOURS)  # pyright: ignore[reportGeneralTypeIssues]
    sizes = np.bincount(components[mask], minlength=count + 1)[1:]
    hits = np.bincount(components[mask & other], minlength=count + 1)[1:]
    return hits[sizes >= smallest] > 0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
