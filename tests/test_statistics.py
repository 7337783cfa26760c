"""Intervals, the test of pairs and Holm's correction, against scipy, a literal reference and by hand."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.statistics import compare, holm, mean_interval

pytestmark = pytest.mark.usefixtures("no_garbage_of_imports")

few = settings(max_examples=40, deadline=None)
finite = st.floats(-1e6, 1e6, width=32)
dice = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60)


@few
@given(values=st.lists(finite, min_size=2, max_size=30), seed=st.integers(0, 99))
def test_the_interval_is_that_of_literal_resamples(values, seed):
    """The same draws by the same generator, the mean of each, and two percentiles."""
    random = np.random.default_rng(seed)
    drawn = np.array(values)[random.integers(0, len(values), (200, len(values)))]
    expected = np.percentile(drawn.mean(1), [2.5, 97.5])
    found = mean_interval(values, resamples=200, seed=seed)
    assert found == pytest.approx(tuple(expected), rel=1e-9, abs=1e-6)
    assert min(values) - 1e-6 <= found[0] <= found[1] <= max(values) + 1e-6


@few
@given(values=st.lists(finite, min_size=4, max_size=30), seed=st.integers(0, 99), patients=st.integers(2, 4))
def test_the_interval_over_patients_draws_each_with_all_cases(values, seed, patients):
    groups = [f"P{number % patients}" for number in range(len(values))]
    random = np.random.default_rng(seed)
    drawn = random.integers(0, patients, (200, patients))
    means = [np.concatenate([values[number::patients] for number in row]).mean() for row in drawn]
    found = mean_interval(values, groups=groups, resamples=200, seed=seed)
    assert found == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), rel=1e-9, abs=1e-6)
    assert mean_interval(values, groups=[*map(str, range(10, 10 + len(values)))]) == mean_interval(values)


def test_scans_of_one_patient_are_not_independent():
    """Of four patients with three scans each, all of which improve: p cannot be below 1/8."""
    before, better = np.arange(12) / 100, np.arange(12) / 90 + 0.1
    patients = [f"P{number // 3}" for number in range(12)]
    assert compare(before, better).p < 0.001
    compared = compare(before, better, groups=patients)
    assert (compared.n, compared.changed, compared.p) == (4, 4, 0.125)
    assert compared.difference == pytest.approx((better - before).mean())
    uneven = compare(before, better, groups=["A"] * 9 + ["B", "C", "D"])
    assert (uneven.n, uneven.first, uneven.difference) == (4, compared.first, compared.difference)
    assert all(math.isnan(end) for end in mean_interval([1.0, 2.0], groups=["P", "P"]))


def test_the_interval_covers_a_known_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    draws = random.normal(3, 2, (300, 60))
    inside = sum(low <= 3 <= high for low, high in (mean_interval(draw, resamples=300) for draw in draws))
    assert 0.9 < inside / 300 < 0.98
    low, high = mean_interval(draws[0], resamples=2000)
    normal = scipy.stats.norm.interval(0.95, draws[0].mean(), draws[0].std() / math.sqrt(60))
    assert (low, high) == pytest.approx(normal, abs=0.1)


def test_an_interval_repeats_itself_and_narrows_with_less_confidence():
    values = np.random.default_rng(1).uniform(size=25).tolist()
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(values) != mean_interval(values, seed=1)
    low, high = mean_interval(values, confidence=0.5)
    wide = mean_interval(values)
    assert wide[0] < low < high < wide[1]


def test_equal_values_have_an_interval_and_a_single_one_has_none():
    assert mean_interval([0.1] * 7) == (0.1, 0.1)
    for values in ([], [0.5]):
        assert all(math.isnan(end) for end in mean_interval(values))
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            mean_interval([0.5, wrong])


@pytest.mark.parametrize("n", [2, 7, 30, 200])
def test_p_is_what_scipy_gives_for_the_pairs(n):
    random = np.random.default_rng(n)
    first, second = random.uniform(size=(2, n))
    found = compare(first.tolist(), second.tolist())
    assert found.p == pytest.approx(scipy.stats.wilcoxon(second, first, alternative="two-sided").pvalue, rel=1e-12)
    assert (found.n, found.changed) == (n, n)
    assert (found.first, found.second) == pytest.approx((first.mean(), second.mean()))
    assert found.difference == pytest.approx((second - first).mean())


def test_p_of_six_cases_by_hand():
    """Ranks 1 to 6, of which 2 is negative: 2 sums of 64 are at most 2 from the end (0, 1, 2: 3 of them)."""
    found = compare([0.5] * 6, [0.6, 0.3, 0.8, 0.9, 1.0, 1.1])
    assert found.p == pytest.approx(2 * 3 / 64)


@pytest.mark.parametrize("n", range(1, 9))
def test_p_of_differences_in_one_direction_is_the_smallest_there_is(n):
    found = compare([0.5] * n, [0.5 + 0.01 * (i + 1) for i in range(n)])
    assert found.p == pytest.approx(found.smallest_p) == 2.0 ** (1 - n)


@few
@given(pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12))
def test_no_p_is_below_the_smallest_also_with_ties_and_zeros(pairs):
    found = compare([a / 8 for a, _ in pairs], [b / 8 for _, b in pairs])
    assert found.changed == sum(a != b for a, b in pairs)
    assert (found.p is None) == (found.changed == 0)
    if found.p is not None:
        assert found.smallest_p * (1 - 1e-9) <= found.p <= 1


@few
@given(first=dice, seed=st.integers(0, 99))
def test_pairs_that_do_not_differ_change_means_but_not_p(first, seed):
    second = np.random.default_rng(seed).uniform(size=len(first)).tolist()
    alone, more = compare(first, second), compare([*first, 0.25, 1.0], [*second, 0.25, 1.0])
    assert more.p == alone.p
    assert (more.n, more.changed) == (alone.n + 2, alone.changed)
    assert more.difference == pytest.approx(alone.difference * alone.n / more.n)


@few
@given(first=dice, seed=st.integers(0, 99))
def test_the_other_way_round_only_the_sign_changes(first, seed):
    second = np.random.default_rng(seed).uniform(size=len(first)).tolist()
    there, back = compare(first, second), compare(second, first)
    assert back.p == pytest.approx(there.p)
    assert back.difference == pytest.approx(-there.difference)


def test_equal_differences_are_ties_however_floating_point_rounds_them():
    first, second = [0.1, 0.7, 0.3, 0.2, 0.1, 0.0], [0.2, 0.6, 0.9, 0.9, 0.9, 0.9]  # 0.1, -0.1 and larger ones
    assert second[0] - first[0] != first[1] - second[1]
    assert scipy.stats.wilcoxon(np.subtract(second, first)).pvalue == pytest.approx(2 * 2 / 64)
    assert compare(first, second).p == pytest.approx(2 * 3 / 64)  # rank sums 0, 1.5 and 1.5


def test_equal_differences_of_large_volumes_are_ties_too():
    voxel, steps = 0.343, np.array([5, -5, 5, -5, 5, 5, -5, 5])
    voxels = np.arange(1, 9) * 123_457
    first, second = voxels * voxel, (voxels + steps) * voxel
    assert len({*np.abs(second - first).round(12)}) > 1
    assert compare(first, second).p == pytest.approx(compare([0] * 8, steps).p)


def test_the_direction_is_that_of_the_ranks():
    assert compare([0] * 4, [1, 2, 3, -50]).direction == 1  # 1 + 2 + 3 - 4
    assert compare([0] * 4, [1, 2, -3, 50]).direction == compare([1], [2]).direction == 1
    assert compare([1, 2, -3, 50], [0] * 4).direction == -1
    assert compare([1], [1]).direction == compare([], []).direction == compare([0, 0, 0], [1, 2, -3]).direction == 0


def test_without_pairs_or_differences_there_is_no_p():
    empty = compare([], [])
    assert (empty.n, empty.p) == (0, None)
    assert math.isnan(empty.first)
    assert compare([0.5, 0.7], [0.5, 0.7]).p is None
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            compare([0.5, wrong], [0.5, 0.5])
    with pytest.raises(ValueError, match="same shape"):
        compare([0.5, 0.5], [0.5])


def test_holm_by_hand():
    """The smallest of four times 4, the next times 3, and none below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])


def test_what_has_no_p_takes_no_part():
    assert holm([None, 0.02, None, 0.03]) == [None, pytest.approx(0.04), None, pytest.approx(0.04)]
    assert holm([None]) == [None]
    assert holm([]) == []


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_holm_is_its_definition(n):
    values = np.random.default_rng(n).uniform(0, 0.5, n).round(2).tolist()
    order = np.argsort(values)
    expected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        expected[index] = highest
    assert holm(values) == pytest.approx(expected)
