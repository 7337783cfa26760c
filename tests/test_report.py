"""Figures and report page of an evaluation: from numbers that are made up, and in a real browser."""

import base64
import itertools
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from nnunet_vit_mae.calibration.record import CalibrationRecord, read_calibration
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation import drawing, figures, overlays, words
from nnunet_vit_mae.evaluation.bland_altman import bland_altman_figure, spread_apart
from nnunet_vit_mae.evaluation.cases import EvaluationSet, find_evaluation_set
from nnunet_vit_mae.evaluation.expected import read_expected, review_tables, with_expected
from nnunet_vit_mae.evaluation.pictures import slug
from nnunet_vit_mae.evaluation.report import write_report
from nnunet_vit_mae.evaluation.results import (
    MEASURES,
    Agreement,
    Bin,
    Evaluation,
    EvaluationOptions,
    Mean,
    PairedTest,
    RiskGroups,
)
from nnunet_vit_mae.evaluation.summary import Measurements, paired_tests
from nnunet_vit_mae.evaluation.tables import comparison_table, headline_table
from nnunet_vit_mae.imaging.volumes import Geometry
from nnunet_vit_mae.storage.csv_tables import write_records

SHAPE = (6, 20, 24)  # z y x: three unequal sides
EVIL = "<script>alert(1)</script> $x_1$"
MODELS = ("ViT", EVIL, "nnU-Net")
LABELS = ("calcification & bone", "infarct")
NAMES = {"measures", "volumes", "bland_altman", "risk_groups", "bins", "examples"}
CALIBRATION = {
    "thresholds": {LABELS[0]: 0.1834, LABELS[1]: 0.5},
    "objective": "volume",
    "folds": ["0", "1"],
    "cases": [{"case": f"case_{number}", "fold": "0", "label": LABELS[0]} for number in range(7)],
    "before": {LABELS[0]: {"absolute_difference_mm3": 123.4, "dice": 0.645}},
    "after": {LABELS[0]: {"absolute_difference_mm3": 88.1, "dice": None}},
    "left_out": {LABELS[0]: {"absolute_difference_mm3": 97.6, "dice": 0.651}},
    "versions": {"torch": "2.9"},
}


@dataclass(frozen=True)
class Example:
    """An evaluation, its files and a calibration."""

    evaluation: Evaluation
    evaluation_set: EvaluationSet
    calibration: CalibrationRecord

    def write(self, output: Path) -> list[Path]:
        return write_report(self.evaluation, self.evaluation_set, {MODELS[1]: self.calibration}, output)

    def with_images(self, images: Path | None) -> EvaluationSet:
        """The same files with the images of another folder, or none."""
        cases = [
            replace(case, image=None if images is None else images / f"{case.name}_0000.nii.gz")
            for case in self.evaluation_set.cases
        ]
        return replace(self.evaluation_set, cases=tuple(cases))


def rows_of(models, labels, number: int) -> pd.DataFrame:
    """A row for each model, case and label; the first case is rightly empty, so that most is not defined there."""
    random = np.random.default_rng(0)
    rows = []
    for label in labels:
        volumes = np.exp(random.normal(4, 1.5, number)) * (np.arange(number) > 0)
        for model, case in itertools.product(models, range(number)):
            dice = random.uniform(0.2, 1) if volumes[case] else math.nan
            predicted = volumes[case] * random.uniform(0.5, 1.6)
            shares = {measure.column: dice for measure in MEASURES}
            key = {"model": model, "case": f"case_{case}", "label": label, "slice_thickness_mm": 1.0 + case % 4}
            difference = predicted - volumes[case]
            relative = abs(difference) / volumes[case] if volumes[case] else math.nan
            sizes = {"reference_mm3": volumes[case], "predicted_mm3": predicted, "difference_mm3": difference}
            rows.append(
                key | shares | sizes | {"absolute_difference_mm3": abs(difference), "relative_difference": relative}
            )
    return pd.DataFrame(rows)


