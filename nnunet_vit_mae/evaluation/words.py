"""Numbers and findings in words that a reader of a report understands."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from nnunet_vit_mae.evaluation.results import MEASURES, Agreement, Evaluation, Mean, Measure, PairedTest, Risk

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANT = 0.05  # of p, corrected
NOTHING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
LEADING = ("dice", "absolute_difference_mm3")
BY_COLUMN = {measure.column: measure for measure in MEASURES}
TITLES = {"reference_mm3": "Annotated volume", "slice_thickness_mm": "Slice thickness"} | {
    measure.column: measure.title for measure in MEASURES
}
UNITS = {"reference_mm3": "mm³", "slice_thickness_mm": "mm"} | {measure.column: measure.unit for measure in MEASURES}


def rows_of(evaluation: Evaluation, label: str, model: str | None = None) -> pd.DataFrame:
    """The cases of a label, of one model or of all."""
    chosen = evaluation.cases["label"] == label
    return evaluation.cases.loc[chosen if model is None else chosen & (evaluation.cases["model"] == model)]


# ---------- numbers


def rounded(value: float, digits: int) -> str:
    """A number with a real minus, and none before a zero."""
    text = f"{value:,.{digits}f}"
    return (text.lstrip("-") if not any(digit in text for digit in "123456789") else text).replace("-", MINUS)


def tick(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.6g}".replace("-", MINUS)


def digits_of(*values: float) -> int:
    """Decimals that give the largest of some volumes or lengths three digits, and at most two decimals."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(2, max(0, 2 - math.floor(math.log10(largest)))) if largest else 0


def volume(value: float) -> str:
    """A number of mm or mm³ on its own: 1,234 or 56.7 or 0.12, without zeros that say nothing."""
    text = rounded(value, digits_of(value))
    return text.rstrip("0").rstrip(".") if "." in text else text


def number(column: str, *values: float, sign: bool = False) -> list[str]:
    """Values of a measure, all with as many decimals: volumes and lengths by the largest, shares with three.

    Give all numbers that stand together at once, so that they line up.
    """
    if column == "relative_difference":
        texts = [f"{rounded(100 * value, 1)}%" for value in values]
    else:
        digits = digits_of(*values) if UNITS.get(column) else 3
        texts = [rounded(value, digits) for value in values]
    return [
        NOTHING if not math.isfinite(value) else f"+{text}" if sign and value > 0 else text
        for value, text in zip(values, texts, strict=True)
    ]


def p_value(p: float | None) -> str:
    """Three decimals, two digits at least where there are that many."""
    if p is None:
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def unit_of(column: str) -> str:
    """With a space before it."""
    return f" {UNITS[column]}" if UNITS.get(column) else ""


def interval(low: float, high: float, first: bool = False) -> str:
    """A range; all but the first do not hold their lower end."""
    if math.isinf(high):
        return f"> {volume(low)}"
    if low == high:
        return volume(low)
    return f"{volume(low)} to {volume(high)}" if first else f"> {volume(low)} to {volume(high)}"


def groups_in_words(risk: Risk) -> list[str]:
    """Each risk group with its volumes."""
    words = []
    for name, (low, high) in zip(risk.groups, pairwise([None, *risk.cutoffs, None]), strict=True):
        parts = [f"above {volume(low)}" if low is not None else "", f"up to {volume(high)}" if high is not None else ""]
        bounds = " and ".join(filter(None, parts))
        words.append(f"{name} ({bounds} mm³)" if bounds else name)
    return words


def correct(risk: Risk) -> str:
    """How many cases are in the right group."""
    share = f" ({risk.correct / risk.n:.0%})" if risk.n else ""
    return f"{risk.correct} of {risk.n} correct{share}" + (
        "" if risk.kappa is None else f", κ = {rounded(risk.kappa, 2)}"
    )


# ---------- findings


def best_of(means: Sequence[Mean], measure: Measure) -> set[str]:
    """The models whose mean is best; none when a measure has no better, or there is one model."""
    known = [entry for entry in means if math.isfinite(entry.mean)]
    if measure.higher_is_better is None or len(means) < 2 or not known:
        return set()
    best = (max if measure.higher_is_better else min)(entry.mean for entry in known)
    return {entry.model for entry in known if entry.mean == best}


