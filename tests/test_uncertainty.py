"""Intervals, expected Dice and temperatures on drawn numbers, where what is right is known or can be counted."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, softmax

from nnunet_vit_mae.calibration import cases as calibration_cases
from nnunet_vit_mae.calibration import temperature as tempering
from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes
from nnunet_vit_mae.calibration.conformal import (
    Residual,
    Validated,
    VolumeEstimate,
    coverage,
    fewest_cases,
    volume_interval,
)
from nnunet_vit_mae.calibration.expected_dice import ExpectedDice, fit_expected_dice, soft_dice
from nnunet_vit_mae.calibration.temperature import (
    VoxelSample,
    fit_temperature,
    negative_log_likelihood,
    reliability_of,
    sample_voxels,
    temper,
)
from nnunet_vit_mae.nnunet.predicted_members import CaseUncertainty
from nnunet_vit_mae.nnunet.uncertainty import Uncertainty, ValidatedCase, _section

THREE = Classes(("a", "b"), ((1,), (2,)))
REGIONS = Classes(("left", "upper"), ((1, 3), (2, 3)), painted=(1, 2))

levels = st.sampled_from([0.5, 0.7, 0.8, 0.9, 0.95])
seeds = st.integers(0, 2**32 - 1)


# ---------- intervals


def validated(seed: int, number: int, predictors: str = "0") -> list[Validated]:
    """Cases whose volumes, spreads and errors are drawn; large volumes have larger errors."""
    random = np.random.default_rng(seed)
    references = np.exp(random.normal(5, 1, number))
    volumes = references * np.exp(random.normal(0, 0.3, number))
    spreads = volumes * random.uniform(0, 0.2, number)
    return [
        Validated(predictors[place % len(predictors)], VolumeEstimate(volume, spread, 1.5), reference)
        for place, (volume, spread, reference) in enumerate(zip(volumes, spreads, references, strict=True))
    ]


def test_ends_of_intervals_of_tiny_voxels_are_not_rounded_away():
    voxel = 0.01**3
    case = ValidatedCase("case", "0", "a", 100 * voxel, 0.0, voxel, 110 * voxel, dice=None, soft_dice=None)
    new = CaseUncertainty("model", {"0": {"a": VolumeEstimate(200 * voxel, 0.0, voxel)}}, {"a": None})
    columns = Uncertainty([case] * 9).columns(new, 0.9)["a"]
    # of the residual 10 / (5 + 1), 11 voxels are the unit
    assert columns["volume_low_mm3"] == pytest.approx((200 - 11 * 10 / 6) * voxel, rel=1e-5)
    assert columns["volume_high_mm3"] == pytest.approx((200 + 11 * 10 / 6) * voxel, rel=1e-5)


def test_a_new_case_is_compared_with_cases_of_its_own_label_and_folds():
    """The errors of the labels differ, and fold 1 has not predicted the new case."""
    estimate = VolumeEstimate(100.0, spread_mm3=4.0, voxel_mm3=1.0)  # a scale of 10
    rows = [
        ValidatedCase("case", fold, label, 100.0, 4.0, 1.0, 100.0 + error, dice=None, soft_dice=None)
        for label, fold, error in (("a", "0", 10.0), ("a", "1", 30.0), ("b", "0", 50.0))
        for _ in range(9)
    ]
    line = ExpectedDice(0.5, 0.2, 9, None, 0.0, 0.0)
    new = CaseUncertainty("model", {"0": {"a": estimate, "b": estimate}}, {"a": 0.8, "b": None})
    assert Uncertainty(rows, {"a": line, "b": line}).columns(new, 0.9) == {
        "a": {"volume_low_mm3": 90, "volume_high_mm3": 110, "expected_dice": 0.6},
        "b": {"volume_low_mm3": 50, "volume_high_mm3": 150, "expected_dice": None},
    }


def test_the_record_has_a_line_from_soft_to_true_dice_and_the_coverage_of_each_label():
    rows = [
        ValidatedCase("case", "0", label, 100.0, 4.0, 1.0, 101.0 + number, dice, 2 * (dice - 0.2))
        for label in "ab"
        for number, dice in enumerate(np.linspace(0.3, 0.6, 20 if label == "a" else 8))
    ]
    section = _section(rows)
    for label in "ab":
        line = section["expected_dice"][label]
        assert (line["slope"], line["intercept"]) == (pytest.approx(0.5), pytest.approx(0.2))
    assert section["coverage"]["a"]["all"] == 0.9
    assert section["coverage"]["b"] == {}  # from eight cases
    assert [row["reference_mm3"] for row in section["cases"]] == [row.reference_mm3 for row in rows]


def covers(others: list[Validated], case: Validated, level: float) -> bool | None:
    interval = volume_interval({"0": case.estimate}, [other.residual for other in others], level)
    return None if interval is None else interval[0] <= case.reference_mm3 <= interval[1]


@given(seeds, st.integers(1, 60), levels)
def test_of_exchangeable_cases_the_level_is_covered(seed, number, level):
    """Of n + 1 cases each may be the new one; the number of them that the others cover is known exactly."""
    cases = validated(seed, number + 1)
    covered = [covers(cases[:place] + cases[place + 1 :], case, level) for place, case in enumerate(cases)]
    if number < fewest_cases(level):
        assert set(covered) == {None}
    else:
        assert sum(map(bool, covered)) == math.ceil(round(level * (number + 1), 9))
        assert sum(map(bool, covered)) / (number + 1) >= level - 1e-9


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_new_cases_of_several_folds_are_covered(level):
    """Folds that are off by different factors: each new volume is estimated by both."""
    random = np.random.default_rng(0)
    factors, covered = {"0": 0.8, "1": 1.3}, []
    for _ in range(400):
        references = random.uniform(100, 900, 21)
        estimates = [
            {
                fold: VolumeEstimate(factor * reference * random.uniform(0.8, 1.2), 10, 1)
                for fold, factor in factors.items()
            }
            for reference in references
        ]
        pairs = zip(estimates[1:], references[1:], itertools.cycle("01"), strict=False)
        residuals = [Residual(fold, own[fold].residual(reference)) for own, reference, fold in pairs]
        low, high = volume_interval(estimates[0], residuals, level)
        covered.append(low <= references[0] <= high)
    assert np.mean(covered) >= level - 0.03


def test_each_residual_is_laid_around_the_volume_of_its_own_fold():
    estimates = {"0": VolumeEstimate(100, 4, 1), "1": VolumeEstimate(300, 4, 1)}  # scales of 10 and 20
    residuals = [Residual("0", value) for value in (1, 2, 3)] + [Residual("1", value) for value in (1, 2, 3)]
    uppers = sorted([110, 120, 130, 320, 340, 360])
    lowers = sorted([90, 80, 70, 280, 260, 240])
    # of 6 residuals the level 0.8 takes the sixth, 0.6 the fifth: ceil(level * 7)
    assert volume_interval(estimates, residuals, 0.8) == (lowers[0], uppers[5])
    assert volume_interval(estimates, residuals, 0.6) == (lowers[1], uppers[4])
    assert volume_interval(estimates, residuals, 0.9) is None
    assert volume_interval(estimates, [*residuals, Residual("0", 50)], 0.87)[0] == 0  # no volume is negative


def test_coverage_of_groups():
    cases = validated(3, 40, "01")
    shares = coverage(cases, 0.9)
    assert shares["all"] == math.ceil(0.9 * 40) / 40
    by_volume = sorted(cases, key=lambda case: case.estimate.volume_mm3)
    for name, third in {"small": by_volume[:14], "middle": by_volume[14:27], "large": by_volume[27:]}.items():
        covered = [
            covers([with_one_predictor(other) for other in cases if other is not case], case, 0.9) for case in third
        ]
        assert shares[name] == pytest.approx(np.mean(covered))
    own, others = cases[::2], cases[1::2]
    assert shares["fold_0"] == np.mean([covers(list(map(with_one_predictor, others)), case, 0.9) for case in own])
    assert list(coverage(cases[:8], 0.9)) == []  # too few for any interval


def with_one_predictor(case: Validated) -> Validated:
    return Validated("0", case.estimate, case.reference_mm3)


# ---------- expected Dice


def test_the_line_and_the_error_of_cases_that_are_left_out():
    random = np.random.default_rng(0)
    soft = random.uniform(0.5, 1, 30)
    true = np.clip(0.8 * soft - 0.1 + random.normal(0, 0.03, 30), 0, 1)
    line = fit_expected_dice([*soft, math.nan, 0.5], [*true, 0.5, math.nan])
    slope, intercept = np.polyfit(soft, true, 1)
    assert (line.slope, line.intercept, line.cases) == (pytest.approx(slope), pytest.approx(intercept), 30)
    errors = []
    for place in range(30):
        others = np.arange(30) != place
        errors.append(abs(np.polyval(np.polyfit(soft[others], true[others], 1), soft[place]) - true[place]))
    assert line.mean_absolute_error == pytest.approx(np.mean(errors))
    assert line.mean_absolute_error < line.mean_absolute_error_of_the_mean / 2
    assert line.rank_correlation > 0.9
    assert (line.of(5.0), line.of(-5.0)) == (1, 0)


def test_a_score_that_says_nothing_gives_the_mean():
    line = fit_expected_dice([0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.8, 0.7, 0.6, 0.5])
    assert (line.slope, line.intercept, line.rank_correlation) == (0, pytest.approx(0.7), pytest.approx(-1))
    for soft, true in (([0.5] * 5, [0.9] * 5), ([0.5] * 5, [0.1, 0.2, 0.3, 0.4, 0.5])):
        assert fit_expected_dice(soft, true).rank_correlation is None
        assert fit_expected_dice(true, soft).rank_correlation is None
    assert fit_expected_dice([0.5] * 4, [0.9] * 4) is None


def test_soft_dice_is_what_a_certain_segmentation_gets():
    mask = np.array([[[True, False], [True, False]]])
    assert soft_dice(mask, mask.astype(np.float32)) == 1
    assert math.isnan(soft_dice(np.zeros((1, 2, 3), bool), np.zeros((1, 2, 3))))


# ---------- temperature


def drawn(factor: float, classes: Classes, number: int = 6, seed: int = 0) -> list[CalibrationCase]:
    """Labels drawn from probabilities, which are then made too sure (a factor above 1 on the logits)."""
    random = np.random.default_rng(seed)
    cases = []
    for index in range(number):
        logits = random.normal(0, 2, (classes.outputs, 8, 10, 12))
        logits[0] += 0 if classes.regions else 4  # mostly background
        if classes.regions:
            left, upper = random.random(logits.shape) < expit(logits)
            labels = left + 2 * upper
            probabilities = expit(factor * logits)
        else:
            cumulated = softmax(logits, axis=0).cumsum(axis=0)
            labels = (random.random((8, 10, 12)) > cumulated).sum(axis=0)
            probabilities = softmax(factor * logits, axis=0)
        probabilities = probabilities.astype(np.float32)
        cases.append(CalibrationCase(f"case_{index}", 1.0, lambda p=probabilities, y=labels: (p, y)))
    return cases


@pytest.mark.parametrize("classes", [THREE, REGIONS], ids=["softmax", "regions"])
@pytest.mark.parametrize("factor", [0.5, 2.5])
def test_the_temperature_that_was_drawn_is_found(classes, factor):
    regions = classes.regions
    sample = sample_voxels(drawn(factor, classes, number=30), classes)
    found = fit_temperature(sample, regions=regions)
    assert found == pytest.approx(factor, rel=0.06)
    before, after = (reliability_of(sample, value, 0, regions=regions) for value in (1.0, found))
    assert after.expected_error < min(0.025, before.expected_error / 2)
    likelihoods = [negative_log_likelihood(sample, value, regions=regions) for value in (found, 1.0, 1.2 * found)]
    assert likelihoods[0] == min(likelihoods)


@pytest.mark.parametrize("classes", [THREE, REGIONS], ids=["softmax", "regions"])
def test_a_temperature_divides_logits(classes):
    probabilities = drawn(1.0, classes, number=1)[0].read()[0]
    halved = temper(probabilities, 2.0, regions=classes.regions)
    assert temper(probabilities, 1.0, regions=classes.regions) is probabilities
    if classes.regions:
        exact = probabilities[0].astype(float)
        np.testing.assert_allclose(halved[0], expit(np.log(exact / (1 - exact)) / 2), rtol=1e-4)
    else:
        np.testing.assert_allclose(halved, softmax(np.log(probabilities.astype(float)) / 2, axis=0), rtol=1e-5)


def test_a_part_of_the_voxels_counts_for_all(monkeypatch):
    cases = drawn(3.0, THREE)
    whole = sample_voxels(cases, THREE)
    assert whole.weights.tolist() == [1] * (6 * 8 * 10 * 12)
    monkeypatch.setattr(tempering, "MOST", 200)
    sample = sample_voxels(cases, THREE)
    assert len(sample.weights) < 0.5 * len(whole.weights)
    assert sample.weights.sum() == pytest.approx(whole.weights.sum())
    for value in (0.5, 1.0, 3.0):
        parts = [negative_log_likelihood(part, value, regions=False) for part in (sample, whole)]
        assert parts[0] == pytest.approx(parts[1], rel=0.1)


def test_a_voxel_that_stands_for_others_counts_as_all_of_them():
    sample = sample_voxels(drawn(2.0, THREE, number=1), THREE)
    times = 1 + np.arange(len(sample.weights)) % 3
    each = VoxelSample(sample.probabilities.repeat(times, 1), sample.truth.repeat(times, 1), np.ones(times.sum()))
    some, whole = (
        reliability_of(part, 1.5, 1, regions=False) for part in (replace(sample, weights=times.astype(float)), each)
    )
    for name in ("probability", "frequency", "voxels"):
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name))


def test_no_more_voxels_are_looked_at_for_many_cases_or_small_blocks(monkeypatch):
    cases = drawn(3.0, THREE)
    monkeypatch.setattr(tempering, "MOST", 200)
    at_once = sample_voxels(cases, THREE)
    monkeypatch.setattr(calibration_cases, "VALUES_PER_BLOCK", 100 * THREE.outputs)  # ten blocks of each case
    in_blocks = sample_voxels(cases, THREE)
    assert len(in_blocks.weights) <= 6 * 2 * 200
    assert in_blocks.weights.sum() == pytest.approx(at_once.weights.sum())
    monkeypatch.setattr(tempering, "MOST_VALUES", 6 * 2 * 50 * THREE.outputs)
    limited = sample_voxels(cases, THREE)
    assert len(limited.weights) <= 6 * 2 * 50
    parts = [negative_log_likelihood(part, 1.0, regions=False) for part in (limited, at_once)]
    assert parts[0] == pytest.approx(parts[1], rel=0.2)


def test_reliability_by_counting():
    cases = drawn(2.0, THREE)
    curve = reliability_of(sample_voxels(cases, THREE), 1.0, 1, regions=False)
    probability = np.concatenate([case.read()[0][2].ravel() for case in cases]).astype(float)
    truth = np.concatenate([case.read()[1].ravel() == 2 for case in cases])
    chosen = probability >= 0.01
    errors = []
    for low in np.arange(20) / 20:
        inside = chosen & (probability >= low) & (probability < low + 0.05)
        if inside.any():
            errors.append(inside.sum() * abs(probability[inside].mean() - truth[inside].mean()))
    assert curve.expected_error == pytest.approx(sum(errors) / chosen.sum(), rel=1e-3)
    assert curve.voxels.sum() == chosen.sum()
