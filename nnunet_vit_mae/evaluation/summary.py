"""From the table of cases to everything that is said of them: means, tests, agreement, risk groups, bins, notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import nnunet_vit_mae
from nnunet_vit_mae.evaluation import clinical
from nnunet_vit_mae.evaluation.clinical import Rows
from nnunet_vit_mae.evaluation.results import MEASURES, Agreement, Bin, Evaluation, Mean, Options, PairedTest, Risk
from nnunet_vit_mae.files import replacing, write_json
from nnunet_vit_mae.statistics import compare, holm, mean_interval

REPORTED_PACKAGES = ("monai", "numpy", "pandas", "scikit-learn", "scipy", "SimpleITK", "statsmodels")
FEW = 5  # pairs: whatever they are, p cannot get below 0.05
LIMIT_SDS = 1.96  # standard deviations: 95% of a normal distribution lie within
BINNED = (("dice", "slice_thickness_mm"), ("relative_difference", "reference_mm3"))
GROUPS = {"reference_group": "reference_mm3", "predicted_group": "predicted_mm3"}


def evaluate(
    cases: pd.DataFrame, models: Sequence[str], labels: Sequence[str], options: Options, notes: Sequence[str] = ()
) -> Evaluation:
    """Sum up a row for each model, case and label, ordered so; the table gets columns of the risk groups."""
    table = Measurements(cases, models, labels)
    risks, groups, about_risks = _risks(table, options)
    binned, about_bins = _bins(table, options)
    columns = {
        column: [groups[label](volume) for volume, label in zip(cases[quantity], cases["label"], strict=True)]
        for column, quantity in GROUPS.items()
    }
    return Evaluation(
        models=tuple(models),
        labels=tuple(labels),
        cases=cases.assign(**columns),
        means=tuple(_mean(*key, measure.column, rows, options) for key, rows in table.items() for measure in MEASURES),
        tests=tuple(test for measure in MEASURES for test in paired_tests(table, measure.column)),
        agreements=tuple(agreement(*key, rows["difference_mm3"]) for key, rows in table.items()),
        risks=tuple(risks),
        bins=tuple(binned),
        settings=asdict(options),
        versions={"nnunet-vit-mae": nnunet_vit_mae.__version__, **{name: version(name) for name in REPORTED_PACKAGES}},
        notes=(*notes, *_undefined(table), *about_risks, *about_bins),
    )


class Measurements:
    """The columns of each model and label, as arrays over the cases, which are the same for all."""

    def __init__(self, cases: pd.DataFrame, models: Sequence[str], labels: Sequence[str]):
        self.models, self.labels = models, labels
        self._rows: dict[tuple[str, str], Rows] = {}
        for model in models:
            for label in labels:
                own: Any = cases[(cases["model"] == model) & (cases["label"] == label)]
                self._rows[model, label] = {str(column): own[column].to_numpy() for column in own}

    def of(self, label: str, model: str | None = None) -> Rows:
        """Without a model the first one: for columns of the references, which are the same in all."""
        return self._rows[model or self.models[0], label]

    def items(self) -> Iterable[tuple[tuple[str, str], Rows]]:
        return self._rows.items()


def paired_tests(table: Measurements, measure: str) -> list[PairedTest]:
    """Every two models on the cases in which both have a value, with Holm's correction over all of these tests."""
    tests = []
    for label in table.labels:
        for first, second in combinations(table.models, 2):
            pairs = np.stack([table.of(label, model)[measure] for model in (first, second)])
            found = compare(*pairs[:, np.isfinite(pairs).all(axis=0)].tolist())
            numbers = (found.first, found.second, found.difference, found.n, found.changed, found.p)
            tests.append(PairedTest(first, second, label, measure, *numbers, p_holm=None))
    corrected = holm([test.p for test in tests])
    return [replace(test, p_holm=p) for test, p in zip(tests, corrected, strict=True)]


def agreement(model: str, label: str, differences: np.ndarray) -> Agreement:
    """Bland-Altman: predicted minus annotated volumes in mm3; the limits are NaN for a single case."""
    bias = float(differences.mean())
    spread = LIMIT_SDS * float(differences.std(ddof=1)) if len(differences) > 1 else math.nan
    return Agreement(model, label, len(differences), bias, bias - spread, bias + spread)


