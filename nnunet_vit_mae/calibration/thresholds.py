"""Decision thresholds with the smallest volume difference, found exactly (ViTiac, section 3 and figure 4).

A threshold t on the probability of a class is a shift of its logit by -log(t / (1 - t)): the class is then chosen where
its log odds against the strongest other class exceed log(t / (1 - t)). With several classes, each has a shift of its
own, and classes compete with their shifted logits. Regions (sigmoid) do not compete, but nnU-Net paints one over
another: a voxel of an inner region belongs to the outer one too, whatever its probability there. So they are fitted
from the one that is painted last to the first.

The loss is a step function that changes only at the log odds of voxels. Most voxels are so sure that no threshold can
move them: they are counted once. The others are kept, or read in parts again, and passed three times for each class.
The first pass computes the loss on a grid and a lower bound between neighbouring grid points, which exists because
volumes only shrink as the threshold rises. The second collects the voxels in those gaps that may hold the minimum. The
third computes the loss between each two of these voxels.

The losses on the grid, kept for each case, also tell what the others would have chosen without it, and so what a new
case may expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np
from scipy.special import expit

from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes, split, voxels_per_block
from nnunet_vit_mae.calibration.counts import VoxelCounts, counts_of, dice_of_counts
from nnunet_vit_mae.calibration.open_cases import LOG_ODDS_LIMIT, USUAL_SHIFT, OpenCase, open_all
from nnunet_vit_mae.calibration.shifts import log_odds, painted_labels, segment, shifted_logs
from nnunet_vit_mae.progress import with_progress

GRID = np.linspace(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT, 4097)  # log odds, 0 included
MAX_SWEEPS = 10  # over several classes
CURVE_POINTS = slice(None, None, 16)  # of the grid
ROUNDING = 1e-12  # of differences of losses, as a share of the largest loss


@dataclass(frozen=True)
class CaseVolumes:
    """Volumes and Dice of one case and class before and after calibration, and with the threshold of all other cases.

    Dice is 1 where reference and prediction are empty.
    """

    case: str
    label: str
    reference_mm3: float
    before_mm3: float
    after_mm3: float
    left_out_mm3: float
    before_dice: float
    after_dice: float
    left_out_dice: float


@dataclass(frozen=True)
class ThresholdCurve:
    """Mean volume difference and Dice of one class for each threshold; the other classes keep their fitted shifts."""

    thresholds: np.ndarray
    difference_mm3: np.ndarray  # absolute, mean over cases
    dice: np.ndarray  # mean over cases


@dataclass(frozen=True)
class FittedClass:
    """What a search found for one class; the volumes and Dice of cases are those that the others' threshold gives."""

    shift: float
    curve: ThresholdCurve
    left_out_mm3: np.ndarray
    left_out_dice: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """Fitted thresholds; shifts and curves are in the order of `Classes`."""

    shifts: tuple[float, ...]  # of the logits
    curves: tuple[ThresholdCurve, ...]
    volumes: tuple[CaseVolumes, ...]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds on the probability; with several classes, on that against the strongest rival alone."""
        return tuple(1 / (1 + math.exp(shift)) for shift in self.shifts)

    def at_temperature(self, temperature: float) -> Calibration:
        """Return the same calibration for logits that are divided by a temperature: it segments in the same way."""
        curves = tuple(
            replace(curve, thresholds=expit(log_odds(curve.thresholds) / temperature)) for curve in self.curves
        )
        return replace(self, shifts=tuple(shift / temperature for shift in self.shifts), curves=curves)


def fit_thresholds(cases: Sequence[CalibrationCase], classes: Classes, objective: str = "volume") -> Calibration:
    """Fit the threshold of each class to labelled cases.

    Several classes of a softmax are fitted in turn until none improves, regions once; each step is exact. Fit on cases
    that the model was not trained on: thresholds that suit the training cases overfit.

    Args:
        cases: Cases with probabilities and reference labels.
        classes: The classes or regions to fit.
        objective: The loss, averaged over cases and classes: "volume" (absolute volume difference in mm3) or "dice"
            (1 - Dice).

    Returns:
        The shift and the curve of each class, and the volumes of each case before and after, and left out. Of several
        minima the one that changes least is taken.

    Raises:
        UserError: If probabilities are NaN.

    Example:
        >>> foreground = np.array([[[0.1, 0.3, 0.4]]], dtype=np.float32)
        >>> probabilities, labels = np.stack([1 - foreground, foreground]), np.array([[[0, 1, 1]]])
        >>> case = CalibrationCase("case_1", voxel_mm3=2.0, read=lambda: (probabilities, labels))
        >>> calibration = fit_thresholds([case], Classes(("lesion",), ((1,),)))
        >>> 0.1 < calibration.thresholds[0] < 0.3
        True
        >>> calibration.volumes[0].before_mm3, calibration.volumes[0].after_mm3
        (0.0, 4.0)
    """
    largest_shift, opened = USUAL_SHIFT, open_all(cases, classes, USUAL_SHIFT)
    shifts = [0.0] * len(classes.names)
    fitted: dict[int, FittedClass] = {}
    order = range(len(shifts))[:: -1 if classes.regions else 1]
    sweeps = MAX_SWEEPS if len(shifts) > 1 and not classes.regions else 1
    for _ in range(sweeps):
        before = list(shifts)
        for index in with_progress(order, unit="threshold", desc="searching"):
            fitted[index] = _fit(opened, classes, shifts, index, OBJECTIVES[objective])
            shifts[index] = fitted[index].shift
            if abs(shifts[index]) > largest_shift and sweeps > 1:
                opened.clear()
                largest_shift, opened = LOG_ODDS_LIMIT, open_all(cases, classes, LOG_ODDS_LIMIT)
        if shifts == before:
            break
    found = [fitted[index] for index in range(len(shifts))]
    volumes = [row for number, case in enumerate(opened) for row in _case_volumes(case, classes, found, number)]
    return Calibration(tuple(shifts), tuple(each.curve for each in found), tuple(volumes))


@dataclass(frozen=True)
class Objective:
    """A loss (mean over the C classes) and its lower bound between neighbouring thresholds."""

    loss: Callable[[VoxelCounts], np.ndarray]  # returns T values
    bound: Callable[[VoxelCounts], np.ndarray]  # returns T - 1 values


def _volume_bound(counts: VoxelCounts) -> np.ndarray:
    fewest, most = _extremes(counts.predicted)
    outside = np.maximum(fewest - counts.reference, counts.reference - most)
    return (np.maximum(outside, 0) * counts.voxel_mm3).mean(axis=0)


def _dice_bound(counts: VoxelCounts) -> np.ndarray:
    fewest_predicted, most_hit = _extremes(counts.predicted)[0], _extremes(counts.hit)[1]
    return (1 - np.minimum(dice_of_counts(most_hit, fewest_predicted, counts.reference), 1)).mean(axis=0)


OBJECTIVES = {
    "volume": Objective(lambda counts: counts.difference_mm3().mean(axis=0), _volume_bound),  # ViTiac's
    "dice": Objective(lambda counts: 1 - counts.dice().mean(axis=0), _dice_bound),
}


def _fit(
    cases: Sequence[OpenCase], classes: Classes, shifts: Sequence[float], index: int, objective: Objective
) -> FittedClass:
    """Fit the shift of one class while all others stay, and compute its curve."""
    own = index if not classes.regions else 0  # a region is counted alone
    bounds, difference = np.zeros(len(GRID) - 1), np.zeros(len(GRID))
    losses, volumes, dice = np.zeros((3, len(cases), len(GRID)))  # 100 kB for each case
    for number, counts in enumerate(_count_all(cases, classes, shifts, index, GRID)):
        bounds += objective.bound(counts)
        difference += counts.difference_mm3()[own] / len(cases)
        losses[number] = objective.loss(counts)
        volumes[number] = counts.predicted[own] * counts.voxel_mm3
        dice[number] = counts.dice()[own]
    promising = bounds <= losses.sum(axis=0).min() * (1 + 1e-9)  # tolerates the rounding of long sums
    candidates = _between_scores(cases, classes, shifts, index, promising)
    exact = np.concatenate(
        [
            sum(map(objective.loss, _count_all(cases, classes, shifts, index, part)), np.zeros(len(part)))
            for part in split(candidates, voxels_per_block(classes))
        ]
    )
    best = np.flatnonzero(exact <= exact.min() * (1 + 1e-12))
    current = -shifts[index]
    chosen = min((float(candidates[i]) for i in best), key=lambda threshold: abs(threshold - current))
    points = (expit(GRID), difference, dice.mean(axis=0))
    without_it = _best_of_others(losses)
    return FittedClass(
        shift=-chosen,
        curve=ThresholdCurve(*(values[CURVE_POINTS] for values in points)),
        left_out_mm3=volumes[without_it],
        left_out_dice=dice[without_it],
    )


def _best_of_others(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the place in the grid of the threshold that suits all other cases best, for each case (n thresholds).

    Of several the one nearest to 0.5 is taken.
    """
    total = losses.sum(axis=0)
    others = total - losses
    best = others <= others.min(axis=1, keepdims=True) + ROUNDING * total.max()
    return np.arange(len(losses)), np.where(best, np.abs(GRID), np.inf).argmin(axis=1)


