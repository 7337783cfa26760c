"""Risk groups, kappa and bins, by hand and against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.evaluation.clinical import (
    QUARTILES,
    bin_edges,
    bin_measure,
    find_cutoffs,
    group_names,
    group_of,
    risk_groups,
)

few = settings(max_examples=40, deadline=None)
volumes = st.lists(st.integers(0, 40).map(float), min_size=1, max_size=40).map(np.array)


def columns_of(annotated, predicted):
    return {"reference_mm3": np.array(annotated, float), "predicted_mm3": np.array(predicted, float)}


def test_quartiles_by_hand():
    cutoffs, notes = find_cutoffs(np.arange(1.0, 9), None)
    assert cutoffs == (2.75, 4.5, 6.25)
    assert notes == []
    assert group_names(cutoffs, given=False) == QUARTILES == ("no", "low", "moderate", "high")
    assert group_of(np.arange(1.0, 9), cutoffs).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_given_cutoffs_are_taken_and_a_volume_on_one_is_below_it():
    cutoffs, notes = find_cutoffs(np.arange(5.0), [1.0, 3.0])
    assert (cutoffs, notes) == ((1.0, 3.0), [])
    assert group_names(cutoffs, given=True) == ("group 1", "group 2", "group 3")
    assert group_of(np.array([0, 1, 1.5, 3, 99]), cutoffs).tolist() == [0, 0, 1, 1, 2]
    assert group_of(np.array([25 * np.float32(0.4).item(), 10.01]), [10.0]).tolist() == [0, 1]  # 0.4 as in a header
    assert group_names((1.0, 2.0, 3.0), given=True) == ("group 1", "group 2", "group 3", "group 4")


def test_confusion_and_kappa_by_hand():
    """Groups that cases are away from the right one: 4 in all, and 34 / 6 by chance.

    By chance from sums of rows 3 1 2 and columns 1 3 2: (3 * 3 + 3 * 2 * 2 + 1 * 1 + 1 * 2 + 2 * 1 * 2 + 2 * 3) / 6.
    """
    found = risk_groups(columns_of([1, 1, 1, 2, 3, 3], [2, 1, 3, 2, 3, 2]), "ViT", "blob", (1.0, 2.0), ("a", "b", "c"))
    assert found.confusion == ((1, 1, 1), (0, 1, 0), (0, 1, 1))
    assert (found.n, found.correct) == (6, 3)
    assert found.kappa == pytest.approx(1 - 4 / (34 / 6))


@few
@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_kappa_is_its_definition(pairs):
    annotated, predicted = zip(*pairs, strict=True)
    found = risk_groups(columns_of(annotated, predicted), "ViT", "blob", (0.0, 1.0, 2.0), QUARTILES)
    confusion = np.zeros((4, 4), int)
    for row, column in pairs:
        confusion[row, column] += 1
    assert found.confusion == tuple(map(tuple, confusion.tolist()))
    assert found.correct == sum(a == b for a, b in pairs)
    weights = np.abs(np.subtract.outer(range(4), range(4)))
    chance = (weights * np.outer(confusion.sum(1), confusion.sum(0))).sum() / len(pairs)
    if chance:
        assert found.kappa == pytest.approx(1 - (weights * confusion).sum() / chance)
    else:
        assert found.kappa is None


def test_too_few_cases_or_volumes_are_said():
    assert find_cutoffs(np.array([1.0, 2, 3]), None) == (
        (),
        ["no risk groups, because 3 cases cannot fill 4 groups."],
    )
    assert find_cutoffs(np.array([1.0]), [0.5])[0] == ()
    assert find_cutoffs(np.zeros(9), None) == (
        (),
        ["no risk groups, because the reference volumes differ too little for quartiles."],
    )
    cutoffs, notes = find_cutoffs(np.array([0.0] * 6 + [5.0, 9.0]), None)
    assert cutoffs == (0.0, 1.25)
    assert notes == ["3 risk groups instead of 4, because many reference volumes are equal."]
    assert group_names(cutoffs, given=False) == ("group 1", "group 2", "group 3")


@few
@given(values=volumes)
def test_quartile_groups_are_filled(values):
    cutoffs, notes = find_cutoffs(values, None)
    assert bool(notes) == (len(cutoffs) < 3)
    assert list(cutoffs) == sorted(set(cutoffs))
    if cutoffs:
        groups = group_of(values, cutoffs)
        assert {0, len(cutoffs)} <= set(groups.tolist())  # the lowest and the highest group are not empty


@few
@given(values=volumes, given_edges=st.none() | st.lists(st.integers(-5, 45).map(float), unique=True).map(sorted))
def test_every_case_is_in_one_bin(values, given_edges):
    rows = {"reference_mm3": values, "dice": values / 100}
    edges = bin_edges(values, given_edges)
    found = bin_measure(rows, "ViT", "blob", "dice", "reference_mm3", edges)
    assert sum(entry.n for entry in found) == len(values)
    for number, entry in enumerate(found):
        inside = values[(values <= entry.high) & ((values > entry.low) | ((values == entry.low) & (number == 0)))]
        assert entry.n == len(inside)
        assert entry.mean == pytest.approx(inside.mean() / 100)
        assert entry.median == pytest.approx(np.median(inside) / 100)


def test_bins_by_hand():
    thickness = np.array([0.5, 1, 1, 5, 5, 10])
    dice = np.array([0.9, 0.8, math.nan, 0.6, 0.4, math.nan])
    edges = bin_edges(thickness, [1, 5, 20])
    assert edges == (0.5, 1, 5, 10)
    rows = {"slice_thickness_mm": thickness, "dice": dice}
    first, second = bin_measure(rows, "ViT", "blob", "dice", "slice_thickness_mm", edges)  # the last bin has no Dice
    assert (first.low, first.high, first.n, first.mean) == (0.5, 1, 2, pytest.approx(0.85))
    assert (second.low, second.high, second.n, second.median) == (1, 5, 2, pytest.approx(0.5))
    edges = bin_edges(thickness[1:], [1])  # an edge that is the lowest value: these cases are a bin of their own
    rows = {"slice_thickness_mm": thickness[1:], "dice": np.arange(5.0)}
    thin, thick = bin_measure(rows, "ViT", "blob", "dice", "slice_thickness_mm", edges)
    assert (thin.low, thin.high, thin.n, thin.mean) == (1, 1, 2, 0.5)
    assert (thick.low, thick.high, thick.n, thick.mean) == (1, 10, 3, 3)
    rows = {"slice_thickness_mm": np.full(3, 2.0), "dice": np.ones(3)}
    (alone,) = bin_measure(rows, "ViT", "blob", "dice", "slice_thickness_mm", bin_edges(rows["slice_thickness_mm"]))
    assert (alone.low, alone.high, alone.n) == (2, 2, 3)
    assert bin_measure(rows, "ViT", "blob", "dice", "slice_thickness_mm", bin_edges(np.array([]))) == []
