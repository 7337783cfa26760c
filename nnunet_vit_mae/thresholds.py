"""Decision thresholds with the smallest volume difference, found exactly (ViTiac, section 3.1 and figure 4).

A threshold t on the probability of a class is a shift of its logit by -log(t / (1 - t)): the class is then chosen where
its log odds against the strongest other class exceed log(t / (1 - t)). With several classes each has a shift, and its
rivals are compared with theirs. Regions (sigmoid) have no rivals: each is calibrated by itself.

Probabilities are read case by case, several times, and never all at once. The loss is a step function that changes at
the log odds of voxels only. A first reading gives it on a grid, and a bound between any two points of the grid, for
volumes only fall as the threshold rises; a second one collects the voxels where the minimum may lie; a third one gives
the loss between all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np

LOWEST = 1e-4  # threshold that is tried, and 1 - LOWEST the highest: beyond, probabilities are noise
LOG_ODDS_LIMIT = math.log((1 - LOWEST) / LOWEST)
GRID = np.linspace(-LOG_ODDS_LIMIT, LOG_ODDS_LIMIT, 4097)  # of log odds; 0 is among them
SWEEPS = 10  # over several classes, at most
CURVE = slice(None, None, 16)  # points of the grid that are kept for the curve
VOXELS_PER_BLOCK = (
    2**22
)  # voxels that are looked at at a time, so that a large case takes little more memory than its file


@dataclass(frozen=True)
class Classes:
    """What is segmented: label values of each foreground class or region, in the order of nnU-Net's channels."""

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    regions: bool = False  # one sigmoid each; else a softmax with the background as channel 0
    ignore: int | None = None  # label of voxels that count nowhere


@dataclass(frozen=True)
class CalibrationCase:
    """A case to calibrate on. `read` gives probabilities (channels z y x) and labels (z y x)."""

    name: str
    voxel_mm3: float
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Volumes:
    """Of one case and class, before and after."""

    case: str
    label: str
    reference_mm3: float
    before_mm3: float
    after_mm3: float
    before_dice: float  # 1 where both are empty
    after_dice: float


