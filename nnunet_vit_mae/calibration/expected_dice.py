"""The Dice that a segmentation can expect, from the probabilities that it was made of.

If a voxel belongs to a class with probability p, independently of the others, the Dice of a mask F is close to
2 sum_F p / (|F| + sum p), the soft Dice of F and p. Networks are often too sure, and neighbouring voxels are wrong
together: a line fitted to cases with a reference turns the soft Dice into an estimate, and errors of cases left out of
the fit tell how good that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nnunet_vit_mae.statistics import DIGITS, rank_correlation

FEWEST = 5  # cases for a line


@dataclass(frozen=True)
class ExpectedDice:
    """A line from soft to expected Dice, and how well it does on the n cases that it was fitted to."""

    slope: float
    intercept: float
    cases: int
    rank_correlation: float | None  # Spearman's, of soft and true Dice; None where one of them is constant
    mean_absolute_error: float  # of a case that is left out of the fit
    mean_absolute_error_of_the_mean: float  # with the mean Dice of the other cases in place of the line

    def of(self, soft: float) -> float:
        """Return the expected Dice of a case, from 0 to 1; NaN where nothing is segmented."""
        return float(np.clip(self.intercept + self.slope * soft, 0, 1))


def soft_dice(mask: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the soft Dice of a boolean mask and the probabilities of its class; NaN for an empty mask.

    >>> soft_dice(np.array([True, True, False]), np.array([0.9, 0.6, 0.5]))
    0.75
    """
    if not mask.any():
        return math.nan
    inside, everywhere = probabilities[mask].sum(dtype=float), probabilities.sum(dtype=float)
    return round(float(2 * inside / (int(mask.sum()) + everywhere)), DIGITS)  # equal ones are ties


def fit_expected_dice(soft: Sequence[float], true: Sequence[float]) -> ExpectedDice | None:
    """Fit a line that does not fall to cases with a reference.

    Args:
        soft: Soft Dice of each case.
        true: Dice of each case; cases in which either is NaN are left out.

    Returns:
        The line and its errors; None with fewer than five cases.
    """
    pairs = np.array([pair for pair in zip(soft, true, strict=True) if np.isfinite(pair).all()])
    if len(pairs) < FEWEST:
        return None
    slope, intercept = _line(pairs)
    errors, of_the_mean = [], []
    for place, (score, dice) in enumerate(pairs):
        others = np.delete(pairs, place, axis=0)
        slope_of_others, intercept_of_others = _line(others)
        errors.append(abs(np.clip(intercept_of_others + slope_of_others * score, 0, 1) - dice))
        of_the_mean.append(abs(others[:, 1].mean() - dice))
    correlation = rank_correlation(pairs[:, 0], pairs[:, 1])
    return ExpectedDice(slope, intercept, len(pairs), correlation, float(np.mean(errors)), float(np.mean(of_the_mean)))


def _line(pairs: np.ndarray) -> tuple[float, float]:
    """Return slope and intercept by least squares; a line that would fall is level, at the mean."""
    (soft, true), centred = pairs.mean(axis=0), pairs - pairs.mean(axis=0)
    variance = (centred[:, 0] ** 2).sum()
    slope = max(0.0, float((centred[:, 0] * centred[:, 1]).sum() / variance)) if variance > 0 else 0.0
    return slope, float(true - slope * soft)
