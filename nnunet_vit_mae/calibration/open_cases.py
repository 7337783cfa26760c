"""Which voxels a threshold can move, and the counts of all others.

Shifts are searched in a range, so that most voxels of a scan keep their class whatever is chosen. They are counted
once. The others are kept in memory as long as there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import numpy as np

from nnunet_vit_mae.calibration.cases import Block, CalibrationCase, Classes, blocks, chosen, voxels_per_block
from nnunet_vit_mae.calibration.counts import VoxelCounts, counts_of
from nnunet_vit_mae.calibration.shifts import segment
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.progress import with_progress

LOWEST = 1e-4  # thresholds are searched from LOWEST to 1 - LOWEST: beyond, probabilities are noise
LOG_ODDS_LIMIT = math.log((1 - LOWEST) / LOWEST)
KEPT_BYTES = 2**31  # of the voxels of all cases that a threshold can move; those of further cases are read each time
USUAL_SHIFT = math.log(99)  # of a threshold from 0.01 to 0.99
SAFELY = 1 - 1e-5  # for what is rounded


@dataclass(frozen=True)
class OpenCase:
    """A case as a search sees it: the voxels that some threshold moves, and the counts of all others."""

    name: str
    voxel_mm3: float
    settled: VoxelCounts  # C 1, of each class: the same at every threshold
    blocks: Callable[[], Iterable[Block]]  # the other voxels


def open_all(cases: Sequence[CalibrationCase], classes: Classes, largest_shift: float) -> list[OpenCase]:
    """Read each case, and keep its open voxels if there is room.

    Args:
        cases: The cases.
        classes: The classes or regions.
        largest_shift: Of all classes but the one whose threshold is searched.

    Raises:
        UserError: If probabilities are NaN.
    """
    opened, room = [], KEPT_BYTES
    for case in with_progress(cases, unit="case", desc="reading probabilities"):
        counts: list[VoxelCounts] = []
        kept: list[Block] = []
        left = room
        for block in blocks(*case.read(), classes):
            if np.isnan(block[0]).any():
                raise UserError(
                    f"The probabilities of {case.name} contain NaN, so no threshold can be fitted: the training has "
                    "diverged, or numbers in half precision have overflowed. Predict the case again, or leave it out."
                )
            settled = settled_voxels(block[0], classes, largest_shift)
            counts.append(_settled_counts(*chosen(block, settled), classes, case.voxel_mm3))
            if left >= 0:
                kept.append(chosen(block, ~settled))
                left -= sum(array.nbytes for array in kept[-1])
            if left < 0:
                kept.clear()
        if left >= 0:
            room, again = left, partial(iter, kept)
        else:
            again = partial(_open_blocks, case, classes, largest_shift)
        opened.append(OpenCase(case.name, case.voxel_mm3, reduce(add, counts), partial(_joined, again, classes)))
    return opened


def _open_blocks(case: CalibrationCase, classes: Classes, largest_shift: float) -> Iterator[Block]:
    for block in blocks(*case.read(), classes):
        yield chosen(block, ~settled_voxels(block[0], classes, largest_shift))


def _joined(parts: Callable[[], Iterable[Block]], classes: Classes) -> Iterator[Block]:
    """Join the small blocks that are left of large ones: each costs as many counts as there are thresholds."""
    waiting: list[Block] = []
    for part in parts():
        waiting.append(part)
        if sum(len(labels) for _, labels in waiting) >= voxels_per_block(classes) // 2:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _join(parts: Sequence[Block]) -> Block:
    probabilities, labels = zip(*parts, strict=True)
    return np.concatenate(probabilities, axis=1), np.concatenate(labels)


def settled_voxels(probabilities: np.ndarray, classes: Classes, largest_shift: float) -> np.ndarray:
    """Return which voxels (n) keep their class whatever threshold a search tries (channels n -> n).

    The log odds of a class against the background move by at most `LOG_ODDS_LIMIT`, and those against another class by
    the largest shift of that one more.
    """
    probabilities = probabilities.astype(np.promote_types(probabilities.dtype, np.float32), copy=False)
    if classes.regions:
        return np.minimum(probabilities, 1 - probabilities).max(axis=0) < LOWEST * SAFELY
    background, first = probabilities[0], np.zeros_like(probabilities[0])
    second = np.zeros_like(first)
    for probability in probabilities[1:]:
        second = np.maximum(second, np.minimum(first, probability))
        first = np.maximum(first, probability)
    odds, odds_of_two = (SAFELY * math.exp(-reach) for reach in (LOG_ODDS_LIMIT, LOG_ODDS_LIMIT + largest_shift))
    return (first < odds * background) | (background < odds * first) & (second < odds_of_two * first)


def _settled_counts(probabilities: np.ndarray, labels: np.ndarray, classes: Classes, voxel_mm3: float) -> VoxelCounts:
    """Count settled voxels (C 1), of which most are background and are seen to be."""
    seen = probabilities.argmax(axis=0) > 0 if not classes.regions else (probabilities > 0.5).any(axis=0)
    probabilities, labels = chosen((probabilities, labels), seen | (labels != 0))
    return counts_of(segment(probabilities, classes, [0.0] * len(classes.names)), labels, classes, voxel_mm3)