def highlights(evaluation: Evaluation, label: str, confidence: str) -> list[str]:
    """What to take away of one label, in a few sentences."""
    return [
        *(_leader(evaluation, label, column, confidence) for column in LEADING),
        *_beyond_chance(evaluation, label),
        *_right_groups(evaluation, label),
    ]


def _leader(evaluation: Evaluation, label: str, column: str, confidence: str) -> str:
    means = [m for m in evaluation.means if (m.label, m.measure) == (label, column) and math.isfinite(m.mean)]
    title = BY_COLUMN[column].title
    title = title if column == "dice" else title.lower()
    if not means:
        return f"Mean {title}: not defined in any case."
    best = (max if BY_COLUMN[column].higher_is_better else min)(means, key=lambda entry: entry.mean)
    start = 3 * means.index(best)
    # as many decimals as in the table of all models
    mean, low, high = number(column, *(v for m in means for v in (m.mean, m.low, m.high)))[start : start + 3]
    known = f"{confidence} confidence interval {low} to {high}, " if math.isfinite(best.low) else ""
    found = f"{mean}{unit_of(column)} ({known}{best.n} case{'s' if best.n != 1 else ''})"
    if len(evaluation.models) == 1:
        return f"Mean {title}: {found}."
    return f"{best.model} has the {'highest' if column == 'dice' else 'smallest'} mean {title}: {found}."


def _beyond_chance(evaluation: Evaluation, label: str) -> Iterator[str]:
    """Which differences in the leading measures are significant, by the better model."""
    for column in LEADING:
        tests = [test for test in evaluation.tests if (test.label, test.measure) == (label, column)]
        worse: dict[str, list[str]] = {}
        for better, other in filter(None, map(better_and_worse, tests)):
            worse.setdefault(better, []).append(other)
        found = "; ".join(f"{better} is better than {listed(others)}" for better, others in worse.items())
        title = BY_COLUMN[column].title
        name = f"In {title if column == 'dice' else title.lower()}"
        if tests:
            yield (
                f"{name}, {found} (corrected p < {SIGNIFICANT})."
                if found
                else f"{name}, no difference between models is shown beyond chance."
            )


def _right_groups(evaluation: Evaluation, label: str) -> Iterator[str]:
    risks = [risk for risk in evaluation.risks if risk.label == label and risk.n]
    shares = [f"{risk.model} {risk.correct} of {risk.n} ({risk.correct / risk.n:.0%})" for risk in risks]
    if shares:
        yield f"Cases in the right risk group: {', '.join(shares)}."


def listed(names: Sequence[str]) -> str:
    """Names as in a sentence."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def better_and_worse(test: PairedTest) -> tuple[str, str] | None:
    """The models of a paired test that tells them apart; None where it does not, or the measure has no better."""
    higher = BY_COLUMN[test.measure].higher_is_better if test.measure in BY_COLUMN else None
    if higher is None or not test.difference or not significant(test):
        return None
    return (test.second, test.first) if (test.difference > 0) == higher else (test.first, test.second)


def verdict(test: PairedTest) -> str:
    """What a paired test says; a difference that was not shown is not an absence of one."""
    if not test.n:
        return "No case to compare"
    if test.p is None:
        return "Equal in every case"
    if not significant(test):
        return "No difference shown"
    pair = better_and_worse(test)
    return f"{pair[0]} is better" if pair else "They differ"


def significant(test: PairedTest) -> bool:
    """After the correction, where there is one."""
    p = test.p if test.p_holm is None else test.p_holm
    return p is not None and p < SIGNIFICANT


def agreement_in_words(entry: Agreement) -> str:
    """Bias and limits as one would say them."""
    if not math.isfinite(entry.bias):
        return "No case has both volumes"
    size = number("difference_mm3", abs(entry.bias), entry.lower, entry.upper)[0]
    words = f"{size} mm³ too {'much' if entry.bias > 0 else 'little'} on average" if entry.bias else "Right on average"
    if math.isfinite(entry.lower) and math.isfinite(entry.upper):
        lower, upper = number("difference_mm3", entry.lower, entry.upper, sign=True)
        words += f"; in about 95 of 100 cases between {lower} and {upper} mm³"
    return words
