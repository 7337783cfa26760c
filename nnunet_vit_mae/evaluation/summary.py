"""Summarise the measures of all cases: means, paired tests, agreement, risk groups, bins and notes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_vit_mae.evaluation import clinical
from nnunet_vit_mae.evaluation.cases import EvaluationSet, measure_cases
from nnunet_vit_mae.evaluation.clinical import Columns
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
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.statistics import FEW_PAIRS, compare, holm, limits_of_agreement, mean_interval, smallest_p
from nnunet_vit_mae.storage.csv_tables import write_frame
from nnunet_vit_mae.storage.files import write_json

REPORTED_PACKAGES = (
    "nnunet-vit-mae",
    "monai",
    "numpy",
    "pandas",
    "scikit-learn",
    "scipy",
    "SimpleITK",
    "statsmodels",
)
BINNED = (("dice", "slice_thickness_mm"), ("relative_difference", "reference_mm3"))  # measure and quantity
GROUP_COLUMNS = {"reference_group": "reference_mm3", "predicted_group": "predicted_mm3"}


def evaluate(
    evaluation_set: EvaluationSet, options: EvaluationOptions | None = None, processes: int | None = None
) -> Evaluation:
    """Measure all cases of all models, and summarise the measures; nothing is written.

    Args:
        evaluation_set: The files to compare; see `find_evaluation_set`.
        options: The user's choices; None: the defaults.
        processes: Number of processes; None: one for every 20 cases, up to 4.

    Returns:
        Measures by case, means, paired tests, agreement, risk groups and notes.

    Raises:
        UserError: If a file cannot be read, or does not fit the others.

    Example:
        >>> from nnunet_vit_mae import find_evaluation_set
        >>> from nnunet_vit_mae.phantoms.dataset import write_phantom_dataset
        >>> labels = write_phantom_dataset(Path("raw"), labelled=2, unlabelled=0, test=0) / "labelsTr"
        >>> evaluation = evaluate(find_evaluation_set(labels, {"perfect": labels}))
        >>> [(mean.label, mean.n, mean.mean) for mean in evaluation.means if mean.measure == "dice"]
        [('calcification', 2, 1.0)]
    """
    options = options or EvaluationOptions()
    # a process takes as long to start as several cases take to measure
    processes = processes or min(4, 1 + len(evaluation_set.cases) // 20)
    cases, notes = measure_cases(evaluation_set, options, processes)
    labels = list(evaluation_set.labels.values)
    return summarise(cases, evaluation_set.models, labels, options, [*evaluation_set.notes, *notes])


def summarise(
    cases: pd.DataFrame,
    models: Sequence[str],
    labels: Sequence[str],
    options: EvaluationOptions,
    notes: Sequence[str] = (),
) -> Evaluation:
    """Summarise the measures of all cases.

    Args:
        cases: A row for each model, case and label, in this order; see `measure_cases`.
        models: Names of the models.
        labels: Names of the labels.
        options: The user's choices.
        notes: Sentences for the reader that are known already.

    Returns:
        All results; their table of cases has columns of risk groups in addition.
    """
    measurements = Measurements(cases, models, labels)
    risks, groups, notes_on_risks = _risks(measurements, options)
    bins, notes_on_bins = _bins(measurements, options)
    group_columns = {
        column: [
            _group_name(volume, *groups[label]) for volume, label in zip(cases[quantity], cases["label"], strict=True)
        ]
        for column, quantity in GROUP_COLUMNS.items()
    }
    return Evaluation(
        models=tuple(models),
        labels=tuple(labels),
        cases=cases.assign(**group_columns),
        means=tuple(
            _mean(*key, measure.column, columns, options)
            for key, columns in measurements.items()
            for measure in MEASURES
        ),
        tests=tuple(test for measure in MEASURES for test in paired_tests(measurements, measure.column)),
        agreements=tuple(_agreement(*key, columns) for key, columns in measurements.items()),
        risks=tuple(risks),
        bins=tuple(bins),
        options=options,
        versions=package_versions(REPORTED_PACKAGES),
        notes=(
            *notes,
            *_notes_on_empty_masks(measurements),
            *_notes_on_few_cases(measurements),
            *notes_on_risks,
            *notes_on_bins,
        ),
    )


class Measurements:
    """The measures of all cases as columns of each model and label; the cases are the same in all of them."""

    def __init__(self, cases: pd.DataFrame, models: Sequence[str], labels: Sequence[str]):
        self.models, self.labels = models, labels
        self._columns: dict[tuple[str, str], Columns] = {}
        for model in models:
            for label in labels:
                rows: Any = cases[(cases["model"] == model) & (cases["label"] == label)]
                self._columns[model, label] = {str(column): rows[column].to_numpy() for column in rows}

    def columns(self, model: str, label: str) -> Columns:
        """Return the columns of one model and label."""
        return self._columns[model, label]

    def reference(self, label: str) -> Columns:
        """Return the columns of a label, for those that describe the reference and are the same for all models."""
        return self._columns[self.models[0], label]

    def items(self) -> Iterable[tuple[tuple[str, str], Columns]]:
        """Iterate over (model, label) and their columns."""
        return self._columns.items()


def paired_tests(measurements: Measurements, measure: str) -> list[PairedTest]:
    """Compare each two models on the cases in which both have a value, by patient if several cases are of one.

    Args:
        measurements: The measures of all cases.
        measure: The column to compare.

    Returns:
        A test for each label and pair of models; Holm's correction covers all of them.
    """
    tests = []
    for label in measurements.labels:
        for first, second in combinations(measurements.models, 2):
            columns = measurements.columns(first, label)
            pairs = np.stack([columns[measure], measurements.columns(second, label)[measure]])
            both = np.isfinite(pairs).all(axis=0)
            compared = compare(*pairs[:, both], groups=_patients(columns, both))
            tests.append(
                PairedTest(
                    first=first,
                    second=second,
                    label=label,
                    measure=measure,
                    first_mean=compared.first,
                    second_mean=compared.second,
                    difference=compared.difference,
                    n=compared.n,
                    changed=compared.changed,
                    p=compared.p,
                    p_holm=None,
                    direction=compared.direction,
                )
            )
    corrected = holm([test.p for test in tests])
    return [replace(test, p_holm=p) for test, p in zip(tests, corrected, strict=True)]


def write_tables(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write the results as tables.

    Args:
        evaluation: The results.
        folder: Where to write `cases.csv`, with empty cells for missing values, and `summary.json`, with null.

    Returns:
        The files written.
    """
    table, summary = folder / "cases.csv", folder / "summary.json"
    write_frame(evaluation.cases, table)
    content = {
        "models": evaluation.models,
        "labels": evaluation.labels,
        "cases": len(set(evaluation.cases["case"])),
        "settings": asdict(evaluation.options),
        "versions": evaluation.versions,
        "notes": evaluation.notes,
        **{
            name: [asdict(entry) for entry in getattr(evaluation, name)]
            for name in ("means", "tests", "agreements", "risks", "bins")
        },
    }
    write_json(_without_nan(content), summary)
    return [table, summary]


