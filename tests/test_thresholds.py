"""The exact search for thresholds, against all thresholds tried one by one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_vit_mae.calibration import cases as calibration_cases
from nnunet_vit_mae.calibration import open_cases, thresholds
from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes
from nnunet_vit_mae.calibration.shifts import segment, shift_probabilities
from nnunet_vit_mae.calibration.thresholds import fit_thresholds
from nnunet_vit_mae.errors import UserError

SHAPE = (3, 2, 7)  # small: every threshold between two voxels is tried
BINARY = Classes(("blob",), ((1,),))
THREE = Classes(("a", "b", "c"), ((1,), (2,), (3,)))
REGIONS = Classes(("whole", "core"), ((1, 2), (2,)), painted=(1, 2))

few_seeds = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def cases_of(
    seed: int, classes: Classes, *, number: int = 3, bias: float = 0.0, digits: int | None = None
) -> list[CalibrationCase]:
    """Probabilities that know something about the labels; few digits make equal probabilities."""
    random = np.random.default_rng(seed)
    cases = []
    for index in range(number):
        labels = random.integers(0, max(max(values) for values in classes.values) + 1, SHAPE)
        logits = random.normal(bias, 1.5, (len(classes.names) + (not classes.regions), *SHAPE))
        for channel, values in enumerate(classes.values, start=not classes.regions):
            logits[channel] += 1.5 * np.isin(labels, values)
        odds = np.exp(logits)
        probabilities = odds / (1 + odds) if classes.regions else odds / odds.sum(axis=0)
        if digits is not None:
            probabilities = probabilities.round(digits)
        probabilities = probabilities.astype(np.float32)
        cases.append(CalibrationCase(f"case_{index}", random.uniform(0.3, 4), lambda p=probabilities, y=labels: (p, y)))
    return cases


def loss_of(cases: list[CalibrationCase], classes: Classes, shifts: list[float], objective: str) -> float:
    """The objective, literally."""
    losses = []
    for case in cases:
        probabilities, labels = case.read()
        counted = labels != classes.ignore
        for mask, values in zip(segment(probabilities, classes, shifts), classes.values, strict=True):
            predicted, annotated = mask & counted, np.isin(labels, values) & counted
            total = predicted.sum() + annotated.sum()
            dice = 2 * (predicted & annotated).sum() / total if total else 1.0
            volume = abs(int(predicted.sum()) - int(annotated.sum())) * case.voxel_mm3
            losses.append(volume if objective == "volume" else 1 - dice)
    return float(np.mean(losses))


def best_of_all(cases: list[CalibrationCase], classes: Classes, objective: str) -> float:
    """The smallest loss over all thresholds between two neighbouring probabilities of the only class, and outside."""
    values = np.unique(np.concatenate([case.read()[0][-1].ravel() for case in cases])).astype(np.float64)
    values = values[(values > open_cases.LOWEST) & (values < 1 - open_cases.LOWEST)]
    tried = np.concatenate([(values[1:] + values[:-1]) / 2, [open_cases.LOWEST, 1 - open_cases.LOWEST]])
    return min(loss_of(cases, classes, [-math.log(t / (1 - t))], objective) for t in tried)


@few_seeds
@given(seeds, st.sampled_from(["volume", "dice"]), st.sampled_from([-3.0, 0.0, 2.0]), st.sampled_from([1, 2, None]))
def test_no_threshold_is_better_than_the_one_found(seed, objective, bias, digits):
    cases = cases_of(seed, BINARY, digits=digits)
    if bias:
        cases = [
            CalibrationCase(c.name, c.voxel_mm3, lambda c=c: (biased(c.read()[0], bias), c.read()[1])) for c in cases
        ]
    fitted = fit_thresholds(cases, BINARY, objective)
    assert loss_of(cases, BINARY, list(fitted.shifts), objective) == pytest.approx(
        best_of_all(cases, BINARY, objective)
    )


def biased(probabilities: np.ndarray, bias: float) -> np.ndarray:
    odds = np.exp(np.log(np.maximum(probabilities, 1e-6)) + np.reshape([0, bias], (2, 1, 1, 1)))
    return (odds / odds.sum(axis=0)).astype(np.float32)


@few_seeds
@given(seeds, st.sampled_from(["volume", "dice"]))
def test_each_region_gets_the_best_threshold_below_what_is_painted_over_it(seed, objective):
    cases = cases_of(seed, REGIONS)
    fitted = fit_thresholds(cases, REGIONS, objective)
    inner = Classes(("core",), ((2,),), painted=(2,))
    alone = [CalibrationCase(c.name, c.voxel_mm3, lambda c=c: (c.read()[0][1:], c.read()[1])) for c in cases]
    assert loss_of(alone, inner, [fitted.shifts[1]], objective) == pytest.approx(best_of_all(alone, inner, objective))
    found = loss_of(cases, REGIONS, list(fitted.shifts), objective)
    for other in np.linspace(-open_cases.LOG_ODDS_LIMIT, open_cases.LOG_ODDS_LIMIT, 201):
        assert found <= loss_of(cases, REGIONS, [other, fitted.shifts[1]], objective) + 1e-9


@few_seeds
@given(seeds)
def test_regions_are_segmented_as_nnunet_does(seed):
    """BraTS's order: what is in an inner region is in the outer ones too."""
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}
    manager = LabelManager(labels, [1, 2, 3])
    classes = Classes(("whole", "core", "enhancing"), ((1, 2, 3), (2, 3), (3,)), painted=(1, 2, 3))
    cases = cases_of(seed, classes)
    for case in cases:
        probabilities, _ = case.read()
        segmentation = np.asarray(manager.convert_probabilities_to_segmentation(probabilities))
        for mask, values in zip(segment(probabilities, classes, [0.0] * 3), classes.values, strict=True):
            assert np.array_equal(mask, np.isin(segmentation, values))
    fitted = fit_thresholds(cases, classes)
    written = {(row.case, row.label): row.after_mm3 for row in fitted.volumes}
    for case in cases:
        shifted = shift_probabilities(case.read()[0], classes, fitted.shifts)
        segmentation = np.asarray(manager.convert_probabilities_to_segmentation(shifted))
        for name, values in zip(classes.names, classes.values, strict=True):
            voxels = np.isin(segmentation, values).sum()
            assert abs(written[case.name, name] / case.voxel_mm3 - voxels) < 1.5  # a shifted float32 is rounded