def write_tables(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `cases.csv` and `summary.json`; what has no value is empty in the one and null in the other."""
    table, summary = folder / "cases.csv", folder / "summary.json"
    with replacing(table) as temporary:
        evaluation.cases.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n")
    content = {
        "models": evaluation.models,
        "labels": evaluation.labels,
        "cases": len(set(evaluation.cases["case"])),
        "settings": evaluation.settings,
        "versions": evaluation.versions,
        "notes": evaluation.notes,
        **{
            name: [asdict(entry) for entry in getattr(evaluation, name)]
            for name in ("means", "tests", "agreements", "risks", "bins")
        },
    }
    write_json(_without_nan(content), summary)
    return [table, summary]


def _mean(model: str, label: str, measure: str, rows: Rows, options: Options) -> Mean:
    values = rows[measure]
    known = values[np.isfinite(values)].astype(float)
    chosen = {"resamples": options.resamples, "confidence": options.confidence, "seed": options.seed}
    low, high = mean_interval(known.tolist(), **chosen)
    mean = float(known.mean()) if len(known) else math.nan
    return Mean(model, label, measure, mean, low, high, n=len(known), left_out=len(values) - len(known))


def _risks(
    table: Measurements, options: Options
) -> tuple[list[Risk], dict[str, Callable[[float], str | None]], list[str]]:
    """Risk groups of each model and label, the name of a volume's group by label, and notes."""
    risks, groups, notes = [], {}, []
    for label in table.labels:
        cutoffs, reasons = clinical.find_cutoffs(table.of(label)["reference_mm3"], options.cutoffs_mm3)
        notes += [f"{label}: {reason}" for reason in reasons]
        names = clinical.group_names(cutoffs, options.cutoffs_mm3 is not None)
        groups[label] = partial(_group, cutoffs=cutoffs, names=names)
        if cutoffs:
            risks += [clinical.risk(table.of(label, model), model, label, cutoffs, names) for model in table.models]
    return risks, groups, notes


def _group(volume: float, cutoffs: tuple[float, ...], names: tuple[str, ...]) -> str | None:
    return names[int(clinical.group_of(np.array(volume), cutoffs))] if cutoffs else None


def _bins(table: Measurements, options: Options) -> tuple[list[Bin], list[str]]:
    """Each measure by its quantity; the edges are those of the cases, the same for all models."""
    found = []
    for label in table.labels:
        thickness, volumes = (table.of(label)[quantity] for quantity in ("slice_thickness_mm", "reference_mm3"))
        edges = {
            "slice_thickness_mm": clinical.edges_of(thickness, options.thickness_bins_mm),
            "reference_mm3": clinical.edges_of(volumes[volumes > 0]),  # no difference is relative to nothing
        }
        for model in table.models:
            for measure, quantity in BINNED:
                found += clinical.bins(table.of(label, model), model, label, measure, quantity, edges[quantity])
    thickness = table.of(table.labels[0])["slice_thickness_mm"]
    if len(thickness) > 1 and np.ptp(thickness) == 0:
        return found, [f"All cases have a slice thickness of {thickness[0]:g} mm: nothing is said of other ones."]
    return found, []


def _undefined(table: Measurements) -> Iterator[str]:
    """Which means leave out cases, and what an empty mask counts in the others."""
    for label in table.labels:
        empty = table.of(label)["reference_voxels"] == 0
        if empty.any():
            yield (
                f"{label}: the reference is empty in {_of(empty)}: recall, relative volume difference, surface "
                "distances and the share of lesions found leave them out; Dice and precision are 0 there where "
                "anything is predicted, and leave out what is rightly empty."
            )
        for model in table.models:
            missed = ~empty & (table.of(label, model)["predicted_voxels"] == 0)
            if missed.any():
                yield (
                    f"{label}: {model} predicts nothing in {_of(missed)} although there is something: Dice is 0 there, "
                    "but precision and surface distances leave them out, so that their means look better than they are."
                )
    cases = len(table.of(table.labels[0])["case"])
    if cases == 1:
        yield "There is one case only: no intervals, and no limits of agreement."
    if len(table.models) > 1 and cases <= FEW:
        yield f"So few cases ({cases}) cannot give a p below {2.0 ** (1 - cases):g}."


def _of(chosen: np.ndarray) -> str:
    return f"{int(chosen.sum())} of {len(chosen)} cases"


def _without_nan(content: Any) -> Any:
    """JSON has no word for NaN."""
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, (float, np.floating)) and not math.isfinite(content) else content