def _mean(model: str, label: str, measure: str, columns: Columns, options: EvaluationOptions) -> Mean:
    values = columns[measure]
    finite = np.isfinite(values)
    known = values[finite].astype(float)
    low, high = mean_interval(known, groups=_patients(columns, finite), **options.bootstrap)
    mean = float(known.mean()) if len(known) else math.nan
    return Mean(model, label, measure, mean, low, high, n=len(known), left_out=len(values) - len(known))


def _patients(columns: Columns, chosen: Any) -> np.ndarray | None:
    """Return the patients of the chosen cases (a mask); None if each case counts as a patient of its own."""
    return columns["patient"][chosen] if "patient" in columns else None


def _agreement(model: str, label: str, columns: Columns) -> Agreement:
    differences = columns["difference_mm3"]
    return Agreement(model, label, len(differences), *limits_of_agreement(differences))


def _risks(
    measurements: Measurements, options: EvaluationOptions
) -> tuple[list[RiskGroups], dict[str, tuple[tuple[float, ...], tuple[str, ...]]], list[str]]:
    """Return the risk groups of each model and label, cutoffs and names of the groups by label, and notes."""
    risks, groups, notes = [], {}, []
    for label in measurements.labels:
        cutoffs, reasons = clinical.find_cutoffs(measurements.reference(label)["reference_mm3"], options.cutoffs_mm3)
        notes += [f"{label}: {reason}" for reason in reasons]
        names = clinical.group_names(cutoffs, options.cutoffs_mm3 is not None)
        groups[label] = (cutoffs, names)
        if cutoffs:
            risks += [
                clinical.risk_groups(measurements.columns(model, label), model, label, cutoffs, names)
                for model in measurements.models
            ]
    return risks, groups, notes