def evaluation_of(models=MODELS, labels=LABELS, number: int = 12) -> Evaluation:
    cases = rows_of(models, labels, number)
    means, agreements, risks, bins, paired = [], [], [], [], []
    for label, model in itertools.product(labels, models):
        own = cases[(cases["label"] == label) & (cases["model"] == model)]
        for measure in MEASURES:
            known = own[measure.column].dropna()
            low, high = (known.quantile([0.025, 0.975])) if len(known) > 1 else (math.nan, math.nan)
            mean = known.mean() if len(known) else math.nan
            means.append(Mean(model, label, measure.column, mean, low, high, len(known), number - len(known)))
        bias, spread = own["difference_mm3"].mean(), 1.96 * own["difference_mm3"].std()
        agreements.append(Agreement(model, label, number, bias, bias - spread, bias + spread))
        if number > 1:
            right = number - 2
            risks.append(
                RiskGroups(model, label, (60.0,), ("low", "high"), ((right - 2, 1), (1, 2)), number, right, 0.5)
            )
        for measure, quantity, edges in (
            ("dice", "slice_thickness_mm", (1.0, 2.0, 4.0)),
            ("relative_difference", "reference_mm3", (0.5, 40.0, 900.0)),
        ):
            bins += [
                Bin(model, label, measure, quantity, low, high, number // 2, 0.5, 0.4)
                for low, high in itertools.pairwise(edges)
                if number > 1
            ]
    for first, second in itertools.combinations(models, 2):
        paired += [
            PairedTest(first, second, labels[0], "dice", 0.6, 0.7, 0.1, number - 1, number - 1, 0.0004, 0.0012, 1),
            PairedTest(first, second, labels[0], "hd95_mm", 4.0, 5.0, 1.0, 11, 11, 0.2, 0.4, 1),
            PairedTest(first, second, labels[0], "surface_dice", 0.6, 0.6, 0.0, 11, 0, None, None, 0),
        ]
    return Evaluation(
        models=tuple(models),
        labels=tuple(labels),
        cases=cases,
        means=tuple(means),
        tests=tuple(paired),
        agreements=tuple(agreements),
        risks=tuple(risks),
        bins=tuple(bins),
        options=EvaluationOptions(),
        versions={"nnunet-vit-mae": "0.1.0", "numpy": np.__version__},
        notes=(f"{EVIL}: a note on what is < 1.",),
    )


def write_volume(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.6, 3.0))
    sitk.WriteImage(image, str(file))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    root = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    predictions = {model: root / f"predictions_{number}" for number, model in enumerate(MODELS)}
    for case in range(12):
        reference = np.zeros(SHAPE, np.uint8)
        reference[2:4, 5:12, 6:15] = 1
        reference[1:3, 14:17, 16:20] = 2
        image = random.normal(100 * (reference > 0), 20).astype(np.float32)
        write_volume(root / "labelsTs" / f"case_{case}.nii.gz", reference)
        write_volume(root / "imagesTs" / f"case_{case}_0000.nii.gz", image)
        for number, folder in enumerate(predictions.values()):
            write_volume(folder / f"case_{case}.nii.gz", np.roll(reference, number, axis=2))
    labels = {"background": 0, LABELS[0]: 1, LABELS[1]: [1, 2]}  # the second is a region
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    calibration = root / "model"
    calibration.mkdir()
    (calibration / "calibration.json").write_text(json.dumps(CALIBRATION))
    evaluation = evaluation_of()
    figure = bland_altman_figure(evaluation.volumes_of(LABELS[0]))
    drawing.save_figure(figure, calibration / "calibration_bland_altman.png")
    evaluation_set = find_evaluation_set(root / "labelsTs", predictions, root / "imagesTs")
    return Example(evaluation, evaluation_set, read_calibration(calibration))


