"""Measures against nnU-Net, SimpleITK, MONAI's own functions, literal references and cases worked by hand."""

import itertools
import math
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.ndimage import binary_erosion, label

from nnunet_vit_mae.evaluation.measures import crop_to_union, measure
from nnunet_vit_mae.evaluation.surfaces import surface_dice, surface_distances
from nnunet_vit_mae.evaluation.voxels import lesions

several = settings(max_examples=60, deadline=None)
few = settings(max_examples=20, deadline=None)
side = st.floats(0.25, 6)
spacings = st.tuples(side, side, side)
seeds = st.integers(0, 10**6)


def masks(seed, shape=(5, 7, 9), empty=False):
    """Two random masks of unequal sides: scattered voxels, solid boxes, or both."""
    random = np.random.default_rng(seed)
    found = []
    while len(found) < 2:
        mask = random.random(shape) < random.choice([0, 0.02, 0.3, 0.8])
        low = random.integers(0, shape)
        high = [random.integers(a, b + 1) for a, b in zip(low, shape, strict=True)]
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] |= random.random() < 0.8
        if empty or mask.any():
            found.append(mask)
    return found


def image_of(mask, spacing):
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    image.SetSpacing([float(value) for value in spacing[::-1]])
    return image


def edge(mask):
    """Voxels of a mask with a neighbour outside, at one of their faces."""
    padded = np.pad(mask, 1)
    outside = np.zeros_like(padded)
    for axis, step in itertools.product(range(3), (1, -1)):
        outside |= ~np.roll(padded, step, axis)
    return (padded & outside)[1:-1, 1:-1, 1:-1]


def distances(first, second, spacing):
    """From each edge voxel of one mask to the nearest of the other, both ways, by all pairs."""
    points = [np.argwhere(edge(mask)) * spacing for mask in (first, second)]
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    return pairs.min(1), pairs.min(0)


# ---------- overlap and volumes


@several
@given(seed=seeds, spacing=spacings)
def test_overlap_is_that_of_simpleitk(seed, spacing):
    reference, prediction = masks(seed)
    found = measure(reference, prediction, spacing)
    filtered = sitk.LabelOverlapMeasuresImageFilter()
    images = image_of(prediction, spacing), image_of(reference, spacing)
    filtered.Execute(*images)
    assert found["dice"] == pytest.approx(filtered.GetDiceCoefficient(1))
    assert found["recall"] == pytest.approx(1 - filtered.GetFalseNegativeError(1))
    filtered.Execute(*images[::-1])
    assert found["precision"] == pytest.approx(1 - filtered.GetFalseNegativeError(1))
    shape = sitk.LabelShapeStatisticsImageFilter()
    for name, mask in {"reference": reference, "predicted": prediction}.items():
        shape.Execute(image_of(mask, spacing))
        assert found[f"{name}_mm3"] == pytest.approx(shape.GetPhysicalSize(1))
        assert found[f"{name}_voxels"] == shape.GetNumberOfPixels(1)
    difference = found["predicted_mm3"] - found["reference_mm3"]
    assert found["difference_mm3"] == pytest.approx(difference, abs=1e-9)
    assert found["absolute_difference_mm3"] == pytest.approx(abs(difference), abs=1e-9)
    assert found["relative_difference"] == pytest.approx(abs(difference) / found["reference_mm3"], abs=1e-9)


@few
@given(seed=seeds)
def test_overlap_is_that_of_nnunet(tmp_path_factory, seed):
    reference, prediction = masks(seed, empty=True)
    folder = tmp_path_factory.mktemp("nnunet")
    files = [str(folder / f"{name}.nii.gz") for name in ("reference", "prediction")]
    for file, mask in zip(files, (reference, prediction), strict=True):
        sitk.WriteImage(image_of(mask, (3.0, 0.7, 1.2)), file)
    expected = compute_metrics(*files, SimpleITKIO(), [1])["metrics"][1]
    found = measure(reference, prediction, (3.0, 0.7, 1.2))
    assert found["dice"] == pytest.approx(float(expected["Dice"]), nan_ok=True)
    assert found["reference_voxels"] == expected["n_ref"]
    assert found["predicted_voxels"] == expected["n_pred"]


