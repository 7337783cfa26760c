"""Intervals of a volume by conformal prediction: calibrated on cases with a reference, without assuming a distribution.

A case's residual is |V - reference| / scale, where V is the volume that was predicted without training on the case, and
the scale grows with the disagreement of the members of the prediction (Lei et al., 2018, section 5.2,
https://arxiv.org/abs/1604.04173; Angelopoulos and Bates, https://arxiv.org/abs/2107.07511). If a new case is
exchangeable with n of them, and predicted in the same way, its volume plus or minus scale times the
ceil(level (n + 1))-th smallest residual holds its reference with at least the probability `level`.

Folds each predict their own validation cases, but all of them a new one. CV+ covers that (Barber et al., 2021,
https://arxiv.org/abs/1905.02928): each residual is laid around the new volume that its own fold predicts. With a single
fold that is the interval above; with several, at least 2 level - 1 - sqrt(2 / n) is guaranteed (their theorem 4), which
is little for few cases, and about `level` is usual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

TOGETHER = "together"  # the predictor that is all folds of a model, where there are several
LEAST_SCALE = 0.05  # of the volume: members that agree can all be wrong
ROUNDING = 1e-9  # of level x cases


@dataclass(frozen=True)
class VolumeEstimate:
    """A volume predicted by several members, such as the mirrorings of a fold, and how far they are apart."""

    volume_mm3: float  # of the mean prediction
    spread_mm3: float  # standard deviation over the members
    voxel_mm3: float

    @property
    def scale(self) -> float:
        """The error in mm3 that counts as 1; never zero, also for members that agree and for an empty prediction."""
        return self.spread_mm3 + LEAST_SCALE * self.volume_mm3 + self.voxel_mm3

    def residual(self, reference_mm3: float) -> float:
        """Return the error of the volume in units of the scale."""
        return abs(self.volume_mm3 - reference_mm3) / self.scale


@dataclass(frozen=True)
class Residual:
    """The error of one case of the calibration, and who predicted it."""

    predictor: str  # a fold, or `TOGETHER`
    value: float


def fewest_cases(level: float) -> int:
    """Return the fewest cases with which an interval of this level is finite.

    >>> fewest_cases(0.9), fewest_cases(0.95)
    (9, 19)
    """
    return math.ceil(1 / (1 - level) - 1 - ROUNDING)


def volume_interval(
    estimates: Mapping[str, VolumeEstimate], residuals: Sequence[Residual], level: float
) -> tuple[float, float] | None:
    """Return the interval of a new case's volume.

    Args:
        estimates: The new volume, by predictor.
        residuals: Of the cases of the calibration; each predictor has an estimate.
        level: The probability that the interval is to hold the reference volume, such as 0.9.

    Returns:
        Lower and upper end in mm3, not below 0; None where there are too few residuals for the level.

    Example:
        >>> residuals = [Residual("0", value / 10) for value in range(1, 20)]
        >>> volume_interval({"0": VolumeEstimate(100, spread_mm3=4, voxel_mm3=1)}, residuals, 0.9)
        (82.0, 118.0)
    """
    rank = math.ceil(level * (len(residuals) + 1) - ROUNDING)
    if rank > len(residuals):
        return None
    chosen = [(estimates[residual.predictor], residual.value) for residual in residuals]
    lower = sorted((own.volume_mm3 - own.scale * value for own, value in chosen), reverse=True)
    upper = sorted(own.volume_mm3 + own.scale * value for own, value in chosen)
    return max(0.0, lower[rank - 1]), upper[rank - 1]


@dataclass(frozen=True)
class Validated:
    """A case of the calibration: its estimated and its reference volume."""

    predictor: str
    estimate: VolumeEstimate
    reference_mm3: float

    @property
    def residual(self) -> Residual:
        """The error of the case."""
        return Residual(self.predictor, self.estimate.residual(self.reference_mm3))


def coverage(cases: Sequence[Validated], level: float) -> dict[str, float]:
    """Return which share of the cases lies in the interval that the others give, in groups that may differ.

    Left out one by one, all cases together are covered as the level says, whatever the model: a rule of ranks. What
    tells is whether small and large volumes are covered alike, and each fold by the residuals of the others.

    Args:
        cases: The cases of the calibration.
        level: Of the intervals.

    Returns:
        The share by group: `all`, thirds by predicted volume (`small`, `middle`, `large`), and `fold_F` where there are
        several folds; without groups that have no case, or whose intervals are not finite.
    """
    listed = list(cases)
    each = [_covers(listed[:place] + listed[place + 1 :], case, level) for place, case in enumerate(listed)]
    order = np.argsort([case.estimate.volume_mm3 for case in cases], kind="stable")
    groups = {"all": [covered for covered in each if covered is not None]}
    for name, places in zip(("small", "middle", "large"), np.array_split(order, 3), strict=True):
        groups[name] = [covered for place in places if (covered := each[place]) is not None]
    predictors = sorted({case.predictor for case in cases})
    for predictor in predictors if len(predictors) > 1 else []:
        others = [case for case in cases if case.predictor != predictor]
        own = [_covers(others, case, level) for case in cases if case.predictor == predictor]
        groups[f"fold_{predictor}"] = [covered for covered in own if covered is not None]
    return {name: sum(covered) / len(covered) for name, covered in groups.items() if covered}


def _covers(others: Sequence[Validated], case: Validated, level: float) -> bool | None:
    """Return whether the residuals of others, laid around a case's only estimate, hold its reference."""
    residuals = [Residual("", other.residual.value) for other in others]
    interval = volume_interval({"": case.estimate}, residuals, level)
    return None if interval is None else interval[0] <= case.reference_mm3 <= interval[1]
