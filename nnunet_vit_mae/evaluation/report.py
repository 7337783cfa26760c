"""The report of an evaluation: figures as PNG and SVG, and one page that holds all of them and needs nothing else."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation import figures, words
from nnunet_vit_mae.evaluation.overlays import ExampleSlice, choose_examples, cut, labels_of, overlays_figure
from nnunet_vit_mae.evaluation.results import MEASURES, Evaluation, PairedTest, Risk
from nnunet_vit_mae.files import read_json, replacing

CURVES = {  # patterns: with several labels there is a plot of agreement for each
    "calibration_curve.png": "Volume difference and Dice on the cases of the calibration for each threshold.",
    "calibration_bland_altman*.png": "Agreement of volumes on the cases of the calibration, before and after.",
}
MIME = {".png": "image/png", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Picture:
    """A figure in the page: `source` is the file itself, as a data URI."""

    number: int
    source: str
    caption: str
    alt: str
    inches: float  # wide


@dataclass(frozen=True)
class Cell:
    """A mean in the headline table."""

    mean: str
    interval: str
    cases: str
    best: bool


def write_report(
    evaluation: Evaluation,
    output: Path,
    *,
    references: Path,
    predictions: Mapping[str, Path],
    images: Path | None,
    calibrations: Mapping[str, Path],
) -> list[Path]:
    """Write `index.html` and `figures/` into a folder and give their paths.

    `predictions` and `calibrations` are by model; a calibration is its JSON file or the folder that holds it. Raises
    `UserError` for a calibration or an image that cannot be read, before anything is written.
    """
    calibrated = {name: read_calibration(path) for name, path in calibrations.items()}
    slices = read_slices(evaluation, references, predictions, images)
    gallery = Gallery(evaluation, output / "figures")
    labels = [_label_context(evaluation, label, slices[label], gallery) for label in evaluation.labels]
    context = {
        "evaluation": evaluation,
        "labels": labels,
        "calibrations": [_calibration_context(name, found, gallery) for name, found in calibrated.items()],
        "cases": evaluation.cases["case"].nunique(),
        "confidence": _confidence(evaluation),
        "settings": {name: _setting(value) for name, value in evaluation.settings.items()},
        "significant": words.SIGNIFICANT,
    }
    page = output / "index.html"
    with replacing(page) as temporary:
        temporary.write_text(_environment().get_template("report.html.j2").render(context), encoding="utf-8")
    return [page, *gallery.written]


def read_slices(
    evaluation: Evaluation, references: Path, predictions: Mapping[str, Path], images: Path | None
) -> dict[str, list[list[ExampleSlice]]]:
    """The examples of each label, a row for each model that has some."""
    labels = labels_of(evaluation.labels, references, predictions)
    return {
        label: [
            [cut(example, labels, references, predictions, images) for example in row]
            for row in choose_examples(evaluation, label)
        ]
        for label in evaluation.labels
    }


# ---------- figures


@dataclass
class Gallery:
    """Writes figures, numbers them in the order of the page and remembers their files."""

    evaluation: Evaluation
    folder: Path
    written: list[Path] = field(default_factory=list)
    numbers: count = field(default_factory=lambda: count(1))

    def draw(self, figure: Figure, name: str, label: str, caption: str, alt: str, suffix: str = ".svg") -> Picture:
        """Save a figure and embed one of its files."""
        labels = self.evaluation.labels
        # a number, for two labels may differ only in what a file name cannot hold
        stem = name if len(labels) == 1 else f"{name}_{labels.index(label) + 1}_{slug(label)}"
        files = figures.save_both(figure, self.folder / stem)
        self.written += files
        return self.embed(next(file for file in files if file.suffix == suffix), caption, alt, figure.get_figwidth())

    def embed(self, file: Path, caption: str, alt: str, inches: float = figures.WIDTH) -> Picture:
        """Take a file into the page."""
        data = base64.b64encode(file.read_bytes()).decode()
        return Picture(next(self.numbers), f"data:{MIME[file.suffix]};base64,{data}", caption, alt, inches)


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^\w-]+", "_", name).strip("_")[:40] or "label"


def _label_context(
    evaluation: Evaluation, label: str, slices: list[list[ExampleSlice]], gallery: Gallery
) -> dict[str, Any]:
    risks = [entry for entry in evaluation.risks if entry.label == label]

    def draw(function: Callable[[Evaluation, str], Figure], name: str, caption: str, alt: str) -> Picture:
        return gallery.draw(function(evaluation, label), name, label, caption, f"{alt} of {label}.")

    # in the order of the page, for this is where they get their numbers
    measures = draw(
        figures.measures_figure,
        "measures",
        "Dice and absolute volume difference of every case. A point is a case, and lines join the same case in "
        f"neighbouring models. {BOXES}",
        "Box plots of Dice and absolute volume difference for each model",
    )
    scatter = draw(
        figures.scatter_figure,
        "volumes",
        "Predicted against annotated volume. On the line they are equal; a point below it is a volume predicted too "
        "small." + (" Dotted lines are cut-offs of risk groups: in a grey square both are in the same." * bool(risks)),
        "Predicted against annotated volumes",
    )
    bland_altman = draw(
        figures.bland_altman_figure,
        "bland_altman",
        "Bland-Altman plots: predicted minus annotated volume over the mean of both. Solid line: bias; dashed lines: "
        "95% limits of agreement (bias ± 1.96 standard deviations); all in mm³ and on the same axes.",
        "Bland-Altman plots ("
        + "; ".join(
            f"{entry.model}: {words.agreement_in_words(entry)}"
            for entry in evaluation.agreements
            if entry.label == label
        )
        + ")",
    )
    risk = risks and draw(
        figures.risk_figure,
        "risk_groups",
        "Number of cases by the group of their annotated volume (rows) and of their predicted volume (columns). On the "
        "diagonal they agree. The darker, the larger a cell's share of its row.",
        "Confusion matrices of risk groups (" + "; ".join(f"{e.model}: {words.correct(e)}" for e in risks) + ")",
    )
    bins = figures.bin_pairs(evaluation, label) and draw(
        figures.bins_figure,
        "bins",
        f"Where the models do well and where they do not. n: cases with a value. {BOXES}",
        "Box plots of " + " and ".join(_by(pair) for pair in figures.bin_pairs(evaluation, label)),
    )
    overlays = slices and gallery.draw(
        overlays_figure(slices), "examples", label, *_overlay_words(label, slices), ".png"
    )
    return {
        "name": label,
        "highlights": words.highlights(evaluation, label, _confidence(evaluation)),
        "headline": headline_table(evaluation, label),
        "tests": comparisons(evaluation, label),
        "agreements": agreements(evaluation, label),
        "risks": [_risk_row(entry) for entry in risks],
        "groups": words.groups_in_words(risks[0]) if risks else [],
        "bins": [bin_table(evaluation, label, *pair) for pair in figures.bin_pairs(evaluation, label)],
        "pictures": {"measures": measures, "scatter": scatter, "bland_altman": bland_altman}
        | {"risk": risk, "bins": bins, "overlays": overlays},
    }


BOXES = (
    "Boxes: quartiles and median (line), diamonds: mean, whiskers: the furthest case within 1.5 box heights; groups of "
    "fewer than five cases have points only."
)


def _by(pair: tuple[str, str]) -> str:
    return f"{words.TITLES.get(pair[0], pair[0])} by {words.TITLES.get(pair[1], pair[1]).lower()}"


def _overlay_words(label: str, slices: Iterable[Iterable[ExampleSlice]]) -> tuple[str, str]:
    every = [entry for row in slices for entry in row]
    shown = [f"{e.example.model}, {e.example.rank} ({e.example.case}, Dice {e.example.dice:.2f})" for e in every]
    caption = (
        "The cases with the lowest, the middle and the highest Dice of each model, in the slice with most annotated or "
        "predicted voxels. Green, wide: annotated; red, thin: predicted; both where they agree. "
    )
    if missing := sorted({entry.example.case for entry in every if entry.image is None}):
        every_one = len(missing) == len({entry.example.case for entry in every})
        caption += f"Without an image: {'all' if every_one else ', '.join(missing)}; there, light grey is annotated."
    else:
        caption += "Axial slices are turned by their files' orientation: the patient's right is on the left."
    return caption, f"Outlines of {label} over image slices: {'; '.join(shown)}."


# ---------- tables


def headline_table(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """A row for each measure, a cell for each model; the number of cases on its own when it is the same for all."""
    rows = []
    for measure in MEASURES:
        found = [m for m in evaluation.means if (m.label, m.measure) == (label, measure.column)]
        if not found:
            continue
        best = words.best_of(found, measure)
        numbers = words.number(measure.column, *(value for m in found for value in (m.mean, m.low, m.high)))
        alike = len({(m.n, m.left_out) for m in found}) == 1
        cells = {
            mean.model: Cell(
                mean=numbers[3 * place],
                interval="" if math.isnan(mean.low) else " to ".join(numbers[3 * place + 1 : 3 * place + 3]),
                cases="" if alike else f"n = {mean.n}" + (f", {mean.left_out} left out" if mean.left_out else ""),
                best=mean.model in best,
            )
            for place, mean in enumerate(found)
        }
        ordered = [cells.get(model) for model in evaluation.models]
        cases, left_out = (found[0].n, found[0].left_out) if alike else ("", 0)
        rows.append({"measure": measure, "cells": ordered, "cases": cases, "left_out": left_out})
    return rows


def comparisons(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """The paired tests of each measure."""
    own = [test for test in evaluation.tests if test.label == label]
    groups = []
    for column in dict.fromkeys(test.measure for test in own):
        found = [test for test in own if test.measure == column]
        means = words.number(column, *(value for test in found for value in (test.first_mean, test.second_mean)))
        differences = words.number(column, *(test.difference for test in found), sign=True)
        rows = [
            _test_row(test, (means[2 * place], means[2 * place + 1]), difference)
            for place, (test, difference) in enumerate(zip(found, differences, strict=True))
        ]
        groups.append({"title": words.TITLES.get(column, column), "unit": words.unit_of(column), "rows": rows})
    return groups


def _test_row(test: PairedTest, means: tuple[str, str], difference: str) -> dict[str, Any]:
    return {
        "pair": (test.first, test.second),
        "means": means,
        "difference": difference,
        "cases": f"{test.changed} of {test.n}",
        "p": words.p_value(test.p),
        "p_holm": words.p_value(test.p_holm),
        "verdict": words.verdict(test),
        "significant": words.significant(test),
    }


def agreements(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """Bias and limits of each model."""
    found = [entry for entry in evaluation.agreements if entry.label == label]
    values = words.number("difference_mm3", *(v for e in found for v in (e.bias, e.lower, e.upper)), sign=True)
    return [
        {"model": e.model, "n": e.n, "values": values[3 * i : 3 * i + 3], "words": words.agreement_in_words(e)}
        for i, e in enumerate(found)
    ]


def _risk_row(risk: Risk) -> dict[str, Any]:
    steps = [0, 0, 0]  # groups between: none, one, more
    for row, counts in enumerate(risk.confusion):
        for column, cases in enumerate(counts):
            steps[min(2, abs(row - column))] += cases
    shares = [f"{step} ({step / risk.n:.0%})" if risk.n else "0" for step in steps]
    kappa = words.NOTHING if risk.kappa is None else words.rounded(risk.kappa, 2)
    return {"model": risk.model, "n": risk.n, "steps": shares, "kappa": kappa}


def bin_table(evaluation: Evaluation, label: str, measure: str, quantity: str) -> dict[str, Any]:
    """A row for each bin with each model's median and mean."""
    found = [b for b in evaluation.bins if (b.label, b.measure, b.quantity) == (label, measure, quantity)]
    texts = iter(words.number(measure, *(value for entry in found for value in (entry.median, entry.mean))))
    cells = {(e.model, e.low, e.high): {"median": next(texts), "mean": next(texts), "n": e.n} for e in found}
    rows = [
        {
            "range": words.interval(*edges, first=not place),
            "cells": [cells.get((model, *edges)) for model in evaluation.models],
        }
        for place, edges in enumerate(sorted({(entry.low, entry.high) for entry in found}))
    ]
    return {"title": _by((measure, quantity)), "unit": words.unit_of(quantity), "rows": rows}


