"""Measures of one case and label: overlap, volume, surface distances, lesions. Arrays are z y x, lengths mm.

What is not defined is NaN: Dice where both masks are empty (nnU-Net's own rule), precision without a prediction, recall
and the relative difference without a reference, surface distances where either is empty, measures of lesions without
lesions. What is empty on one side only has a Dice of 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.utils import get_code_to_measure_table, get_surface_distance
from scipy import ndimage

NEIGHBOURS = np.ones((3, 3, 3), bool)  # 26: voxels that share a corner are one lesion


def measure(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    *,
    tolerance: float = 1.0,
    min_lesion_voxels: int = 1,
) -> dict[str, float]:
    """All measures of two boolean masks (z y x) by column name; `spacing` (z y x) and `tolerance` are in mm.

    Raises `ValueError` for masks that do not fit each other or are not boolean.
    """
    if reference.shape != prediction.shape or reference.ndim != 3 or len(spacing) != 3:
        raise ValueError(f"Masks have to be z y x and of one shape, got {reference.shape} and {prediction.shape}.")
    if reference.dtype != bool or prediction.dtype != bool:
        raise ValueError(f"Masks have to be boolean, got {reference.dtype} and {prediction.dtype}.")
    voxel = math.prod(spacing)
    reference, prediction = crop_to_union(reference, prediction)
    return {
        **overlap(reference, prediction),
        **volumes(int(reference.sum()), int(prediction.sum()), voxel),
        **surfaces(reference, prediction, spacing, tolerance),
        **lesions(reference, prediction, min_lesion_voxels),
    }


def crop_to_union(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks in the bounding box of their union with one voxel of nothing around: no measure sees more than that.

    Everything after it takes time and memory for the object, not for the image.
    """
    found = ndimage.find_objects((reference | prediction).astype(np.uint8))
    box = found[0] if found else (slice(0, 1),) * 3  # two empty masks
    return np.pad(reference[box], 1), np.pad(prediction[box], 1)


def overlap(reference: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Dice, precision and recall of voxels."""
    both, first, second = (int(mask.sum()) for mask in (reference & prediction, reference, prediction))
    return {
        "dice": _ratio(2 * both, first + second),
        "precision": _ratio(both, second),
        "recall": _ratio(both, first),
    }


def volumes(reference: int, prediction: int, voxel_mm3: float) -> dict[str, float]:
    """Volumes from numbers of voxels, and their signed, absolute and relative difference."""
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


def surfaces(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """HD95 in mm and surface Dice at `tolerance` mm, by MONAI.

    HD95 is the larger of the two directed 95th percentiles, between the centres of voxels that have a face on the
    outside. Surface Dice is that of Nikolov et al. (https://arxiv.org/abs/1809.04430): surface elements count by their
    area, for voxels that are longer than wide have faces of different size.
    """
    if not (reference.any() and prediction.any()):
        return {"hd95_mm": math.nan, "surface_dice": math.nan}
    sides = tuple(float(side) for side in spacing)  # MONAI wants them all of one type
    pair = [torch.from_numpy(mask)[None, None] for mask in (prediction, reference)]
    with warnings.catch_warnings():
        # MONAI 1.5 and 1.6 pass an argument to themselves that they deprecate
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        # the object is the only channel, and `include_background` keeps it
        hd95 = compute_hausdorff_distance(*pair, percentile=95, include_background=True, spacing=sides)
    return {"hd95_mm": float(hd95), "surface_dice": surface_dice(reference, prediction, sides, tolerance)}


def surface_dice(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> float:
    """`compute_surface_dice(use_subvoxels=True)` from MONAI's own parts, which takes gigabytes for scattered objects.

    The masks have to be cropped (`crop_to_union`), for a surface closes only where there is nothing around it.
    """
    table, weights = get_code_to_measure_table(spacing)
    areas = [_areas(mask, weights.squeeze().numpy(), table.numpy()) for mask in (reference, prediction)]
    within = total = 0.0
    for own, other in (areas, areas[::-1]):
        distances = np.asarray(get_surface_distance(own > 0, other > 0, spacing=spacing))
        elements = own[own > 0].astype(float)
        within += elements[distances <= tolerance].sum()
        total += elements.sum()
    return float(within / total)


def _areas(mask: np.ndarray, weights: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Area of the surface between each eight neighbouring voxels, in mm2; one less than the mask along each axis."""
    codes = np.zeros(np.subtract(mask.shape, 1), np.uint8)
    for z, y, x in np.ndindex(2, 2, 2):
        part = mask[tuple(slice(start, start + size) for start, size in zip((z, y, x), codes.shape, strict=True))]
        codes |= part * np.uint8(weights[z, y, x])
    return table[codes]


def lesions(reference: np.ndarray, prediction: np.ndarray, smallest: int) -> dict[str, float]:
    """Lesion-wise detection: 26-connected components of at least `smallest` voxels.

    A lesion is found when at least one predicted voxel lies in it, and a predicted one is false when no reference voxel
    lies in it. Components that are too small count neither as lesions nor as false ones, but what they touch is not
    false or missed: they are there, only not counted.
    """
    found = _touched(reference, prediction, smallest)
    true = _touched(prediction, reference, smallest)
    hits, missed, false = int(found.sum()), int((~found).sum()), int((~true).sum())
    return {
        "reference_lesions": len(found),
        "predicted_lesions": len(true),
        "found_lesions": hits,
        "false_lesions": false,
        "lesion_recall": _ratio(hits, len(found)),
        "lesion_precision": _ratio(len(true) - false, len(true)),
        # of lesions, not of components: two lesions that one predicted component covers are both found
        "lesion_f1": _ratio(2 * hits, 2 * hits + missed + false),
    }


def _touched(mask: np.ndarray, other: np.ndarray, smallest: int) -> np.ndarray:
    """For each component of `mask` that is large enough, whether `other` has a voxel in it."""
    components, count = ndimage.label(mask, NEIGHBOURS)  # pyright: ignore[reportGeneralTypeIssues]
    sizes = np.bincount(components[mask], minlength=count + 1)[1:]
    hits = np.bincount(components[mask & other], minlength=count + 1)[1:]
    return hits[sizes >= smallest] > 0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