# ---------- surfaces


@several
@given(seed=seeds, spacing=spacings)
def test_hd95_is_that_of_all_pairs(seed, spacing):
    reference, prediction = masks(seed)
    expected = max(np.percentile(way, 95) for way in distances(reference, prediction, spacing))
    assert measure(reference, prediction, spacing)["hd95_mm"] == pytest.approx(expected, rel=1e-5)


@few
@given(seed=seeds, spacing=spacings)
def test_the_hausdorff_distance_of_the_kept_library_is_that_of_simpleitk(seed, spacing):
    """For surfaces, as it takes them: SimpleITK takes all voxels that are given to it."""
    pair = masks(seed)
    filtered = sitk.HausdorffDistanceImageFilter()
    filtered.Execute(*(image_of(edge(mask), spacing) for mask in pair))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
        found = compute_hausdorff_distance(
            *(torch.from_numpy(mask)[None, None] for mask in pair), include_background=True, spacing=spacing
        )
    assert float(found) == pytest.approx(filtered.GetHausdorffDistance(), rel=1e-5, abs=1e-6)


def test_our_edge_is_scipys():
    for seed in range(20):
        mask, _ = masks(seed)
        assert (edge(mask) == mask & ~binary_erosion(mask)).all()


@several
@given(seed=seeds, spacing=spacings, tolerance=st.floats(0, 8))
def test_surface_dice_is_that_of_the_kept_library(seed, spacing, tolerance):
    reference, prediction = masks(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy")
        expected = compute_surface_dice(
            *(torch.from_numpy(mask)[None, None] for mask in (prediction, reference)),
            class_thresholds=[tolerance],
            include_background=True,
            spacing=spacing,
            use_subvoxels=True,
        )
    found = measure(reference, prediction, spacing, tolerance=tolerance)["surface_dice"]
    assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-6)
    assert 0 <= found <= 1


def elements(low, high, spacing):
    """Places and areas (mm2) of the surface elements of a box: rectangles, bevels along edges, triangles at corners.

    An element lies between eight voxels, and cuts the edges of their cube halfway.
    """
    places, areas = [], []
    for place in itertools.product(*(range(a - 1, b) for a, b in zip(low, high, strict=True))):
        ends = [p in (a - 1, b - 1) for p, a, b in zip(place, low, high, strict=True)]
        cut = [length for length, end in zip(spacing, ends, strict=True) if end]
        if len(cut) == 1:
            area = math.prod(spacing) / cut[0]
        elif len(cut) == 2:
            area = math.prod(spacing) / math.prod(cut) * math.hypot(*cut) / 2
        elif len(cut) == 3:
            a, b, c = (length / 2 for length in cut)
            area = math.hypot(a * b, b * c, a * c) / 2
        else:
            continue
        places.append(place)
        areas.append(area)
    return np.array(places) * spacing, np.array(areas)