@dataclass(frozen=True)
class Curve:
    """Means over the cases for one class, by threshold, with all other classes as they are calibrated."""

    thresholds: np.ndarray
    difference_mm3: np.ndarray  # absolute
    dice: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """What was fitted; everything is by class, in the order of `Classes`."""

    shifts: tuple[float, ...]  # of the logits
    curves: tuple[Curve, ...]
    volumes: tuple[Volumes, ...]

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Probabilities; with several classes, of a class and its strongest rival alone."""
        return tuple(1 / (1 + math.exp(shift)) for shift in self.shifts)


def fit_thresholds(cases: Sequence[CalibrationCase], classes: Classes, objective: str) -> Calibration:
    """Fit the shift of each class to the cases: `objective` is a key of `OBJECTIVES`, averaged over cases and classes.

    A softmax with several classes is searched class by class until no class gains any more; each step is exact.
    """
    shifts = [0.0] * len(classes.names)
    curves: dict[int, Curve] = {}
    rounds = SWEEPS if len(shifts) > 1 and not classes.regions else 1
    for _ in range(rounds):
        before = list(shifts)
        for index in range(len(shifts)):
            shifts[index], curves[index] = _fit(cases, classes, shifts, index, OBJECTIVES[objective])
        if shifts == before:
            break
    volumes = [row for case in cases for row in _before_and_after(case, classes, shifts)]
    return Calibration(tuple(shifts), tuple(curves[index] for index in range(len(shifts))), tuple(volumes))


def segment(probabilities: np.ndarray, classes: Classes, shifts: Sequence[float]) -> list[np.ndarray]:
    """A mask (z y x) of each class or region, from probabilities (channels z y x), with shifted logits."""
    if classes.regions:
        return [_log_odds(p) > -shift for p, shift in zip(probabilities, shifts, strict=True)]
    winner = _shifted_logs(probabilities, shifts).argmax(axis=0)
    return [winner == channel + 1 for channel in range(len(shifts))]


@dataclass(frozen=True)
class Counts:
    """Voxels of one case at T thresholds, for each of the C classes that the thresholds move."""

    predicted: np.ndarray  # C T
    hit: np.ndarray  # C T, predicted and annotated
    annotated: np.ndarray  # C 1
    voxel_mm3: float

    def __add__(self, other: Counts) -> Counts:
        """Of two parts of a case."""
        predicted, hit = self.predicted + other.predicted, self.hit + other.hit
        return Counts(predicted, hit, self.annotated + other.annotated, self.voxel_mm3)

    def difference_mm3(self) -> np.ndarray:
        """Absolute volume difference (C T)."""
        return np.abs(self.predicted - self.annotated) * self.voxel_mm3

    def dice(self) -> np.ndarray:
        """Dice (C T); 1 where nothing is predicted nor annotated, so that finding nothing there is right."""
        return _dice(self.hit, self.predicted, self.annotated)


@dataclass(frozen=True)
class Objective:
    """A loss at each of T thresholds, and T - 1 numbers that it cannot be below between neighbours; means over C."""

    loss: Callable[[Counts], np.ndarray]
    bound: Callable[[Counts], np.ndarray]


def _volume_bound(counts: Counts) -> np.ndarray:
    fewest, most = _extremes(counts.predicted)
    outside = np.maximum(fewest - counts.annotated, counts.annotated - most)
    return (np.maximum(outside, 0) * counts.voxel_mm3).mean(axis=0)


def _dice_bound(counts: Counts) -> np.ndarray:
    hit = _extremes(counts.hit)[1]
    return (1 - np.minimum(_dice(hit, _extremes(counts.predicted)[0], counts.annotated), 1)).mean(axis=0)


OBJECTIVES = {
    "volume": Objective(lambda counts: counts.difference_mm3().mean(axis=0), _volume_bound),  # the paper's
    "dice": Objective(lambda counts: 1 - counts.dice().mean(axis=0), _dice_bound),
}


def _fit(
    cases: Sequence[CalibrationCase], classes: Classes, shifts: Sequence[float], index: int, objective: Objective
) -> tuple[float, Curve]:
    """The best shift of one class while all others stay, and the curve along it."""
    own = index if not classes.regions else 0  # a region is counted alone
    losses, bounds = np.zeros(len(GRID)), np.zeros(len(GRID) - 1)
    difference, dice = np.zeros(len(GRID)), np.zeros(len(GRID))
    for counts in _count_all(cases, classes, shifts, index, GRID):
        losses += objective.loss(counts)
        bounds += objective.bound(counts)
        difference += counts.difference_mm3()[own]
        dice += counts.dice()[own]
    promising = bounds <= losses.min() * (1 + 1e-9)  # sums of thousands of numbers may differ in the last digits
    candidates = _between_scores(cases, classes, shifts, index, promising)
    exact = np.zeros(len(candidates))
    for counts in _count_all(cases, classes, shifts, index, candidates):
        exact += objective.loss(counts)
    best = np.flatnonzero(exact <= exact.min() * (1 + 1e-12))
    stay = -shifts[index]
    chosen = min((float(candidates[i]) for i in best), key=lambda threshold: abs(threshold - stay))
    n = len(cases)
    return -chosen, Curve(_probability(GRID[CURVE]), difference[CURVE] / n, dice[CURVE] / n)


def _between_scores(
    cases: Sequence[CalibrationCase], classes: Classes, shifts: Sequence[float], index: int, promising: np.ndarray
) -> np.ndarray:
    """Ascending thresholds: the present one, the grid's beside promising gaps, and one between two voxels in them."""
    (gaps,) = np.nonzero(promising)
    edges = np.union1d(GRID[gaps], GRID[gaps + 1])
    scores = [edges]
    for case in cases:
        for probabilities, labels in _blocks(case, classes):
            found = _class_scores(probabilities, labels, classes, shifts, index).scores
            found = found[(found > -LOG_ODDS_LIMIT) & (found < LOG_ODDS_LIMIT)]
            scores.append(np.unique(found[promising[np.searchsorted(GRID, found, side="left") - 1]]))
    distinct = np.unique(np.concatenate(scores))
    return np.union1d((distinct[1:] + distinct[:-1]) / 2, [*edges, -shifts[index]])


def _count_all(
    cases: Sequence[CalibrationCase], classes: Classes, shifts: Sequence[float], index: int, thresholds: np.ndarray
) -> Iterator[Counts]:
    """One after the other."""
    for case in cases:
        blocks = (_class_scores(*block, classes, shifts, index) for block in _blocks(case, classes))
        yield reduce(add, (_count(block, thresholds, case.voxel_mm3) for block in blocks))