@pytest.fixture(scope="module")
def page(example: Example, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return example.write(tmp_path_factory.mktemp("written"))[0]


# ---------- words


def test_numbers_for_people():
    assert [words.volume_text(value) for value in (1234.4, 93.0, 56.78, 0.1234, 0, -12)] == [
        "1,234",
        "93",
        "56.8",
        "0.12",
        "0",
        f"{words.MINUS}12",
    ]
    assert words.format_values("difference_mm3", 148.2, -3.25, math.nan, sign=True) == [
        "+148",
        f"{words.MINUS}3",
        words.NO_VALUE,
    ]
    assert words.format_values("dice", 0.81249, 1, -0.0001) == ["0.812", "1.000", "0.000"]
    assert words.format_values("relative_difference", 0.2134) == ["21.3%"]
    assert [words.p_text(p) for p in (None, 0.00004, 0.0312, 1)] == [words.NO_VALUE, "< 0.001", "0.031", "1.000"]
    assert [words.axis_text(value) for value in (1_500_000, -0.25, 0.1 + 0.2)] == [
        "1,500,000",
        f"{words.MINUS}0.25",
        "0.3",
    ]
    assert words.range_text(1, 2, first=True) == "1 to 2"
    assert words.range_text(2, 5) == "> 2 to 5"
    assert words.range_text(5, math.inf) == "> 5"
    risk = RiskGroups("ViT", "a", (10.0, 25.0), ("low", "moderate", "high"), ((1, 0, 0),) * 3, 3, 1, None)
    assert words.groups_in_words(risk) == [
        "low (up to 10 mm³)",
        "moderate (above 10 and up to 25 mm³)",
        "high (above 25 mm³)",
    ]
    assert words.correct_in_words(risk) == "1 of 3 correct (33%)"


def test_verdicts_say_who_is_better_and_no_more_than_that():
    test = PairedTest("A", "B", "a", "dice", 0.6, 0.7, 0.1, 9, 9, 0.004, 0.012, 1)
    assert words.verdict(test) == "B is better"
    assert words.verdict(replace(test, measure="hd95_mm")) == "A is better"  # lower is better
    assert words.better_and_worse(replace(test, measure="hd95_mm")) == ("A", "B")
    assert words.better_and_worse(replace(test, p_holm=0.06)) is None
    assert words.verdict(replace(test, measure="difference_mm3")) == "They differ"
    assert words.verdict(replace(test, p_holm=0.06)) == "Not significant"
    assert words.significant(replace(test, p_holm=0.0496))
    assert [words.p_text(p) for p in (0.0494, 0.0496, 0.05, 0.0504)] == ["0.049", "< 0.05", "0.050", "0.050"]
    assert words.verdict(replace(test, p=None, p_holm=None)) == "Equal in every case"
    assert words.verdict(replace(test, p=None, p_holm=None, n=0)) == "No case to compare"


def test_no_model_is_better_where_mean_and_ranks_disagree():
    """Of 15 cases, B is better in 14, and fails in one: the test speaks for B, the mean for A."""
    errors = {"A": [10.0 + case for case in range(15)], "B": [9.5 + 0.9 * case for case in range(14)] + [500.0]}
    rows = [
        {"model": model, "case": f"c{case}", "label": "a", "absolute_difference_mm3": error}
        for model, values in errors.items()
        for case, error in enumerate(values)
    ]
    (test,) = paired_tests(Measurements(pd.DataFrame(rows), ["A", "B"], ["a"]), "absolute_difference_mm3")
    assert test.difference > 0 > test.direction
    assert test.p_holm is not None
    assert test.p_holm < words.SIGNIFICANT
    assert words.better_and_worse(test) is None
    assert words.verdict(test) == "They differ, but mean and ranks disagree"
    evaluation = Evaluation(("A", "B"), ("a",), pd.DataFrame(rows), (), (test,), (), (), (), EvaluationOptions())
    said = [sentence for sentence in words.highlights(evaluation, "a") if "A and B differ" in sentence]
    assert len(said) == 1
    assert "no difference" not in " ".join(words.highlights(evaluation, "a"))


def test_names_are_listed_as_in_a_sentence():
    assert [words.join_names("ABC"[:n]) for n in (1, 2, 3)] == ["A", "A and B", "A, B and C"]


def test_best_is_bold_where_there_is_a_better():
    rows = {row["measure"].column: row for row in headline_table(evaluation_of(), LABELS[0])}
    assert len(rows) == len(MEASURES)
    assert [cell.best for cell in rows["dice"]["cells"]].count(True) == 1
    assert not any(cell.best for cell in rows["difference_mm3"]["cells"])
    assert (rows["dice"]["cases"], rows["dice"]["left_out"]) == (11, 1)
    alone = headline_table(evaluation_of(models=("ViT",)), LABELS[0])
    assert not any(cell.best for row in alone for cell in row["cells"])


def test_cells_say_their_own_number_of_cases_where_models_differ():
    evaluation = evaluation_of()
    means = [replace(m, n=9, left_out=3) if m.model == "ViT" else m for m in evaluation.means]
    row = headline_table(replace(evaluation, means=tuple(means)), LABELS[0])[0]
    assert (row["cases"], row["cells"][0].cases, row["cells"][1].cases) == (
        "",
        "n = 9, 3 left out",
        "n = 11, 1 left out",
    )


def test_tests_are_grouped_by_measure():
    groups = comparison_table(evaluation_of(), LABELS[0])
    assert [group["title"] for group in groups] == [
        "Dice",
        "95th percentile Hausdorff distance",
        "Surface Dice",
    ]
    assert [len(group["rows"]) for group in groups] == [3, 3, 3]
    assert groups[0]["rows"][0]["significant"]


# ---------- figures


def drawn(evaluation: Evaluation, label: str) -> dict:
    drawn = {
        name: getattr(figures, f"{name}_figure")(evaluation, label) for name in ("measures", "scatter", "risk", "bins")
    }
    return drawn | {"bland_altman": bland_altman_figure(evaluation.volumes_of(label))}


def texts(figure) -> list[str]:
    """What is written in a figure: text artists, titles, and labels of axes and ticks."""
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_models_have_a_colour_and_a_marker_each():
    styles = drawing.model_styles(tuple(map(str, range(50))))
    assert len(set(styles.values())) == 50
    assert all(sum(a != b for a, b in zip(vars(x).values(), vars(y).values(), strict=True)) == 2
               for x, y in itertools.combinations(list(styles.values())[:7], 2))  # fmt: skip


def test_agreement_is_labelled_in_mm3():
    evaluation = evaluation_of()
    figure = bland_altman_figure(evaluation.volumes_of(LABELS[0]))
    entry = evaluation.agreements[0]
    upper, bias, lower = words.format_values("difference_mm3", entry.upper, entry.bias, entry.lower)
    assert {f"+1.96 SD\n{upper}", f"bias\n{bias}", f"{words.MINUS}1.96 SD\n{lower}"} <= set(texts(figure))
    panels = figure.axes
    for axes, (reference, predicted) in zip(panels, evaluation.volumes_of(LABELS[0]).values(), strict=True):
        points = axes.collections[0].get_offsets()
        assert np.allclose(points, np.stack([(reference + predicted) / 2, predicted - reference], axis=1))
    assert len({axes.get_ylim() for axes in panels}) == len({axes.get_xlim() for axes in panels}) == 1


def test_labels_of_close_lines_are_moved_apart():
    places = spread_apart([1.0, 0.5, 0.0], 10, (-50, 50))
    assert places == [10.5, 0.5, -9.5]
    assert spread_apart([1.0, 0.5, 0.0], 10, (0, 50)) == [20.0, 10.0, 0.0]
    assert spread_apart([90, 0, -90], 10, (-99, 99)) == [90, 0, -90]


@pytest.mark.parametrize(("models", "number"), [(("ViT",), 1), (("ViT",), 12), (("a", "b"), 2), (tuple("abcdefg"), 6)])
def test_any_number_of_models_and_cases(models, number):
    """Warnings are errors here: no logarithm of zero, no layout that fails."""
    evaluation = evaluation_of(models, ("infarct",), number)
    if number == 1:
        evaluation = replace(evaluation, bins=())
        assert figures.measures_figure(evaluation, "infarct")
        assert bland_altman_figure(evaluation.volumes_of("infarct"))
        assert figures.scatter_figure(evaluation, "infarct")
    else:
        assert drawn(evaluation, "infarct")


def test_settings_of_matplotlib_stay_as_they_were(tmp_path):
    from matplotlib import rcParams

    before = dict(rcParams)
    drawing.save_figure(figures.measures_figure(evaluation_of(), LABELS[0]), tmp_path / "a.svg")
    assert dict(rcParams) == before


def test_text_is_large_enough_to_read():
    for figure in drawn(evaluation_of(), LABELS[0]).values():
        sizes = [text.get_fontsize() for text in figure.findobj(lambda artist: hasattr(artist, "get_fontsize"))]
        assert min(sizes) >= 8


# ---------- overlays


def test_worst_median_and_best_by_dice():
    evaluation = evaluation_of()
    chosen = overlays.choose_examples(evaluation, LABELS[1])
    assert [[example.rank for example in row] for row in chosen] == [["worst", "median", "best"]] * 3
    own = evaluation.rows_of(LABELS[1], "ViT")["dice"].dropna()
    assert [example.dice for example in chosen[0]] == pytest.approx([own.min(), own.median(), own.max()])
    assert overlays.choose_examples(evaluation_of(number=1), LABELS[1]) == []  # it has no Dice
    assert [e.rank for e in overlays.choose_examples(evaluation_of(number=2), LABELS[1])[0]] == ["only case"]


def test_an_outline_follows_the_sides_of_voxels():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    sides = overlays.outline(mask, (2.0, 0.5))
    found = {tuple(sorted(map(tuple, side.tolist()))) for side in sides}
    assert found == {
        ((1.0, 2.0), (1.5, 2.0)),
        ((1.0, 4.0), (1.5, 4.0)),
        ((1.0, 2.0), (1.0, 4.0)),
        ((1.5, 2.0), (1.5, 4.0)),
    }
    assert len(overlays.outline(np.ones((2, 3), bool), (1, 1))) == 10  # at the border of the image too
    assert len(overlays.outline(np.zeros((2, 3), bool), (1, 1))) == 0


def test_the_slice_with_most_of_both_and_the_values_of_a_region(example):
    chosen = overlays.ExampleCase("nnU-Net", LABELS[1], "best", "case_3", 0.9)
    entry = overlays.read_example(chosen, example.evaluation_set)
    assert entry.spacing == pytest.approx((0.6, 0.5))
    assert entry.reference.sum() == 7 * 9 + 3 * 4  # slice 2 has both parts
    assert entry.image is not None
    assert entry.window[0] < 0 < 100 < entry.window[1]
    assert overlays.read_example(chosen, example.with_images(None)).image is None


def test_axial_slices_are_shown_in_radiological_view():
    array = np.zeros(SHAPE, np.uint8)
    array[2, 3, 4] = 1
    # right to left and front to back: both are turned
    geometry = Geometry(SHAPE[::-1], (0.5, 0.6, 3.0), (0, 0, 0), (-1, 0, 0, 0, -1, 0, 0, 0, 1))
    turned, spacing = overlays.radiological_view(array, geometry)
    assert np.argwhere(turned).tolist() == [[2, SHAPE[1] - 1 - 3, SHAPE[2] - 1 - 4]]
    assert spacing == (3.0, 0.6, 0.5)
    # rows along y: the axes are exchanged
    turned, spacing = overlays.radiological_view(array, replace(geometry, direction=(0, 1, 0, 1, 0, 0, 0, 0, 1)))
    assert np.argwhere(turned).tolist() == [[2, 4, 3]]
    assert spacing == (3.0, 0.5, 0.6)
    # sagittal slices stay
    same, spacing = overlays.radiological_view(array, replace(geometry, direction=(0, 0, 1, 1, 0, 0, 0, 1, 0)))
    assert (same == array).all()
    assert spacing == (3.0, 0.6, 0.5)


def test_images_that_do_not_fit_are_refused(example, tmp_path):
    images = tmp_path / "imagesTs"
    for case in range(12):
        write_volume(images / f"case_{case}_0000.nii.gz", np.zeros((2, 3, 4), np.float32))
    with pytest.raises(UserError, match=r"they differ in size \(4 3 2 and 24 20 6 voxels\)"):
        write_report(example.evaluation, example.with_images(images), {}, tmp_path / "report")
    assert not (tmp_path / "report").exists()


# ---------- calibration


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be an object"),
        ('{"thresholds": {"a": "high"}}', "thresholds.a is 'high'"),
        ('{"thresholds": {"a": 0.5}, "before": {"a": 3}}', "before.a is 3"),
        ('{"thresholds": {"a": 0.5}, "shifts": {"a": "far"}}', "shifts.a is 'far'"),
    ],
)
def test_calibrations_that_are_none(text, reason, tmp_path):
    (tmp_path / "calibration.json").write_text(text)
    for path in (tmp_path, tmp_path / "calibration.json"):
        with pytest.raises(UserError, match=reason):
            read_calibration(path)