@several
@given(data=st.data(), spacing=spacings, tolerance=st.floats(0, 8))
def test_surface_dice_of_boxes_by_hand(data, spacing, tolerance):
    """Also of single voxels and plates, and in anisotropic spacing: sides of at least two voxels have both ends."""
    shape, found, surfaces_of = (6, 8, 7), [], []
    for _ in range(2):
        low = [data.draw(st.integers(0, length - 1)) for length in shape]
        high = [data.draw(st.integers(a + 1, length)) for a, length in zip(low, shape, strict=True)]
        mask = np.zeros(shape, bool)
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
        found.append(mask)
        surfaces_of.append(elements(low, high, spacing))
    (first, first_areas), (second, second_areas) = surfaces_of
    pairs = np.linalg.norm(first[:, None] - second[None], axis=-1)
    if np.isclose(pairs, tolerance, rtol=1e-5).any():
        return  # on one side or the other by rounding
    within = first_areas[pairs.min(1) <= tolerance].sum() + second_areas[pairs.min(0) <= tolerance].sum()
    expected = within / (first_areas.sum() + second_areas.sum())
    assert measure(*found, spacing, tolerance=tolerance)["surface_dice"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_two_voxels_by_hand():
    reference, prediction = np.zeros((2, 4, 5, 9), bool)
    reference[1, 2, 3] = True
    prediction[3, 1, 7] = True
    found = measure(reference, prediction, (5.0, 0.5, 2.0), tolerance=12.8)
    assert found["hd95_mm"] == pytest.approx(math.sqrt(10**2 + 0.5**2 + 8**2))  # 12.8160
    shifted = measure(reference, prediction, (5.0, 0.5, 2.0), tolerance=12.9)
    assert shifted["surface_dice"] == 1
    assert found["surface_dice"] < 1
    assert measure(reference, reference, (5.0, 0.5, 2.0))["hd95_mm"] == 0


@few
@given(seed=seeds, spacing=spacings, before=st.integers(0, 3), after=st.integers(0, 3))
def test_what_is_far_away_changes_nothing(seed, spacing, before, after):
    pair = masks(seed)
    wide = [np.pad(mask, ((before, after), (after, 4), (1, before))) for mask in pair]
    assert measure(*wide, spacing) == pytest.approx(measure(*pair, spacing))
    assert all(cut.shape[0] <= mask.shape[0] + 2 for cut, mask in zip(crop_to_union(*pair), pair, strict=True))


@few
@given(seed=seeds, spacing=spacings, order=st.permutations(range(3)))
def test_no_axis_is_special(seed, spacing, order):
    pair = masks(seed)
    turned = measure(*(mask.transpose(order) for mask in pair), [spacing[axis] for axis in order])
    assert turned == pytest.approx(measure(*pair, spacing), rel=1e-4)


# ---------- lesions


def components(mask):
    """26-connected components as sets of places, by flooding."""
    left, found = {tuple(place) for place in np.argwhere(mask)}, []
    while left:
        queue = [left.pop()]
        component = set(queue)
        while queue:
            place = queue.pop()
            near = {tuple(np.add(place, step)) for step in itertools.product((-1, 0, 1), repeat=3)} & left
            left -= near
            component |= near
            queue += near
        found.append(component)
    return found


@several
@given(seed=seeds, smallest=st.integers(1, 4))
def test_lesions_are_counted_as_by_flooding(seed, smallest):
    random = np.random.default_rng(seed)
    reference, prediction = random.random((2, 4, 6, 9)) < random.choice([0.02, 0.08, 0.2])
    found = lesions(reference, prediction, smallest)
    places = [{tuple(place) for place in np.argwhere(mask)} for mask in (reference, prediction)]
    true = [component for component in components(reference) if len(component) >= smallest]
    predicted = [component for component in components(prediction) if len(component) >= smallest]
    hits = sum(bool(component & places[1]) for component in true)
    false = sum(not component & places[0] for component in predicted)
    assert [found[name] for name in ("reference_lesions", "predicted_lesions", "found_lesions", "false_lesions")] == [
        len(true),
        len(predicted),
        hits,
        false,
    ]
    assert found["lesion_recall"] == pytest.approx(hits / len(true) if true else math.nan, nan_ok=True)
    expected = (len(predicted) - false) / len(predicted) if predicted else math.nan
    assert found["lesion_precision"] == pytest.approx(expected, nan_ok=True)


def boxes(seed):
    """Reference and prediction: small boxes, most of them in both and moved by a voxel, some in one of them."""
    random = np.random.default_rng(seed)
    reference, prediction = np.zeros((2, 11, 15, 19), bool)
    for _ in range(14):
        corner, size = random.integers(0, (9, 13, 17)), random.integers(1, 4, 3)
        moved = np.maximum(corner + random.integers(-1, 2, 3), 0)
        kind = random.integers(4)
        for mask, start, kinds in ((reference, corner, (0, 1, 2)), (prediction, moved, (0, 1, 3))):
            if kind in kinds:
                mask[tuple(slice(low, low + side) for low, side in zip(start, size, strict=True))] = True
    return reference, prediction


# what panoptica 2.1.7 counts in these masks with the backend cc3d (26 neighbours) and a match for any overlap:
# NaiveThresholdMatching(Metric.IOU, 0.0, strict_threshold=True, allow_many_to_one=True), predicted lesions without it
PANOPTICA = {  # reference and predicted lesions, true and false positives, by seed
    0: (11, 8, 3, 5),
    1: (8, 8, 3, 5),
    2: (11, 8, 4, 4),
    3: (7, 9, 3, 6),
    4: (7, 6, 4, 2),
    5: (7, 9, 6, 3),
    6: (8, 10, 1, 9),
    7: (10, 7, 3, 4),
}


@pytest.mark.parametrize(("seed", "counted"), PANOPTICA.items())
def test_lesions_are_counted_as_by_panoptica(seed, counted):
    """Except that a prediction that covers several reference lesions finds each of them here."""
    reference, prediction = boxes(seed)
    found = lesions(reference, prediction, 1)
    assert (found["reference_lesions"], found["predicted_lesions"], found["false_lesions"]) == (
        *counted[:2],
        counted[3],
    )
    neighbours = np.ones((3, 3, 3))
    of_reference, of_prediction = (label(mask, neighbours)[0] for mask in (reference, prediction))
    pairs = {(p, r) for p, r in zip(of_prediction.ravel(), of_reference.ravel(), strict=True) if p and r}
    covering = {p: sum(other == p for other, _ in pairs) for p, _ in pairs}
    assert found["found_lesions"] - counted[2] == sum(number - 1 for number in covering.values())


def test_lesions_by_hand():
    """Three lesions, of which one prediction covers two and misses one, and a false one beside it."""
    reference, prediction = np.zeros((2, 3, 5, 12), bool)
    reference[0, 0, 0] = reference[1, 1, 1] = True  # one lesion: the voxels share a corner
    reference[2, 4, 4:6] = True
    reference[0, 4, 11] = True
    prediction[1:, 1:, 1:5] = True
    prediction[0, 0, 8] = True
    found = lesions(reference, prediction, 1)
    assert (found["reference_lesions"], found["predicted_lesions"]) == (3, 2)
    assert (found["found_lesions"], found["false_lesions"]) == (2, 1)
    assert found["lesion_recall"] == pytest.approx(2 / 3)
    assert found["lesion_precision"] == 0.5
    assert found["lesion_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    larger = lesions(reference, prediction, 2)
    assert (larger["reference_lesions"], larger["false_lesions"], larger["lesion_f1"]) == (2, 0, 1)


# ---------- what is not defined


def test_what_is_not_defined_is_nan_and_nothing_else():
    full, empty = np.zeros((2, 4, 5, 6), bool)
    full[1:3, 1:3, 1:3] = True

    def undefined(reference, prediction):
        return {name for name, value in measure(reference, prediction, (3.0, 1.0, 1.0)).items() if value != value}

    surface = {"hd95_mm", "surface_dice"}
    no_reference, no_prediction = {"recall", "relative_difference", "lesion_recall"}, {"precision", "lesion_precision"}
    assert undefined(full, full) == set()
    assert undefined(empty, full) == surface | no_reference
    assert undefined(full, empty) == surface | no_prediction
    assert undefined(empty, empty) == surface | no_reference | no_prediction | {"dice", "lesion_f1"}
    assert measure(empty, full, (3.0, 1.0, 1.0))["dice"] == 0
    assert measure(full, empty, (3.0, 1.0, 1.0))["relative_difference"] == 1


def test_wrong_masks_are_refused():
    mask = np.ones((3, 4, 5), bool)
    for other in (mask[1:], mask.astype(np.uint8)):
        with pytest.raises(ValueError, match="Masks must be"):
            measure(mask, other, (1, 1, 1))
    assert surface_distances(*crop_to_union(mask, mask), (3, 0.5, 1), 1.0) == {"hd95_mm": 0, "surface_dice": 1}
    assert surface_dice(*crop_to_union(mask, mask), (3.0, 0.5, 1.0), 0.0) == 1
