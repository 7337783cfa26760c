"""Measures of one case and label: overlap, volume, surface distances and lesions. Arrays are z y x, lengths are mm.

A measure that is not defined is NaN: Dice where both masks are empty (as in nnU-Net), precision where the prediction is
empty, recall and relative volume difference where the reference is empty, surface distances where either is empty, and
lesion measures without lesions. Where only one mask is empty, Dice is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from nnunet_vit_mae.evaluation.surfaces import surface_distances
from nnunet_vit_mae.evaluation.voxels import lesions, overlap, volumes


def measure(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    *,
    tolerance: float = 1.0,
    min_lesion_voxels: int = 1,
) -> dict[str, float]:
    """Compute all measures of a predicted mask against its reference.

    Args:
        reference: Boolean mask (z y x).
        prediction: Boolean mask of the same shape.
        spacing: Voxel size in mm (z y x).
        tolerance: Tolerance of the surface Dice in mm.
        min_lesion_voxels: Smallest component that is counted as a lesion.

    Returns:
        The measures by column name of `cases.csv`; NaN where a measure is not defined.

    Raises:
        ValueError: If the masks are not boolean, not three-dimensional, or differ in shape.

    Example:
        >>> reference, prediction = np.zeros((2, 3, 4, 5), bool)
        >>> reference[1, 1, 1:3] = prediction[1, 1, 2:4] = True
        >>> result = measure(reference, prediction, spacing=(3.0, 1.0, 1.0))
        >>> result["dice"], result["recall"], result["reference_mm3"]
        (0.5, 0.5, 6.0)
    """
    if reference.shape != prediction.shape or reference.ndim != 3 or len(spacing) != 3:
        raise ValueError(f"Masks must be z y x and have one shape, got {reference.shape} and {prediction.shape}.")
    if reference.dtype != bool or prediction.dtype != bool:
        raise ValueError(f"Masks must be boolean, got {reference.dtype} and {prediction.dtype}.")
    voxel_mm3 = math.prod(spacing)
    reference, prediction = crop_to_union(reference, prediction)
    return {
        **overlap(reference, prediction),
        **volumes(int(reference.sum()), int(prediction.sum()), voxel_mm3),
        **surface_distances(reference, prediction, spacing, tolerance),
        **lesions(reference, prediction, min_lesion_voxels),
    }


Box = tuple[slice, ...]


def boxes_by_value(labels: np.ndarray) -> dict[int, Box]:
    """Return the bounding box of each positive label that occurs (z y x)."""
    boxes = enumerate(ndimage.find_objects(labels), start=1)
    return {value: box for value, box in boxes if box is not None}


def union_of(boxes: Iterable[Box]) -> Box:
    """Return the smallest box around several; one voxel if there are none."""
    axes = [*zip(*boxes, strict=True)] or [[slice(0, 1)]] * 3
    return tuple(slice(min(side.start for side in axis), max(side.stop for side in axis)) for axis in axes)


def crop_to_union(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Crop two masks to the bounding box of their union, with a margin of one empty voxel.

    No measure depends on more than that, and the others then take time and memory for the object, not for the image.

    Args:
        reference: Boolean mask (z y x).
        prediction: Boolean mask of the same shape.

    Returns:
        Both masks, cropped and padded.
    """
    box = union_of(boxes_by_value((reference | prediction).view(np.uint8)).values())
    return np.pad(reference[box], 1), np.pad(prediction[box], 1)