def test_a_missing_calibration(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        read_calibration(tmp_path)


# ---------- the cases to look at first


def written_table(file: Path, rows: list[dict]) -> Path:
    write_records(rows, ["case", "label", "volume_mm3", "volume_low_mm3", "volume_high_mm3", "expected_dice"], file)
    return file


def test_the_cases_to_look_at_first(example, tmp_path):
    evaluation = evaluation_of()
    own = evaluation.rows_of(LABELS[0], MODELS[0]).to_dict("records")
    table = [
        {
            "case": row["case"],
            "label": LABELS[0],
            "volume_low_mm3": 0.9 * row["reference_mm3"] if number % 4 else row["reference_mm3"] + 1,
            "volume_high_mm3": 1.1 * row["reference_mm3"] + 2,
            "expected_dice": "" if number == 0 else 1 - number / 20,
        }
        for number, row in enumerate(own)
    ]
    expected = read_expected(written_table(tmp_path / "volumes.csv", table))
    evaluation = with_expected(evaluation, {MODELS[0]: expected})
    cases, notes = evaluation.cases, evaluation.notes
    assert not any("--uncertainty" in note for note in notes)
    fewer = {key: row for key, row in expected.items() if key[0] != "case_1"}
    assert with_expected(evaluation, {MODELS[0]: fewer}).notes[len(notes) :] == (
        f"{MODELS[0]}: the table of --uncertainty lacks case_1.",
    )
    (review,) = review_tables(evaluation, LABELS[0])
    assert review["model"] == MODELS[0]
    assert [row["case"] for row in review["rows"]] == [f"case_{number}" for number in range(11, 1, -1)]
    assert review["rows"][0]["expected"] == "0.450"
    assert "9 of 12 reference volumes (75%) lie in their intervals." in review["sentences"]
    known = cases[(cases["model"] == MODELS[0]) & (cases["label"] == LABELS[0])][["expected_dice", "dice"]].dropna()
    correlation = known.corr(method="spearman").iloc[0, 1]
    assert f"rank correlation {words.rounded(correlation, 2)}" in review["sentences"][0]
    assert review_tables(evaluation, LABELS[1]) == review_tables(evaluation_of(), LABELS[0]) == []
    page = write_report(evaluation, example.evaluation_set, {}, tmp_path / "report")[0].read_text()
    assert "Look at these first" in page
    assert page.count('<th class="text" scope="row">case_11</th>') == 1


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"case": "case_1", "label": "x", "expected_dice": "high"}], "is not a table of mae3d_quantify --uncertainty"),
        ([{"case": "elsewhere", "label": LABELS[0]}], "has none of the evaluated cases and labels"),
    ],
)
def test_tables_that_expect_nothing(rows, reason, tmp_path):
    file = written_table(tmp_path / "volumes.csv", rows)
    with pytest.raises(UserError, match=reason):
        with_expected(evaluation_of(), {MODELS[0]: read_expected(file)})
    with pytest.raises(UserError, match="is missing"):
        read_expected(tmp_path / "other.csv")