def _blocks(case: CalibrationCase, classes: Classes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Probabilities (channels n) and labels (n) of voxels that are not ignored, some millions at a time."""
    probabilities, labels = case.read()
    probabilities, labels = probabilities.reshape(len(probabilities), -1), labels.reshape(-1)
    for start in range(0, len(labels), VOXELS_PER_BLOCK):
        part = labels[start : start + VOXELS_PER_BLOCK]
        counted = np.ones(part.shape, bool) if classes.ignore is None else part != classes.ignore
        yield probabilities[:, start : start + VOXELS_PER_BLOCK][:, counted], part[counted]


@dataclass(frozen=True)
class Voxels:
    """Some voxels as the threshold of one class sees them, in one dimension."""

    scores: np.ndarray  # log odds of the class against the strongest rival
    rivals: np.ndarray  # which class has the voxel below the threshold: a position among those counted, or -1
    annotated: np.ndarray  # likewise
    own: int  # the position of the class itself
    classes: int  # counted


def _class_scores(
    probabilities: np.ndarray, labels: np.ndarray, classes: Classes, shifts: Sequence[float], index: int
) -> Voxels:
    if classes.regions:
        annotated = np.where(np.isin(labels, classes.values[index]), 0, -1)
        return Voxels(_log_odds(probabilities[index]), np.full(labels.shape, -1), annotated, 0, 1)
    logs = _shifted_logs(probabilities, shifts)
    mine = logs[index + 1] - shifts[index]
    logs[index + 1] = -np.inf
    rivals = logs.argmax(axis=0)
    scores = mine - logs.max(axis=0)
    annotated = np.full(labels.shape, -1)
    for position, values in enumerate(classes.values):
        annotated[np.isin(labels, values)] = position
    return Voxels(scores, rivals - 1, annotated, index, len(classes.names))


def _count(voxels: Voxels, thresholds: np.ndarray, voxel_mm3: float) -> Counts:
    places = np.searchsorted(thresholds, voxels.scores, side="left")  # it exceeds so many of the thresholds

    def above(chosen: np.ndarray) -> np.ndarray:
        """How many of these voxels exceed each threshold."""
        histogram = np.bincount(places[chosen], minlength=len(thresholds) + 1)
        return histogram[::-1].cumsum()[::-1][1:]

    predicted = np.zeros((voxels.classes, len(thresholds)), dtype=np.int64)
    hit = np.zeros_like(predicted)
    annotated = np.array([[np.count_nonzero(voxels.annotated == c)] for c in range(voxels.classes)])
    for c in range(voxels.classes):
        right = voxels.annotated == c
        if c == voxels.own:
            predicted[c] = above(np.ones_like(right))
            hit[c] = above(right)
        else:
            held = voxels.rivals == c
            predicted[c] = np.count_nonzero(held) - above(held)
            hit[c] = np.count_nonzero(held & right) - above(held & right)
    return Counts(predicted, hit, annotated, voxel_mm3)


def _before_and_after(case: CalibrationCase, classes: Classes, shifts: Sequence[float]) -> list[Volumes]:
    probabilities, labels = case.read()
    counted = np.ones(labels.shape, bool) if classes.ignore is None else labels != classes.ignore
    before, after = (segment(probabilities, classes, s) for s in ([0.0] * len(shifts), shifts))
    rows = []
    for position, name in enumerate(classes.names):
        annotated = np.isin(labels, classes.values[position]) & counted
        masks = [before[position] & counted, after[position] & counted]
        dice = [float(_dice((mask & annotated).sum(), mask.sum(), annotated.sum())) for mask in masks]
        first, second = (float(mask.sum() * case.voxel_mm3) for mask in masks)
        rows.append(Volumes(case.name, name, float(annotated.sum() * case.voxel_mm3), first, second, *dice))
    return rows


def _shifted_logs(probabilities: np.ndarray, shifts: Sequence[float]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities.astype(np.float64))
    logs[1:] += np.reshape(shifts, (-1, *[1] * (logs.ndim - 1)))
    return logs


def _log_odds(probabilities: np.ndarray) -> np.ndarray:
    exact = probabilities.astype(np.float64)  # 1 - p of a float32 close to 1 is exact here
    with np.errstate(divide="ignore"):
        return np.log(exact) - np.log1p(-exact)


def _probability(log_odds: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-log_odds))


def _dice(hit: np.ndarray, predicted: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    total = predicted + annotated
    return np.where(total > 0, 2 * hit / np.maximum(total, 1), 1.0)


def _extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest values between neighbours (C T-1): counts rise or fall all the way."""
    return np.minimum(values[:, 1:], values[:, :-1]), np.maximum(values[:, 1:], values[:, :-1])
