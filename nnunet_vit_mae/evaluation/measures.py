"""Measures of one case and label: overlap, volume, surface distances and lesions. Arrays are z y x, lengths are mm.

A measure that is not defined is NaN: Dice where both masks are empty (as in nnU-Net), precision where the prediction is
empty, recall and relative volume difference where the reference is empty, surface distances where either is empty, and
lesion measures without lesions. Where only one mask is empty, Dice is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from monai.metrics.utils import get_code_to_measure_table, get_surface_distance
from scipy import ndimage

ALL_INSIDE = 255  # code of eight neighbours that all belong to an object
NEIGHBOURS = np.ones((3, 3, 3), bool)  # 26-connected: voxels that share a corner belong to one lesion


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


def surface_distances(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], tolerance: float
) -> dict[str, float]:
    """Compute HD95 and surface Dice from distances by MONAI, whose own measures take gigabytes for large objects.

    HD95 is the larger of the two directed 95th percentiles of the distance between the centres of surface voxels.
    Surface Dice follows Nikolov et al. (https://arxiv.org/abs/1809.04430): surface elements are weighted by their area,
    because the faces of anisotropic voxels differ in size.

    Args:
        reference: Boolean mask (z y x), cropped by `crop_to_union`.
        prediction: Boolean mask of the same shape.
        spacing: Voxel size in mm (z y x).
        tolerance: Tolerance of the surface Dice in mm.

    Returns:
        HD95 in mm and surface Dice by column name; NaN where a mask is empty.
    """
    if not (reference.any() and prediction.any()):
        return {"hd95_mm": math.nan, "surface_dice": math.nan}
    sides = tuple(float(side) for side in spacing)  # MONAI needs all of one type
    surfaces = [mask & ~np.asarray(ndimage.binary_erosion(mask)) for mask in (reference, prediction)]
    hd95 = max(np.percentile(way, 95) for way in _distances(surfaces, sides))
    return {"hd95_mm": float(hd95), "surface_dice": surface_dice(reference, prediction, sides, tolerance)}


def surface_dice(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> float:
    """Compute the surface Dice as MONAI's `compute_surface_dice(use_subvoxels=True)`, from MONAI's own functions.

    MONAI's takes gigabytes for scattered objects.

    Args:
        reference: Boolean mask (z y x), cropped by `crop_to_union`: only an empty margin closes the surface.
        prediction: Boolean mask of the same shape.
        spacing: Voxel size in mm (z y x).
        tolerance: Tolerance in mm.

    Returns:
        The share of both surfaces, by area, that lies within the tolerance of the other.
    """
    table, weights = get_code_to_measure_table(spacing)
    codes = [_codes(mask, weights.squeeze().numpy()) for mask in (reference, prediction)]
    surfaces = [(code > 0) & (code < ALL_INSIDE) for code in codes]
    areas = [table.numpy()[code[surface]] for code, surface in zip(codes, surfaces, strict=True)]
    within = total = 0.0
    for own, distances in zip(areas, _distances(surfaces, spacing), strict=True):
        elements = own.astype(float)
        within += elements[distances <= tolerance].sum()
        total += elements.sum()
    return float(within / total)


def _distances(surfaces: Sequence[np.ndarray], spacing: tuple[float, ...]) -> list[np.ndarray]:
    """Return the distances (mm) of the voxels of each of two surfaces to the other."""
    pairs = zip(surfaces, surfaces[::-1], strict=True)
    return [np.asarray(get_surface_distance(own, other, spacing=spacing)) for own, other in pairs]


def _codes(mask: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return which of each eight neighbouring voxels are in a mask, as bits; sides are one less than the mask's."""
    codes = np.zeros(np.subtract(mask.shape, 1), np.uint8)
    for z, y, x in np.ndindex(2, 2, 2):
        part = mask[tuple(slice(start, start + size) for start, size in zip((z, y, x), codes.shape, strict=True))]
        codes |= part * np.uint8(weights[z, y, x])
    return codes


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