def _group_name(volume: float, cutoffs: tuple[float, ...], names: tuple[str, ...]) -> str | None:
    return names[int(clinical.group_of(np.array(volume), cutoffs))] if cutoffs else None


def _bins(measurements: Measurements, options: EvaluationOptions) -> tuple[list[Bin], list[str]]:
    """Return each measure by its quantity, in bins that are the same for all models, and notes."""
    bins = []
    for label in measurements.labels:
        columns = measurements.reference(label)
        volumes = columns["reference_mm3"]
        edges = {
            "slice_thickness_mm": clinical.bin_edges(columns["slice_thickness_mm"], options.thickness_bins_mm),
            "reference_mm3": clinical.bin_edges(volumes[volumes > 0]),  # empty ones have no relative difference
        }
        for model in measurements.models:
            for measure, quantity in BINNED:
                columns = measurements.columns(model, label)
                bins += clinical.bin_measure(columns, model, label, measure, quantity, edges[quantity])
    thickness = measurements.reference(measurements.labels[0])["slice_thickness_mm"]
    if len(thickness) > 1 and np.ptp(thickness) == 0:
        note = f"All cases have a slice thickness of {thickness[0]:g} mm: the results say nothing about other ones."
        return bins, [note]
    return bins, []


def _notes_on_empty_masks(measurements: Measurements) -> Iterator[str]:
    """Tell which means leave out cases, and how an empty mask counts in the others."""
    for label in measurements.labels:
        empty = measurements.reference(label)["reference_voxels"] == 0
        if empty.any():
            yield (
                f"{label}: the reference is empty in {_of_cases(empty)}. Recall, relative volume difference, surface "
                "distances and lesion recall leave these cases out. Dice and precision are 0 there if the model "
                "predicts anything, and leave the case out otherwise."
            )
        for model in measurements.models:
            missed = ~empty & (measurements.columns(model, label)["predicted_voxels"] == 0)
            if missed.any():
                yield (
                    f"{label}: {model} predicts nothing in {_of_cases(missed)} with a reference. Dice is 0 there, but "
                    "precision and surface distances leave these cases out, so their means look better than they are."
                )


def _notes_on_few_cases(measurements: Measurements) -> Iterator[str]:
    columns = measurements.reference(measurements.labels[0])
    cases, pairs = len(columns["case"]), len({*columns.get("patient", columns["case"])})
    if cases == 1:
        yield "There is only one case, so there are no confidence intervals and no limits of agreement."
    elif pairs == 1:
        yield "All cases are of one patient, so there are no confidence intervals."
    if len(measurements.models) > 1 and pairs <= FEW_PAIRS:
        what = "patients" if "patient" in columns else "cases"
        yield f"With so few {what} ({pairs}), p cannot be below {smallest_p(pairs):g}."


def _of_cases(chosen: np.ndarray) -> str:
    return f"{int(chosen.sum())} of {len(chosen)} cases"


def _without_nan(content: Any) -> Any:
    """Replace NaN and Inf, which JSON does not have, by None."""
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, (float, np.floating)) and not math.isfinite(content) else content
