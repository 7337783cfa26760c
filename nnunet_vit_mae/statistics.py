"""Paired numbers compared: means, and the two-sided Wilcoxon signed-rank test that AMAE uses (section 2.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

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