# ---------- the page as text


def test_every_figure_as_png_and_svg(page):
    folder = page.parent / "figures"
    stems = {f"{name}_{number}_{slug(label)}" for name in NAMES for number, label in enumerate(LABELS, start=1)}
    assert {file.name for file in folder.iterdir()} == {f"{stem}.{end}" for stem in stems for end in ("png", "svg")}
    for file in folder.iterdir():
        start = file.read_bytes()[:60]
        assert start.startswith(b"\x89PNG") if file.suffix == ".png" else b"<?xml" in start


def test_names_are_text_not_code(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $x_1$" in text
    assert "calcification &amp; bone" in text


def test_the_page_says_it_all(page):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.read_text(encoding="utf-8")))
    for words_in_it in (
        "Notes on these results",
        "Equal in every case",
        "Not significant",
        "One group off",
        "fitted on 7 cases",
        "0.183",
        "nnU-Net: a self-configuring method",
        "Masked autoencoders are scalable vision learners",
        "arXiv:2507.01744",
        "arXiv:2501.09096",
        "0.1.0",
    ):
        assert words_in_it in text
    assert "nan" not in re.findall(r"\w+", text.lower())
    assert "None" not in text


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    targets = {source[1:] for source in sources if source.startswith("#")}
    ids = re.findall(r'id="([^"]+)"', text)
    assert targets <= set(ids)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]+)"', text)) <= set(ids)
    assert "url(" not in text
    assert "@import" not in text