@few_seeds
@given(seeds, st.sampled_from(["volume", "dice"]))
def test_with_several_classes_no_single_shift_can_be_bettered(seed, objective):
    cases = cases_of(seed, THREE)
    fitted = fit_thresholds(cases, THREE, objective)
    found = loss_of(cases, THREE, list(fitted.shifts), objective)
    assert found <= loss_of(cases, THREE, [0, 0, 0], objective)
    for index in range(3):
        for other in np.linspace(-open_cases.LOG_ODDS_LIMIT, open_cases.LOG_ODDS_LIMIT, 41):
            shifts = list(fitted.shifts)
            shifts[index] = other
            assert found <= loss_of(cases, THREE, shifts, objective) + 1e-9


@settings(max_examples=5)
@given(seeds)
def test_small_blocks_give_the_same(seed):
    cases = cases_of(seed, THREE)
    whole = fit_thresholds(cases, THREE, "volume")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_cases, "VALUES_PER_BLOCK", 17 * THREE.outputs)
        assert fit_thresholds(cases, THREE, "volume").shifts == whole.shifts


@few_seeds
@given(seeds, st.sampled_from([BINARY, THREE, REGIONS]), st.sampled_from([3.0, 8.0]), st.booleans())
def test_the_search_is_the_same_without_the_voxels_that_nothing_moves(seed, classes, factor, has_room):
    """Networks are sure of most voxels; some of these here are wrong, and all of them count."""
    room, usual = (10**9, open_cases.USUAL_SHIFT) if has_room else (0, 1e-3)  # which every shift exceeds
    cases = [
        CalibrationCase(c.name, c.voxel_mm3, lambda c=c: (sharpened(c.read()[0], classes, factor), c.read()[1]))
        for c in cases_of(seed, classes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_cases, "KEPT_BYTES", room)
        patch.setattr(thresholds, "USUAL_SHIFT", usual)
        found = fit_thresholds(cases, classes, "dice")
        patch.setattr(open_cases, "settled_voxels", lambda probabilities, *_: np.zeros(probabilities.shape[1], bool))
        all_open = fit_thresholds(cases, classes, "dice")
    assert (found.shifts, found.volumes) == (all_open.shifts, all_open.volumes)
    for ours, theirs in zip(found.curves, all_open.curves, strict=True):
        assert (ours.dice == theirs.dice).all()
        assert (ours.difference_mm3 == theirs.difference_mm3).all()


def sharpened(probabilities: np.ndarray, classes: Classes, factor: float) -> np.ndarray:
    odds = (probabilities.astype(float) / (1 - probabilities if classes.regions else 1)) ** factor
    return (odds / (1 + odds if classes.regions else odds.sum(axis=0))).astype(np.float32)


def test_a_voxel_is_settled_when_no_two_shifts_move_it():
    limit, largest = open_cases.LOG_ODDS_LIMIT, 3.0
    for own, rival, reach in ((0, 2, limit), (2, 0, limit), (1, 3, limit + largest)):
        for distance, expected in ((0.999, False), (1.001, True)):
            logits = np.full((4, 1), -60.0)
            logits[[own, rival], 0] = 0, -distance * reach
            probabilities = np.exp(logits) / np.exp(logits).sum()
            assert open_cases.settled_voxels(probabilities, THREE, largest).tolist() == [expected]
            for searched, kept in ((own, rival), (rival, own)):
                sizes = {searched: limit, kept: largest if searched else 0.0}
                shifts = [sizes.get(channel, 0.0) * (1 if channel == rival else -1) for channel in (1, 2, 3)]
                moved = segment(probabilities, THREE, shifts)
                winner = own if expected or not searched else rival
                assert [mask[0] for mask in moved] == [channel == winner for channel in (1, 2, 3)]
    for probability, expected in ((0.9e-4, True), (1.1e-4, False), (1 - 1.1e-4, False), (1 - 0.9e-4, True)):
        probabilities = np.array([[probability], [0.0]], np.float32)
        assert open_cases.settled_voxels(probabilities, REGIONS, largest).tolist() == [expected]


def test_many_candidates_are_tried_in_parts():
    cases = cases_of(5, THREE)
    whole = fit_thresholds(cases, THREE, "dice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "voxels_per_block", lambda _: 3)
        assert fit_thresholds(cases, THREE, "dice").shifts == whole.shifts


def test_a_thin_structure_gets_its_low_threshold():
    """A line that the network believes in by 2% only, and noise below it."""
    probabilities = np.full((2, 9, 10, 11), 0.01, np.float32)
    labels = np.zeros((9, 10, 11), int)
    labels[4, :, 5] = 1
    probabilities[1, 4, :, 5] = 0.02
    probabilities[0] = 1 - probabilities[1]
    fitted = fit_thresholds([CalibrationCase("line", 0.5, lambda: (probabilities, labels))], BINARY, "volume")
    assert 0.01 < fitted.thresholds[0] < 0.02
    (volumes,) = fitted.volumes
    assert (volumes.reference_mm3, volumes.before_mm3, volumes.after_mm3) == (5, 0, 5)
    assert (volumes.before_dice, volumes.after_dice) == (0, 1)


def test_the_search_is_finer_than_any_grid():
    """All probabilities lie within a hundredth of a step of the grid, and no two are equal."""
    size = 400
    probabilities = np.empty((2, 1, 1, size), np.float32)
    probabilities[1] = 0.02 + 1e-7 * np.arange(size)
    probabilities[0] = 1 - probabilities[1]
    labels = np.zeros((1, 1, size), int)
    labels[0, 0, 123:] = 1
    assert len(np.unique(probabilities[1])) == size
    for objective in thresholds.OBJECTIVES:
        fitted = fit_thresholds([CalibrationCase("close", 1, lambda: (probabilities, labels))], BINARY, objective)
        assert fitted.volumes[0].after_mm3 == size - 123
        assert fitted.volumes[0].after_dice == 1


@few_seeds
@given(seeds, st.sampled_from(["volume", "dice"]), st.sampled_from([-3.0, 0.0, 2.0]))
def test_a_case_that_is_left_out_gets_the_threshold_of_all_others(seed, objective, bias):
    cases = cases_of(seed, BINARY, number=4, bias=bias, digits=1)
    for case, row in zip(cases, fit_thresholds(cases, BINARY, objective).volumes, strict=True):
        others = fit_thresholds([other for other in cases if other is not case], BINARY, objective)
        probabilities, labels = case.read()
        (mask,) = segment(probabilities, BINARY, others.shifts)
        assert row.left_out_mm3 == pytest.approx(mask.sum() * case.voxel_mm3)
        assert row.left_out_dice == pytest.approx(1 - loss_of([case], BINARY, others.shifts, "dice"))
        assert (row.case, row.reference_mm3) == (case.name, pytest.approx((labels == 1).sum() * case.voxel_mm3))


def test_without_others_a_case_that_is_left_out_keeps_the_usual_threshold():
    (row,) = fit_thresholds(cases_of(0, BINARY, number=1, bias=2.0), BINARY, "volume").volumes
    assert row.after_mm3 < row.before_mm3 == row.left_out_mm3
    assert row.left_out_dice == row.before_dice


@pytest.mark.parametrize("classes", [THREE, REGIONS], ids=["three", "regions"])
def test_several_classes_are_left_out_too(classes):
    """Of equal cases, the others know all."""
    case = cases_of(0, classes, number=1, digits=1)[0]
    for row in fit_thresholds([case] * 3, classes, "volume").volumes:
        assert row.left_out_mm3 == row.after_mm3
        assert row.left_out_dice == pytest.approx(row.after_dice)


def test_what_is_right_already_stays():
    labels = np.zeros(SHAPE, int)
    labels[1] = 1
    probabilities = np.stack([0.9 - 0.8 * labels, 0.1 + 0.8 * labels]).astype(np.float32)
    fitted = fit_thresholds([CalibrationCase("right", 1, lambda: (probabilities, labels))], BINARY, "volume")
    assert fitted.shifts == (0,)
    assert fitted.thresholds == (0.5,)


def test_the_curve_shows_what_a_threshold_gives():
    cases = cases_of(3, BINARY)
    (curve,) = fit_thresholds(cases, BINARY, "volume").curves
    assert curve.thresholds[0] == pytest.approx(open_cases.LOWEST)
    assert 0.5 in curve.thresholds
    for threshold, difference, dice in list(zip(curve.thresholds, curve.difference_mm3, curve.dice, strict=True))[::40]:
        shift = [-math.log(threshold / (1 - threshold))]
        assert difference == pytest.approx(loss_of(cases, BINARY, shift, "volume"))
        assert 1 - dice == pytest.approx(loss_of(cases, BINARY, shift, "dice"))


@few_seeds
@given(seeds)
def test_ignored_voxels_change_nothing(seed):
    cases = cases_of(seed, BINARY)
    random = np.random.default_rng(seed)

    def spoilt(case: CalibrationCase):
        probabilities, labels = case.read()
        top = random.random((2, 2, *SHAPE[1:])).astype(np.float32)
        return np.concatenate([probabilities, top], axis=1), np.concatenate([labels, np.full((2, *SHAPE[1:]), 9)])

    ignoring = Classes(BINARY.names, BINARY.values, ignore=9)
    changed = [CalibrationCase(c.name, c.voxel_mm3, lambda c=c: spoilt(c)) for c in cases]
    assert fit_thresholds(changed, ignoring, "volume").shifts == fit_thresholds(cases, BINARY, "volume").shifts


def test_certain_voxels_and_voxels_outside_the_crop_are_never_moved():
    """nnU-Net gives exactly 0 outside the part of an image that it looked at; float32 rounds others to 1."""
    labels = np.zeros(SHAPE, int)
    labels[0] = 1
    foreground = np.zeros(SHAPE, np.float32)
    foreground[0], foreground[1, 0] = 1, 0.3
    probabilities = np.stack([1 - foreground, foreground])
    fitted = fit_thresholds([CalibrationCase("certain", 1, lambda: (probabilities, labels))], BINARY, "dice")
    assert fitted.volumes[0].after_dice == 1
    for shift in (-9.0, 9.0):
        assert segment(probabilities, BINARY, [shift])[0][0].all()
        assert not segment(probabilities, BINARY, [shift])[0][2].any()


def test_nan_is_refused():
    def spoilt(probabilities: np.ndarray) -> np.ndarray:
        probabilities[:, 0, 0, 0] = np.nan
        return probabilities

    case, other = cases_of(0, BINARY, number=2)
    cases = [case, CalibrationCase("diverged", 1, lambda: (spoilt(other.read()[0].copy()), other.read()[1]))]
    with pytest.raises(UserError, match="diverged contain NaN"):
        fit_thresholds(cases, BINARY)


def test_a_case_without_annotation_counts():
    """It wants a threshold at which nothing is found in it."""
    empty = np.zeros(SHAPE, int)
    probabilities = np.full((2, *SHAPE), 0.4, np.float32)
    probabilities[1, 0, 0, 0] = 0.6
    probabilities[0] = 1 - probabilities[1]
    for objective in thresholds.OBJECTIVES:
        fitted = fit_thresholds([CalibrationCase("empty", 1, lambda: (probabilities, empty))], BINARY, objective)
        assert fitted.thresholds[0] > 0.6
        assert fitted.volumes[0].after_mm3 == 0
        assert (fitted.volumes[0].before_dice, fitted.volumes[0].after_dice) == (0, 1)
