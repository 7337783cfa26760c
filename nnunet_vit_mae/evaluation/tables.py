"""The tables of the report page, as data with formatted numbers for the template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnunet_vit_mae.evaluation import words
from nnunet_vit_mae.evaluation.results import MEASURES, Evaluation, Mean, PairedTest, RiskGroups


@dataclass(frozen=True)
class MeanCell:
    """A mean in the table of means."""

    mean: str
    interval: str
    cases: str  # empty where all models have the same number of cases
    best: bool


def headline_table(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """Make the table of means of a label.

    Args:
        evaluation: The results.
        label: The label.

    Returns:
        A row for each measure with a cell for each model, and the number of cases where it is the same for all models.
    """
    rows = []
    for measure in MEASURES:
        means = evaluation.means_of(label, measure.column)
        if not means:
            continue
        best = words.best_of(means, measure)
        texts = words.format_values(measure.column, *(value for m in means for value in (m.mean, m.low, m.high)))
        same_cases = len({(mean.n, mean.left_out) for mean in means}) == 1
        cells = {}
        for place, mean in enumerate(means):
            text, low, high = texts[3 * place : 3 * place + 3]
            cells[mean.model] = MeanCell(
                mean=text,
                interval=words.interval_text(low, high),
                cases="" if same_cases else _cases_of(mean),
                best=mean.model in best,
            )
        rows.append(
            {
                "measure": measure,
                "cells": [cells.get(model) for model in evaluation.models],
                "cases": means[0].n if same_cases else "",
                "left_out": means[0].left_out if same_cases else 0,
            }
        )
    return rows


def _cases_of(mean: Mean) -> str:
    text = f"n = {mean.n}"
    return f"{text}, {mean.left_out} left out" if mean.left_out else text


def comparison_table(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """Make the table of paired tests of a label, in groups by measure.

    Args:
        evaluation: The results.
        label: The label.

    Returns:
        A group for each measure with a row for each pair of models.
    """
    groups = []
    for column in dict.fromkeys(test.measure for test in evaluation.tests if test.label == label):
        tests = evaluation.tests_of(label, column)
        means = words.format_values(column, *(mean for test in tests for mean in (test.first_mean, test.second_mean)))
        differences = words.format_values(column, *(test.difference for test in tests), sign=True)
        rows = [
            _test_row(test, (means[2 * place], means[2 * place + 1]), differences[place])
            for place, test in enumerate(tests)
        ]
        groups.append({"title": words.TITLES.get(column, column), "unit": words.unit_of(column), "rows": rows})
    return groups


def _test_row(test: PairedTest, means: tuple[str, str], difference: str) -> dict[str, Any]:
    return {
        "pair": (test.first, test.second),
        "means": means,
        "difference": difference,
        "cases": f"{test.changed} of {test.n}",
        "p": words.p_text(test.p),
        "p_holm": words.p_text(test.p_holm),
        "verdict": words.verdict(test),
        "significant": words.significant(test),
    }


def agreement_table(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """Make the table of bias and limits of agreement of a label, with a row for each model."""
    agreements = evaluation.agreements_of(label)
    numbers = [number for entry in agreements for number in (entry.bias, entry.lower, entry.upper)]
    texts = words.format_values("difference_mm3", *numbers, sign=True)
    return [
        {
            "model": entry.model,
            "n": entry.n,
            "values": texts[3 * place : 3 * place + 3],
            "words": words.agreement_in_words(entry),
        }
        for place, entry in enumerate(agreements)
    ]


def risk_table(risks: list[RiskGroups]) -> list[dict[str, Any]]:
    """Make the table of risk groups, with a row for each model."""
    return [_risk_row(risk) for risk in risks]


def _risk_row(risk: RiskGroups) -> dict[str, Any]:
    cases_by_distance = [0, 0, 0]  # right group, one group off, more
    for row, counts in enumerate(risk.confusion):
        for column, cases in enumerate(counts):
            cases_by_distance[min(2, abs(row - column))] += cases
    shares = [f"{cases} ({cases / risk.n:.0%})" if risk.n else "0" for cases in cases_by_distance]
    kappa = words.NO_VALUE if risk.kappa is None else words.rounded(risk.kappa, 2)
    return {"model": risk.model, "n": risk.n, "distances": shares, "kappa": kappa}


def bin_table(evaluation: Evaluation, label: str, measure: str, quantity: str) -> dict[str, Any]:
    """Make the table of a measure by a quantity.

    Args:
        evaluation: The results.
        label: The label.
        measure: The column that is averaged.
        quantity: The column that is binned.

    Returns:
        A row for each bin with median and mean of each model.
    """
    bins = evaluation.bins_of(label, measure, quantity)
    texts = words.format_values(measure, *(value for entry in bins for value in (entry.median, entry.mean)))
    cells = {
        (entry.model, entry.low, entry.high): {
            "median": texts[2 * place],
            "mean": texts[2 * place + 1],
            "n": entry.n,
        }
        for place, entry in enumerate(bins)
    }
    rows = [
        {
            "range": words.range_text(*edges, first=place == 0),
            "cells": [cells.get((model, *edges)) for model in evaluation.models],
        }
        for place, edges in enumerate(sorted({(entry.low, entry.high) for entry in bins}))
    ]
    return {"title": words.measure_by_quantity(measure, quantity), "unit": words.unit_of(quantity), "rows": rows}
