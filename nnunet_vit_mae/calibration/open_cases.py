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
from scipy.special import logit

from nnunet_vit_mae.calibration.cases import Block, CalibrationCase, Classes, blocks, chosen, voxels_per_block
from nnunet_vit_mae.progress import with_progress

LOWEST = 1e-4  # thresholds are searched from LOWEST to 1 - LOWEST: beyond, probabilities are noise
LOG_ODDS_LIMIT = math.log((1 - LOWEST) / LOWEST)
KEPT_BYTES = 2**31  # of the voxels of all cases that a threshold can move; those of further cases are read each time
USUAL_SHIFT = math.log(99)  # of a threshold from 0.01 to 0.99
SAFELY = 1 - 1e-5  # for what is rounded


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
    """
    opened, room = [], KEPT_BYTES
    for case in with_progress(cases, unit="case", desc="reading probabilities"):
        counts: list[VoxelCounts] = []
        kept: list[Block] = []
        left = room
        for block in blocks(*case.read(), classes):
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


def counts_of(masks: Sequence[np.ndarray], labels: np.ndarray, classes: Classes, voxel_mm3: float) -> VoxelCounts:
    """Count the voxels of each class in its mask (n) and in the labels (n)."""
    references = [np.isin(labels, values) for values in classes.values]
    hits = [mask & reference for mask, reference in zip(masks, references, strict=True)]
    predicted, hit, reference = (np.array([[part.sum()] for part in parts]) for parts in (masks, hits, references))
    return VoxelCounts(predicted, hit, reference, voxel_mm3)


def segment(probabilities: np.ndarray, classes: Classes, shifts: Sequence[float]) -> list[np.ndarray]:
    """Segment probabilities with shifted logits, as nnU-Net does.

    Args:
        probabilities: nnU-Net's probabilities of a volume or of some voxels (channels ...).
        classes: The classes or regions.
        shifts: The shift of each class's logit.

    Returns:
        A boolean mask (...) of each class or region. A region holds whatever label of it was painted last.

    Example:
        >>> probabilities = np.array([[[[0.6, 0.9]]], [[[0.4, 0.1]]]])
        >>> segment(probabilities, Classes(("lesion",), ((1,),)), [1.0])[0].tolist()
        [[[True, False]]]
    """
    if classes.regions:
        found = [log_odds(p) > -shift for p, shift in zip(probabilities, shifts, strict=True)]
        labels = painted_labels(found, classes)
        return [np.isin(labels, values) for values in classes.values]
    winner = shifted_logs(probabilities, shifts).argmax(axis=0)
    return [winner == channel + 1 for channel in range(len(shifts))]


def shift_probabilities(probabilities: np.ndarray, classes: Classes, shifts: Sequence[float]) -> np.ndarray:
    """Return the probabilities (channels z y x) after a shift of each class's logit.

    >>> both = np.array([0.75, 0.25]).reshape(2, 1, 1, 1)
    >>> shift_probabilities(both, Classes(("lesion",), ((1,),)), [np.log(3)]).ravel().round(2).tolist()
    [0.5, 0.5]
    """
    factors = np.exp([*shifts] if classes.regions else [0.0, *shifts]).reshape(-1, 1, 1, 1)
    shifted = probabilities * factors
    total = shifted + (1 - probabilities) if classes.regions else shifted.sum(axis=0)
    return (shifted / total).astype(np.float32)


def painted_labels(found: Sequence[np.ndarray], classes: Classes) -> np.ndarray:
    """Return the label of each voxel, given where each region is found; later regions cover earlier ones."""
    labels = np.zeros(found[0].shape, np.int64)
    for mask, label in zip(found, classes.painted, strict=True):
        labels[mask] = label
    return labels


def shifted_logs(probabilities: np.ndarray, shifts: Sequence[float]) -> np.ndarray:
    """Return the logs of a softmax (channels ...), of which those of the foreground are shifted."""
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities.astype(np.float64))
    logs[1:] += np.reshape(shifts, (-1, *[1] * (logs.ndim - 1)))
    return logs


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return the logits of probabilities."""
    return logit(probabilities.astype(np.float64))  # in which 1 - p of a float32 close to 1 is exact


def dice_of_counts(hit: np.ndarray, predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return Dice of numbers of voxels; 1 where prediction and reference are empty."""
    total = predicted + reference
    return np.where(total > 0, 2 * hit / np.maximum(total, 1), 1.0)
