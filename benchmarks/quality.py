"""How good a trained network of the ablation is: Dice and volumes of whole cases, before and after calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from packed import Packed, cut
from torch import Tensor

from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes
from nnunet_vit_mae.calibration.counts import VoxelCounts, counts_of
from nnunet_vit_mae.calibration.shifts import segment
from nnunet_vit_mae.calibration.thresholds import fit_thresholds
from nnunet_vit_mae.evaluation.clinical import find_cutoffs, group_of

VOXEL = 1.0  # its volume: errors of volumes are shares


@dataclass(frozen=True)
class Predicted:
    """A case with probabilities (classes z y x) and labels (z y x)."""

    probabilities: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Quality:
    """Means over cases and classes."""

    dice: float  # over the classes that a case has
    volume_error: float  # absolute volume difference, mean over cases, as a share of the class's mean volume
    risk_groups: float  # share of the cases whose volume is in the right one; NaN if there are none


@torch.no_grad()
def predict(packed: Packed, logits: Callable[[Tensor], Tensor], case: int) -> Predicted:
    """Predict a case from windows that overlap by half at least, given logits at full resolution (b classes z y x)."""
    sizes, patch = packed.sizes[case], packed.patch
    box = tuple(slice(int(side)) for side in sizes)
    shape = [max(int(voxels), side) for voxels, side in zip(sizes, patch, strict=True)]
    total = torch.zeros(packed.classes, *shape, device=packed.device)
    for start in np.stack(np.meshgrid(*map(_steps, shape, patch), indexing="ij"), axis=-1).reshape(-1, 3):
        volume, _ = cut(packed.volumes, packed, np.array([case]), start[None])
        window = (slice(None), *(slice(a, a + b) for a, b in zip(start, patch, strict=True)))
        total[window] += logits(volume.float())[0].float().softmax(dim=0)
    inside = total[(slice(None), *box)]
    return Predicted((inside / inside.sum(dim=0)).cpu().numpy(), packed.labels[case][box].cpu().numpy())


def mean_of(members: Sequence[Sequence[Predicted]]) -> list[Predicted]:
    """Return the cases with the mean of the probabilities that the members of an ensemble give them."""
    return [
        Predicted(np.mean([one.probabilities for one in of_case], axis=0), of_case[0].labels)
        for of_case in zip(*members, strict=True)
    ]


def fitted_shifts(cases: Sequence[Predicted], classes: int) -> tuple[float, ...]:
    """Return the shifts of the logits with the smallest differences of volumes (`mae3d_calibrate`)."""
    readable = [
        CalibrationCase(str(number), VOXEL, lambda case=case: (case.probabilities, case.labels))
        for number, case in enumerate(cases)
    ]
    return fit_thresholds(readable, foreground(classes)).shifts


def risk_cutoffs(cases: Sequence[Predicted], classes: int) -> list[tuple[float, ...]]:
    """Return the cutoffs between risk groups for each class: the quartiles of its volumes in these cases."""
    volumes = np.array([[(case.labels == label).sum() for case in cases] for label in range(1, classes)])
    return [find_cutoffs(of_class * VOXEL, None)[0] for of_class in volumes]


def quality_of(cases: Sequence[Predicted], shifts: Sequence[float], cutoffs: Sequence[tuple[float, ...]]) -> Quality:
    """Measure cases whose logits are shifted, given the cutoffs between the risk groups of each class."""
    counts = [_counts(case, shifts) for case in cases]
    dice = [one.dice()[one.reference > 0].mean() for one in counts]
    differences = np.mean([one.difference_mm3() for one in counts], axis=0)
    volumes = np.mean([one.reference for one in counts], axis=0)
    right = [
        np.mean([group_of(one.predicted[number], edges) == group_of(one.reference[number], edges) for one in counts])
        for number, edges in enumerate(cutoffs)
        if edges
    ]
    return Quality(
        float(np.mean(dice)), float((differences / volumes).mean()), float(np.mean(right)) if right else math.nan
    )


def foreground(classes: int) -> Classes:
    """Return the classes of a softmax with so many outputs, the background among them."""
    return Classes(tuple(map(str, range(1, classes))), tuple((label,) for label in range(1, classes)))


def _counts(case: Predicted, shifts: Sequence[float]) -> VoxelCounts:
    classes = foreground(len(case.probabilities))
    return counts_of(segment(case.probabilities, classes, shifts), case.labels, classes, VOXEL)


def _steps(voxels: int, side: int) -> np.ndarray:
    """Return the first voxels of the windows along an axis."""
    count = math.ceil((voxels - side) / (side / 2)) + 1
    return np.linspace(0, voxels - side, count).round().astype(int)