def _between_scores(
    cases: Sequence[OpenCase], classes: Classes, shifts: Sequence[float], index: int, promising: np.ndarray
) -> np.ndarray:
    """Return ascending candidates: the current threshold, the ends of promising gaps, values between voxels."""
    (gaps,) = np.nonzero(promising)
    edges = np.union1d(GRID[gaps], GRID[gaps + 1])
    scores = [edges]
    for case in cases:
        for probabilities, labels in case.blocks():
            block = _class_scores(probabilities, labels, classes, shifts, index).scores
            block = block[(block > -LOG_ODDS_LIMIT) & (block < LOG_ODDS_LIMIT)]
            scores.append(np.unique(block[promising[np.searchsorted(GRID, block, side="left") - 1]]))
    distinct = np.unique(np.concatenate(scores))
    return np.union1d((distinct[1:] + distinct[:-1]) / 2, [*edges, -shifts[index]])


def _count_all(
    cases: Sequence[OpenCase], classes: Classes, shifts: Sequence[float], index: int, thresholds: np.ndarray
) -> Iterator[VoxelCounts]:
    """Count the voxels of one case after the other."""
    for case in cases:
        settled = case.settled.of(slice(index, index + 1)) if classes.regions else case.settled
        scores = (_class_scores(*block, classes, shifts, index) for block in case.blocks())
        yield reduce(add, (_count(part, thresholds, case.voxel_mm3) for part in scores), settled)