# ---------- calibration


@dataclass(frozen=True)
class CalibrationRecord:
    """What `mae3d_calibrate` wrote, and the pictures beside it."""

    content: Mapping[str, Any]
    folder: Path


def read_calibration(path: Path) -> CalibrationRecord:
    """Read `calibration.json`, given itself or by its folder; raises `UserError` when it is none."""
    file = path / "calibration.json" if path.is_dir() else path
    content = read_json(file)
    thresholds = content.get("thresholds") if isinstance(content, dict) else None
    if not isinstance(thresholds, dict) or not all(isinstance(value, int | float) for value in thresholds.values()):
        raise UserError(f"{file} is not a calibration: it has no thresholds by label; give what mae3d_calibrate wrote.")
    for when in ("before", "after"):
        found = content.get(when, {})
        if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
            raise UserError(f"{file} is not a calibration: what it has as {when!r} is not a table by label.")
    return CalibrationRecord(content, file.parent)


def _calibration_context(name: str, found: CalibrationRecord, gallery: Gallery) -> dict[str, Any]:
    content = found.content
    rows = []
    for label, threshold in content["thresholds"].items():
        before, after = (content.get(when, {}).get(label, {}) for when in ("before", "after"))
        cells = [
            words.number(column, *(_float(entry.get(column)) for entry in (before, after)))
            for column in ("absolute_difference_mm3", "dice")
        ]
        rows.append({"label": label, "threshold": f"{threshold:.3g}", "difference": cells[0], "dice": cells[1]})
    facts = {
        key: _setting(content[key])
        for key in ("trainer", "plans", "configuration", "folds", "checkpoint")
        if key in content
    }
    cases = content.get("cases", [])
    pictures = [
        gallery.embed(file, f"{name}: {caption}", f"{name}: {caption}")
        for pattern, caption in CURVES.items()
        for file in sorted(found.folder.glob(pattern))
    ]
    return {
        "name": name,
        "rows": rows,
        "facts": facts,
        "objective": content.get("objective"),
        "n": len({str(case.get("case")) for case in cases if isinstance(case, dict)}) if isinstance(cases, list) else 0,
        "versions": content.get("versions") if isinstance(content.get("versions"), dict) else {},
        "pictures": pictures,
    }


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


# ---------- the page


def _confidence(evaluation: Evaluation) -> str:
    return f"{100 * float(str(evaluation.settings.get('confidence', 0.95))):g}%"


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_setting, value))
    return "not given" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _environment() -> Environment:
    return Environment(  # names come from users, so everything is escaped
        loader=PackageLoader("nnunet_vit_mae.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
