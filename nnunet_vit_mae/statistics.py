"""Means and pairs of numbers: bootstrap intervals as ViTiac has them (table 2), the two-sided Wilcoxon signed-rank test
that AMAE uses (section 2.4), and Holm's correction for several tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap, wilcoxon

DIGITS = 12  # of a difference that count: equal ones must be ties, though floating point rounds each its own way


@dataclass(frozen=True)
class Comparison:
    """Pairs compared; the means are NaN when there are none, and p is None when no pair differs."""

    n: int
    first: float  # mean
    second: float  # mean
    difference: float  # mean of second minus first
    changed: int  # pairs that differ: the only ones that the test looks at
    p: float | None

    @property
    def smallest_p(self) -> float:
        """What p is when all that differ do so in the same direction, by the exact test: it cannot get below that."""
        return 2.0 ** (1 - self.changed)


def mean_interval(
    values: Sequence[float], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of the mean; NaN where fewer than two values say nothing about their spread.

    By percentiles: it stays within the values and is there for values that are all equal, where the bias-corrected one
    divides 0 by 0. For few cases both are too narrow. With an equal seed, equally long values are drawn alike, so that
    intervals of models on the same cases can be compared. Raises `ValueError` for values that are not finite.
    """
    sample = np.asarray(values, dtype=float)
    if not np.isfinite(sample).all():
        raise ValueError(f"Values must be finite numbers, but among them is {sample[~np.isfinite(sample)][0]}.")
    if len(sample) < 2:
        return math.nan, math.nan
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])  # and not what is left of it after rounding
    found: Any = bootstrap(
        (sample,),
        np.mean,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, 10**7 // len(sample)),  # numbers in memory
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction; what has no p takes no part in it."""
    known = [p for p in p_values if p is not None]
    if len(known) < 2:
        return list(p_values)
    from statsmodels.stats.multitest import multipletests  # takes a second, which no other command should wait

    found: Any = multipletests(known, method="holm")
    corrected = iter(found[1])
    return [None if p is None else float(next(corrected)) for p in p_values]


def compare(first: Sequence[float], second: Sequence[float]) -> Comparison:
    """Compare two values of each case. Raises `ValueError` for values that are not finite, or not pairs."""
    pairs = np.asarray([*zip(first, second, strict=True)], dtype=float).reshape(-1, 2)
    if not np.isfinite(pairs).all():
        raise ValueError(f"Pairs must be finite numbers, but among them is {pairs[~np.isfinite(pairs)][0]}.")
    if not len(pairs):
        return Comparison(0, math.nan, math.nan, math.nan, 0, None)
    differences = (pairs[:, 1] - pairs[:, 0]).round(DIGITS)
    # Wilcoxon's own way with zeros, done here: scipy would leave the exact test when it meets one
    changed = differences[differences != 0]
    return Comparison(
        n=len(pairs),
        first=float(pairs[:, 0].mean()),
        second=float(pairs[:, 1].mean()),
        difference=float(differences.mean()),
        changed=len(changed),
        p=_p(changed),
    )


def _p(differences: np.ndarray) -> float | None:
    """Exact up to 50 differences without ties and 13 with some, else by the normal approximation (scipy's `auto`)."""
    if not len(differences):
        return None
    found: Any = wilcoxon(differences)
    return float(found.pvalue)