@dataclass(frozen=True)
class ClassScores:
    """What decides, for n voxels, whether they belong to one class; classes are numbered as they are counted."""

    scores: np.ndarray  # n, log odds of the class against its strongest rival
    rivals: np.ndarray  # n, the class that a voxel has below the threshold; -1: background
    reference: np.ndarray  # n, the class in the reference; -1: background
    own: int  # number of the class itself
    classes: int  # number of classes


def _class_scores(
    probabilities: np.ndarray, labels: np.ndarray, classes: Classes, shifts: Sequence[float], index: int
) -> ClassScores:
    if classes.regions:
        reference = np.where(np.isin(labels, classes.values[index]), 0, -1)
        scores = _region_scores(probabilities, classes, shifts, index)
        return ClassScores(scores, np.full(labels.shape, -1), reference, own=0, classes=1)
    logs = shifted_logs(probabilities, shifts)
    own = logs[index + 1] - shifts[index]
    logs[index + 1] = -np.inf
    strongest = logs.max(axis=0)
    rivals = (logs == strongest).argmax(axis=0)  # three times as fast as that of the logs themselves
    scores = own - strongest
    return ClassScores(scores, rivals - 1, _class_numbers(labels, classes), own=index, classes=len(classes.names))


def _region_scores(probabilities: np.ndarray, classes: Classes, shifts: Sequence[float], index: int) -> np.ndarray:
    """Return the log odds of a region (n), infinite where the regions painted with it decide."""
    odds = log_odds(probabilities)
    found = [region > -shift for region, shift in zip(odds, shifts, strict=True)]

    def inside(found_here: bool) -> np.ndarray:
        found[index] = np.full(found[index].shape, found_here)
        return np.isin(painted_labels(found, classes), classes.values[index])

    return np.where(inside(False), np.inf, np.where(inside(True), odds[index], -np.inf))


