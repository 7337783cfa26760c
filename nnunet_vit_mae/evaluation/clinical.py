"""Risk groups by volume (ViTiac, section 3.2), and measures by slice thickness and volume (supplementary figure 2).

`Columns` are the columns of `cases.csv` for one model and label. Notes are sentences for the reader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from nnunet_vit_mae.evaluation.results import Bin, RiskGroups
from nnunet_vit_mae.evaluation.words import count_cases

QUARTILES = ("no", "low", "moderate", "high")  # risk, as ViTiac names it
PARTS = 4  # quartiles
ROUNDING = 2**-22  # of a volume: headers in single precision turn 10 mm3 into 10.0000002 mm3
Columns = Mapping[str, np.ndarray]


def find_cutoffs(volumes: np.ndarray, given: Sequence[float] | None) -> tuple[tuple[float, ...], list[str]]:
    """Find the cutoffs between risk groups.

    Args:
        volumes: Reference volumes of one label in mm3, one per case.
        given: Ascending cutoffs in mm3; None for the quartiles of `volumes`.

    Returns:
        The cutoffs in mm3, and notes. There are no cutoffs when there are fewer cases than groups, or when the
        volumes hardly differ.

    Example:
        >>> find_cutoffs(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), None)
        ((2.0, 3.0, 4.0), [])
    """
    groups = PARTS if given is None else len(given) + 1
    if len(volumes) < groups:
        return (), [f"no risk groups, because {count_cases(len(volumes))} cannot fill {groups} groups."]
    if given is not None:
        return tuple(given), []
    quartiles = np.quantile(volumes, np.arange(1, PARTS) / PARTS)
    # a group above the largest volume would be empty
    cutoffs = tuple(float(value) for value in np.unique(quartiles) if value < volumes.max())
    if not cutoffs:
        return (), ["no risk groups, because the reference volumes differ too little for quartiles."]
    if len(cutoffs) < PARTS - 1:
        return cutoffs, [
            f"{len(cutoffs) + 1} risk groups instead of {PARTS}, because many reference volumes are equal."
        ]
    return cutoffs, []


def group_names(cutoffs: Sequence[float], given: bool) -> tuple[str, ...]:
    """Name the risk groups.

    Args:
        cutoffs: Cutoffs between the groups.
        given: Whether the user gave the cutoffs, so that their meaning is unknown.

    Returns:
        ViTiac's names for four quartiles, else numbered groups.

    Example:
        >>> group_names([10.0, 50.0], given=True)
        ('group 1', 'group 2', 'group 3')
    """
    if not given and len(cutoffs) + 1 == len(QUARTILES):
        return QUARTILES
    return tuple(f"group {number + 1}" for number in range(len(cutoffs) + 1))


def group_of(volumes: np.ndarray, cutoffs: Sequence[float]) -> np.ndarray:
    """Assign volumes to risk groups.

    Args:
        volumes: Volumes in mm3.
        cutoffs: Ascending cutoffs in mm3.

    Returns:
        For each volume, the number (from 0) of the first group whose cutoff it does not exceed, apart from rounding.

    Example:
        >>> group_of(np.array([0.0, 10.0, 10.1, 99.0]), [10.0, 50.0]).tolist()
        [0, 0, 1, 2]
    """
    return np.searchsorted(np.asarray(cutoffs, float) * (1 + ROUNDING), volumes, side="left")


def risk_groups(
    columns: Columns, model: str, label: str, cutoffs: tuple[float, ...], names: tuple[str, ...]
) -> RiskGroups:
    """Compare the risk groups by predicted volume with those by reference volume.

    Args:
        columns: Columns of one model and label, with `reference_mm3` and `predicted_mm3`.
        model: Name of the model.
        label: Name of the label.
        cutoffs: Ascending cutoffs in mm3.
        names: Names of the groups, one more than cutoffs.

    Returns:
        Confusion matrix, number of correct cases and kappa.
    """
    from sklearn.metrics import cohen_kappa_score, confusion_matrix  # takes a second to import

    reference, predicted = (group_of(columns[column], cutoffs) for column in ("reference_mm3", "predicted_mm3"))
    numbers = list(range(len(names)))
    confusion = confusion_matrix(reference, predicted, labels=numbers)
    single_group = len(set(reference) | set(predicted)) == 1  # kappa is 0 / 0 then
    kappa = None if single_group else float(cohen_kappa_score(reference, predicted, labels=numbers, weights="linear"))
    return RiskGroups(
        model=model,
        label=label,
        cutoffs=cutoffs,
        groups=names,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        n=len(reference),
        correct=int(np.trace(confusion)),
        kappa=kappa,
    )


def bin_edges(values: np.ndarray, given: Sequence[float] | None = None) -> tuple[float, ...]:
    """Find the edges of bins.

    Args:
        values: The quantity to bin, one value per case.
        given: Ascending inner edges; None for quartiles.

    Returns:
        Ascending edges from the lowest to the highest value. Equal quartiles are merged, so that there may be fewer
        bins, and a single edge when all values are equal. A given edge that is the lowest value occurs twice: the cases
        of this value are the first bin.

    Example:
        >>> bin_edges(np.array([1.0, 2.0, 5.0]), [3.0, 9.0]), bin_edges(np.array([3.0, 5.0]), [3.0])
        ((1.0, 3.0, 5.0), (3.0, 3.0, 5.0))
    """
    if not len(values):
        return ()
    if given is None:
        return tuple(float(edge) for edge in np.unique(np.quantile(values, np.linspace(0, 1, PARTS + 1))))
    lowest, highest = float(values.min()), float(values.max())
    return (lowest, *(edge for edge in given if lowest <= edge < highest), highest)


def bin_measure(
    columns: Columns, model: str, label: str, measure: str, quantity: str, edges: Sequence[float]
) -> list[Bin]:
    """Average a measure over the cases of each bin.

    Args:
        columns: Columns of one model and label, with the measure and the quantity.
        model: Name of the model.
        label: Name of the label.
        measure: Column to average.
        quantity: Column to bin by.
        edges: Ascending edges of the bins; see `bin_edges`.

    Returns:
        The bins in which the measure is defined for at least one case.
    """
    if not len(edges):
        return []
    ranges = list(pairwise(edges)) or [(edges[0], edges[0])]
    bins = []
    for number, (low, high) in enumerate(ranges):
        above = columns[quantity] > (low if number else -math.inf)  # only the first bin includes its lower edge
        inside = above & (columns[quantity] <= high)
        values = columns[measure][inside & np.isfinite(columns[measure])]
        if len(values):
            mean, median = float(values.mean()), float(np.median(values))
            bins.append(Bin(model, label, measure, quantity, low, high, len(values), mean, median))
    return bins
