"""What `mae3d_quantify --uncertainty` expected of cases, beside what they turned out to be: which to look at first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.evaluation import words
from nnunet_vit_mae.evaluation.results import Evaluation
from nnunet_vit_mae.statistics import rank_correlation
from nnunet_vit_mae.storage.csv_tables import read_rows

EXPECTED, LOW, HIGH = "expected_dice", "volume_low_mm3", "volume_high_mm3"
SHOWN = 10  # cases in the report
FEWEST = 3  # cases for a rank correlation


def read_expected(file: Path) -> dict[tuple[str, str], dict[str, float]]:
    """Read the columns of uncertainty of a table of `mae3d_quantify`.

    Args:
        file: The table.

    Returns:
        Expected Dice and both ends of the interval, by case and label; NaN for an empty cell.

    Raises:
        UserError: If the file is missing, is not such a table, or holds text in place of a number.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: give a table of mae3d_quantify --uncertainty.")
    try:
        rows = read_rows(file)
        return {
            (row["case"], row["label"]): {column: float(row[column] or math.nan) for column in (EXPECTED, LOW, HIGH)}
            for row in rows
        }
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{file} is not a table of mae3d_quantify --uncertainty ({error}): give one that has {EXPECTED}, {LOW} and "
            f"{HIGH}."
        ) from None


def with_expected(
    evaluation: Evaluation, expected: Mapping[str, Mapping[tuple[str, str], Mapping[str, float]]]
) -> Evaluation:
    """Return the evaluation with the columns of `read_expected`, by model, and notes on cases that a table lacks.

    The columns are NaN for models without a table. Raises `UserError` if a table has none of the cases.
    """
    if not expected:
        return evaluation
    cases = evaluation.cases
    keys = list(zip(cases["model"], cases["case"], cases["label"], strict=True))
    notes = list(evaluation.notes)
    for model, rows in expected.items():
        if not any(key[0] == model and key[1:] in rows for key in keys):
            raise UserError(
                f"The table of --uncertainty for {model} has none of the evaluated cases and labels: "
                "give the table of these cases."
            )
        if lacking := {*cases["case"]} - {case for case, _ in rows}:
            notes.append(f"{model}: the table of --uncertainty lacks {abbreviated(sorted(lacking))}.")
    known = [expected.get(model, {}).get((case, label), {}) for model, case, label in keys]
    columns = {column: [row.get(column, math.nan) for row in known] for column in (EXPECTED, LOW, HIGH)}
    return replace(evaluation, cases=cases.assign(**columns), notes=tuple(notes))


def review_tables(evaluation: Evaluation, label: str) -> list[dict[str, Any]]:
    """Make a table for each model with an expected Dice: the cases that a reader should look at first.

    Args:
        evaluation: The results.
        label: The label.

    Returns:
        The model, rows of its cases by ascending expected Dice, and sentences on how good the expectations were.
    """
    if EXPECTED not in evaluation.cases:
        return []
    tables = []
    for model in evaluation.models:
        rows = evaluation.rows_of(label, model)
        if rows[[EXPECTED, LOW]].notna().to_numpy().any():
            first = rows.sort_values(EXPECTED, kind="stable").head(SHOWN)
            tables.append(
                {
                    "model": model,
                    "rows": [_row(row) for row in first.to_dict("records")],
                    "sentences": _how_good(rows),
                }
            )
    return tables


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    expected, dice = words.format_values("dice", row[EXPECTED], row["dice"])
    predicted, low, high, reference = words.format_values(
        "predicted_mm3", row["predicted_mm3"], row[LOW], row[HIGH], row["reference_mm3"]
    )
    interval = words.interval_text(low, high) or words.NO_VALUE
    texts = {"expected": expected, "dice": dice, "predicted": predicted, "interval": interval, "reference": reference}
    return {"case": row["case"], **texts}


def _how_good(rows: pd.DataFrame) -> list[str]:
    sentences = []
    expected, dice = rows[[EXPECTED, "dice"]].dropna().to_numpy(float).T
    if len(dice) >= FEWEST and (correlation := rank_correlation(expected, dice)) is not None:
        sentences.append(
            f"Expected and true Dice: rank correlation {words.rounded(correlation, 2)}, mean absolute error "
            f"{words.rounded(float(np.abs(expected - dice).mean()), 3)} ({len(dice)} cases)."
        )
    low, high, reference = rows[[LOW, HIGH, "reference_mm3"]].dropna().to_numpy(float).T
    if len(reference):
        inside = int(((low <= reference) & (reference <= high)).sum())
        sentences.append(
            f"{inside} of {len(reference)} reference volumes ({inside / len(reference):.0%}) lie in their intervals."
        )
    return sentences
