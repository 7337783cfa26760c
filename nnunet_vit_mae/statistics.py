"""Statistics over cases: bootstrap intervals of a mean (ViTiac, table 2), the two-sided Wilcoxon signed-rank test
(AMAE, section 2.4), Holm's correction for several tests, and Bland-Altman agreement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, rankdata, spearmanr, wilcoxon

DIGITS = 12  # decimals of shares that count: equal values and differences must be ties in spite of rounding
FEW_PAIRS = 5  # with so few pairs the test cannot give p < 0.05
LIMIT_SDS = 1.96  # standard deviations on either side of the mean that hold 95% of a normal distribution


@dataclass(frozen=True)
class Comparison:
    """Paired values compared; the means are NaN without any pair, and p is None when no pair differs."""

    n: int  # pairs that are tested: cases, or patients
    first: float  # mean
    second: float  # mean
    difference: float  # mean of second minus first
    changed: int  # pairs that differ: the test ignores the others
    direction: int  # sign of the sum of signed ranks: 1 if the second tends to be larger, -1 if smaller
    p: float | None

    @property
    def smallest_p(self) -> float:
        """The smallest p that the pairs that differ could have given."""
        return smallest_p(self.changed)


def smallest_p(pairs: int) -> float:
    """Return the smallest p that the exact two-sided Wilcoxon test can give.

    Args:
        pairs: Number of pairs that differ.

    Returns:
        The p-value when all pairs differ in the same direction.

    Example:
        >>> smallest_p(5), smallest_p(6)
        (0.0625, 0.03125)
    """
    return 2.0 ** (1 - pairs)


def mean_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Compute a bootstrap confidence interval of the mean, by percentiles.

    Percentiles stay within the values, and exist for values that are all equal, where the bias-corrected method divides
    0 by 0. Both are too narrow for few cases. The same seed draws the same cases for equally many values, so that the
    intervals of models on the same cases can be compared.

    Args:
        values: One value per case.
        groups: The patient of each case: patients are drawn, each with all cases; None: cases are drawn.
        resamples: Number of bootstrap resamples.
        confidence: Confidence level, between 0 and 1.
        seed: Random seed.

    Returns:
        Lower and upper end of the interval; NaN for fewer than two values or patients.

    Raises:
        ValueError: If a value is NaN or infinite.

    Example:
        >>> low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
        >>> 1.0 <= low < 2.5 < high <= 4.0
        True
    """
    sample = np.asarray(values, dtype=float)
    if not np.isfinite(sample).all():
        raise ValueError(f"Values must be finite, but one of them is {sample[~np.isfinite(sample)][0]}.")
    data = (sample, np.ones(len(sample)))
    if groups is not None:
        data = _sums_and_counts(sample, groups)
    if len(data[0]) < 2:
        return math.nan, math.nan
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])  # exactly: the mean of resamples would be rounded
    result: Any = bootstrap(
        data,
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, 10**7 // len(data[0])),  # limits memory to 10 million numbers
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for multiple testing by Holm's method.

    Args:
        p_values: One p per test; None for a test without a result, which does not count as a test.

    Returns:
        The corrected p-values in the same order; None stays None.

    Example:
        >>> [p and round(p, 3) for p in holm([0.01, None, 0.04])]
        [0.02, None, 0.04]
    """
    known = [p for p in p_values if p is not None]
    if len(known) < 2:
        return list(p_values)
    from statsmodels.stats.multitest import multipletests  # takes a second to import

    result: Any = multipletests(known, method="holm")
    corrected = iter(result[1])
    return [None if p is None else float(next(corrected)) for p in p_values]


def compare(first: ArrayLike, second: ArrayLike, groups: ArrayLike | None = None) -> Comparison:
    """Compare two values of each case by the two-sided Wilcoxon signed-rank test.

    Pairs that do not differ are dropped, as Wilcoxon proposed. The test is exact for up to 50 pairs without ties and up
    to 13 with ties; beyond, it uses the normal approximation (scipy's `auto`).

    Args:
        first: One value per case.
        second: The other value of the same cases, in the same order.
        groups: The patient of each case: the means of each patient's cases are tested, as scans of one patient are not
            independent; None: each case counts.

    Returns:
        Means over the cases and their difference; number of pairs that are tested, how many of them differ, the
        direction of their ranks, which can be another one than that of the means, and p.

    Raises:
        ValueError: If a value is NaN or infinite, or the lengths differ.

    Example:
        >>> compare([0.5, 0.6, 0.7], [0.6, 0.8, 1.0]).p
        0.25
    """
    pairs = np.stack([np.asarray(values, dtype=float) for values in (first, second)], axis=1)
    if not np.isfinite(pairs).all():
        raise ValueError(f"Pairs must be finite, but one of them is {pairs[~np.isfinite(pairs)][0]}.")
    if not len(pairs):
        return Comparison(0, math.nan, math.nan, math.nan, 0, 0, None)
    first_mean, second_mean = pairs.mean(axis=0).tolist()
    digits = _digits_of(pairs)
    mean_difference = float((pairs[:, 1] - pairs[:, 0]).round(digits).mean())
    if groups is not None:
        of_patients = [_sums_and_counts(values, groups) for values in pairs.T]
        pairs = np.stack([sums / counts for sums, counts in of_patients], axis=1)
    differences = (pairs[:, 1] - pairs[:, 0]).round(digits)
    changed = differences[differences != 0]  # dropped here, because scipy leaves the exact test when it meets a zero
    return Comparison(
        n=len(pairs),
        first=first_mean,
        second=second_mean,
        difference=mean_difference,
        changed=len(changed),
        direction=int(np.sign(np.sign(changed) @ rankdata(np.abs(changed)))),
        p=_wilcoxon(changed),
    )


def limits_of_agreement(differences: np.ndarray) -> tuple[float, float, float]:
    """Compute bias and 95% limits of agreement (Bland and Altman, 1986).

    Args:
        differences: One difference per case, at least one, e.g. predicted minus reference volume in mm3.

    Returns:
        The mean difference (bias), and bias minus and plus 1.96 standard deviations; the limits of a single case are
        NaN.

    Example:
        >>> bias, lower, upper = limits_of_agreement(np.array([1.0, 3.0, 5.0]))
        >>> round(bias, 2), round(lower, 2), round(upper, 2)
        (3.0, -0.92, 6.92)
    """
    bias = float(differences.mean())
    spread = LIMIT_SDS * float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return bias, bias - spread, bias + spread


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return Spearman's rank correlation of pairs; None where one side is constant.

    >>> rank_correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 4.0, 9.0]))
    1.0
    """
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    result: Any = spearmanr(first, second)
    return round(float(result.statistic), DIGITS)


def _sums_and_counts(values: np.ndarray, groups: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the values and their number in each group."""
    _, numbers = np.unique(groups, return_inverse=True)
    return np.bincount(numbers, values), np.bincount(numbers)


def _digits_of(values: np.ndarray) -> int:
    """Return the decimals that count: fewer for large volumes, whose rounding is coarser."""
    return DIGITS - max(0, math.ceil(math.log10(max(1.0, np.abs(values).max()))))


def _wilcoxon(differences: np.ndarray) -> float | None:
    if not len(differences):
        return None
    result: Any = wilcoxon(differences)
    return float(result.pvalue)