def _class_numbers(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Return the position of each label's class, -1 for the background (n -> n)."""
    positions = {value: position for position, values in enumerate(classes.values) for value in values}
    known = np.array(sorted(positions))
    places = np.searchsorted(known, labels).clip(max=len(known) - 1)
    return np.where(known[places] == labels, np.array([positions[value] for value in known])[places], -1)


def _count(voxels: ClassScores, thresholds: np.ndarray, voxel_mm3: float) -> VoxelCounts:
    exceeded = np.searchsorted(thresholds, voxels.scores, side="left")  # number of thresholds below the score
    bins = len(thresholds) + 1

    def below(seen: np.ndarray) -> np.ndarray:
        """Count, for each class, the chosen voxels that have it while they do not exceed a threshold (C T)."""
        places = voxels.rivals[seen] * bins + exceeded[seen]
        histogram = np.bincount(places, minlength=voxels.classes * bins).reshape(-1, bins)
        return histogram.cumsum(axis=1)[:, :-1]

    def above(numbers: np.ndarray) -> np.ndarray:
        """Count, of voxels that exceed this many thresholds, those that exceed each (T)."""
        return np.bincount(numbers, minlength=bins)[::-1].cumsum()[::-1][1:]

    is_class = voxels.rivals >= 0
    predicted, hit = below(is_class), below(is_class & (voxels.rivals == voxels.reference))
    predicted[voxels.own], hit[voxels.own] = above(exceeded), above(exceeded[voxels.reference == voxels.own])
    reference = np.bincount(voxels.reference[voxels.reference >= 0], minlength=voxels.classes)
    return VoxelCounts(predicted, hit, reference[:, None], voxel_mm3)


def _case_volumes(
    case: OpenCase, classes: Classes, fitted: Sequence[FittedClass], number: int
) -> Iterator[CaseVolumes]:
    """Yield a row for each class of a case, which was the one of this number in the search."""
    before = after = case.settled
    shifts = [each.shift for each in fitted]
    for probabilities, labels in case.blocks():
        masks = segment(probabilities, classes, [0.0] * len(shifts)), segment(probabilities, classes, shifts)
        counts = [counts_of(each, labels, classes, case.voxel_mm3) for each in masks]
        before, after = before + counts[0], after + counts[1]
    reference, volume_before, volume_after = (
        (part[:, 0] * case.voxel_mm3).tolist() for part in (before.reference, before.predicted, after.predicted)
    )
    dice_before, dice_after = before.dice()[:, 0].tolist(), after.dice()[:, 0].tolist()
    for index, (name, each) in enumerate(zip(classes.names, fitted, strict=True)):
        yield CaseVolumes(
            case=case.name,
            label=name,
            reference_mm3=reference[index],
            before_mm3=volume_before[index],
            after_mm3=volume_after[index],
            left_out_mm3=float(each.left_out_mm3[number]),
            before_dice=dice_before[index],
            after_dice=dice_after[index],
            left_out_dice=float(each.left_out_dice[number]),
        )


def _extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest values between neighbours (C T-1), given that counts are monotonic."""
    return np.minimum(values[:, 1:], values[:, :-1]), np.maximum(values[:, 1:], values[:, :-1])