def test_the_same_evaluation_gives_the_same_files(example, tmp_path):
    """One model and label are enough."""
    evaluation = evaluation_of(MODELS[:1], LABELS[:1], number=6)
    folders = [tmp_path / "first", tmp_path / "second"]
    first, second = (write_report(evaluation, example.evaluation_set, {}, folder) for folder in folders)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


@pytest.mark.parametrize("number", [1, 2])
def test_one_model_and_a_case_or_two(example, number, tmp_path):
    evaluation = evaluation_of(MODELS[:1], LABELS[1:], number)
    page, *files = write_report(evaluation, example.with_images(None), {}, tmp_path / "report")
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    assert f"in {number} case{'s' if number > 1 else ''}" in text
    assert 'id="calibration"' not in text
    assert ('id="risk"' in text) == (number > 1)
    assert tmp_path / "report/figures/measures.svg" in files
    assert ("so there are no examples" in text) == (number == 1)  # it has no Dice
    assert ("Without an image: all" in text) == (number == 2)


# ---------- the page in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium or no chromedriver on PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def set_width(browser, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def test_the_page_in_a_browser(browser, page):
    for width in (1280, 400):
        set_width(browser, width)
        browser.get(page.as_uri())
        assert browser.execute_script("return window.innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.title == f"Evaluation: {', '.join(MODELS)}"
    assert browser.execute_script("return document.documentElement.lang") == "en"
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt, i.getBoundingClientRect().width])"
    )
    assert len(images) == len(NAMES) * len(LABELS) + 1  # and one of the calibration
    assert all(complete and width > 0 and alt and shown > 0 for complete, width, alt, shown in images)
    drawings = "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
    assert all(width > 0 for width in browser.execute_script(drawings))
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.execute_script("return document.scripts.length") == 0
    assert browser.get_log("browser") == []


def test_the_console_would_tell(browser, tmp_path):
    """The test above can fail: a picture that is not there is in the log."""
    broken = tmp_path / "broken.html"
    broken.write_text('<img src="nothing.png" alt="">')
    browser.get(broken.as_uri())
    assert browser.get_log("browser")


def test_the_page_on_paper(browser, page):
    browser.get(page.as_uri())
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    paper = base64.b64decode(browser.print_page())
    assert paper.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", paper))
    assert 1 < pages < 40
