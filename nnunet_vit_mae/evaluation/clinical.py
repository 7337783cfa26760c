"""Risk groups by volume (ViTiac, section 3.2), and measures by slice thickness and volume (supplementary figure 2).

Rows are columns of the table of cases by name, of one model and label. Notes are sentences to be shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from nnunet_vit_mae.evaluation.results import Bin, Risk

QUARTILES = ("no", "low", "moderate", "high")  # risk, as ViTiac names it
PARTS = 4  # quantiles
Rows = Mapping[str, np.ndarray]


def find_cutoffs(volumes: np.ndarray, given: Sequence[float] | None) -> tuple[tuple[float, ...], list[str]]:
    """Cut-offs between risk groups in mm3, from the annotated volumes of one label unless they are given, and notes.

    There are none where the cases are fewer than the groups, or do not differ.
    """
    groups = PARTS if given is None else len(given) + 1
    if len(volumes) < groups:
        return (), [f"no risk groups, for {groups} of them need as many cases, and there are {len(volumes)}."]
    if given is not None:
        return tuple(given), []
    quartiles = np.quantile(volumes, np.arange(1, PARTS) / PARTS)
    # a group above the largest volume would hold nobody
    cutoffs = tuple(float(value) for value in np.unique(quartiles) if value < volumes.max())
    if not cutoffs:
        return (), ["no risk groups, for the annotated volumes do not differ enough for quartiles."]
    if len(cutoffs) < PARTS - 1:
        return cutoffs, [f"{len(cutoffs) + 1} risk groups instead of {PARTS}, for many annotated volumes are equal."]
    return cutoffs, []


def group_names(cutoffs: Sequence[float], given: bool) -> tuple[str, ...]:
    """Risks for the four quartiles, else numbers: what given cut-offs mean, only those know who gave them."""
    if not given and len(cutoffs) + 1 == len(QUARTILES):
        return QUARTILES
    return tuple(f"group {number + 1}" for number in range(len(cutoffs) + 1))


def group_of(volumes: np.ndarray, cutoffs: Sequence[float]) -> np.ndarray:
    """Number of the first group whose cut-off a volume does not exceed, from 0."""
    return np.searchsorted(cutoffs, volumes, side="left")


def risk(rows: Rows, model: str, label: str, cutoffs: tuple[float, ...], names: tuple[str, ...]) -> Risk:
    """How one model's volumes put the cases into groups."""
    annotated, predicted = (group_of(rows[column], cutoffs) for column in ("reference_mm3", "predicted_mm3"))
    numbers = list(range(len(names)))
    confusion = confusion_matrix(annotated, predicted, labels=numbers)
    alone = len(set(annotated) | set(predicted)) == 1  # agreement by chance is then perfect as well: 0 / 0
    kappa = None if alone else float(cohen_kappa_score(annotated, predicted, labels=numbers, weights="linear"))
    return Risk(
        model=model,
        label=label,
        cutoffs=cutoffs,
        groups=names,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        n=len(annotated),
        correct=int(np.trace(confusion)),
        kappa=kappa,
    )


def edges_of(values: np.ndarray, given: Sequence[float] | None = None) -> tuple[float, ...]:
    """Edges of bins, ascending: those given between the lowest and the highest value, or quartiles.

    Quartiles that are equal are one, so that there are fewer bins, and a single edge where all values are equal.
    """
    if not len(values):
        return ()
    if given is None:
        return tuple(float(edge) for edge in np.unique(np.quantile(values, np.linspace(0, 1, PARTS + 1))))
    lowest, highest = float(values.min()), float(values.max())
    return (lowest, *(edge for edge in given if lowest < edge < highest), highest)


def bins(rows: Rows, model: str, label: str, measure: str, quantity: str, edges: Sequence[float]) -> list[Bin]:
    """A measure of one model and label by a quantity; bins in which it is nowhere defined are left out."""
    if not len(edges):
        return []
    ranges = list(pairwise(edges)) or [(edges[0], edges[0])]
    found = []
    for number, (low, high) in enumerate(ranges):
        inside = (rows[quantity] <= high) & (rows[quantity] > (low if number else -math.inf))
        values = rows[measure][inside & np.isfinite(rows[measure])]
        if len(values):
            mean, median = float(values.mean()), float(np.median(values))
            found.append(Bin(model, label, measure, quantity, low, high, len(values), mean, median))
    return found
