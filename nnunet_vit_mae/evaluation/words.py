"""Numbers and results as text for the reader of a report."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from nnunet_vit_mae.evaluation.results import MEASURES, Agreement, Evaluation, Mean, Measure, PairedTest, RiskGroups

SIGNIFICANT = 0.05  # corrected p-values below are significant
NO_VALUE = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
HIGHLIGHTED = ("dice", "absolute_difference_mm3")
BY_COLUMN = {measure.column: measure for measure in MEASURES}
TITLES = {
    "reference_mm3": "Reference volume",
    "labelled_mm3": "Labelled volume",
    "slice_thickness_mm": "Slice thickness",
} | {measure.column: measure.title for measure in MEASURES}
UNITS = {"reference_mm3": "mm³", "labelled_mm3": "mm³", "slice_thickness_mm": "mm"} | {
    measure.column: measure.unit for measure in MEASURES
}


# ---------- numbers


def rounded(value: float, digits: int) -> str:
    """Format a number with a typographic minus, and none before a zero.

    >>> rounded(1234.56, 1), rounded(-0.001, 2)
    ('1,234.6', '0.00')
    """
    text = f"{value:,.{digits}f}"
    is_zero = not any(digit in text for digit in "123456789")
    return text.lstrip("-") if is_zero else text.replace("-", MINUS)


def axis_text(value: float) -> str:
    """Format a number on an axis, of which ten digits leave no power of ten and no rounding error.

    >>> axis_text(1_500_000), axis_text(0.1 + 0.2)
    ('1,500,000', '0.3')
    """
    return f"{value:,.10g}".replace("-", MINUS)


def digits_of(*values: float) -> int:
    """Return the number of decimals (0 to 2) that gives the largest of some volumes or lengths three digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(2, max(0, 2 - math.floor(math.log10(largest)))) if largest else 0


def volume_text(value: float) -> str:
    """Format a single volume or length without trailing zeros.

    >>> volume_text(1234.4), volume_text(56.0), volume_text(0.1234)
    ('1,234', '56', '0.12')
    """
    text = rounded(value, digits_of(value))
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_values(column: str, *values: float, sign: bool = False) -> list[str]:
    """Format values of a measure with the same number of decimals, so that they line up.

    Args:
        column: The measure.
        values: All values that are shown together. Volumes and lengths get as many decimals as the largest of them
            needs, shares three.
        sign: Whether positive values get a plus.

    Returns:
        A text for each value; a dash for NaN.

    Example:
        >>> format_values("dice", 0.81249, 1.0), format_values("difference_mm3", 148.2, 3.25, sign=True)
        (['0.812', '1.000'], ['+148', '+3'])
    """
    if column == "relative_difference":
        texts = [f"{rounded(100 * value, 1)}%" for value in values]
    else:
        digits = digits_of(*values) if UNITS.get(column) else 3
        texts = [rounded(value, digits) for value in values]
    for place, value in enumerate(values):
        if not math.isfinite(value):
            texts[place] = NO_VALUE
        elif sign and value > 0:
            texts[place] = f"+{texts[place]}"
    return texts


def p_text(p: float | None) -> str:
    """Format a p-value with three decimals, of which none makes a significant one look otherwise.

    >>> p_text(0.0126), p_text(0.0496), p_text(0.0004)
    ('0.013', '< 0.05', '< 0.001')
    """
    if p is None:
        return NO_VALUE
    if p < 0.001:
        return "< 0.001"
    text = f"{p:.3f}"
    return f"< {SIGNIFICANT}" if p < SIGNIFICANT <= float(text) else text


def unit_of(column: str) -> str:
    """Return the unit of a column with a space before it, or nothing."""
    return f" {UNITS[column]}" if UNITS.get(column) else ""


def title_with_unit(column: str) -> str:
    """Return the title of a column, and its unit if it has one.

    >>> title_with_unit("dice"), title_with_unit("reference_mm3")
    ('Dice', 'Reference volume (mm³)')
    """
    title = TITLES.get(column, column)
    return f"{title} ({UNITS[column]})" if UNITS.get(column) else title


def title_in_sentence(column: str) -> str:
    """Return the title of a measure as it stands within a sentence."""
    title = BY_COLUMN[column].title
    return title if column == "dice" else title.lower()


def interval_text(low: str, high: str) -> str:
    """Return an interval whose ends `format_values` wrote, or nothing if there is none.

    >>> interval_text("0.1", "0.3"), interval_text(NO_VALUE, NO_VALUE)
    ('0.1 to 0.3', '')
    """
    return "" if NO_VALUE in (low, high) else f"{low} to {high}"


def range_text(low: float, high: float, first: bool = False) -> str:
    """Format a range; only the first range includes its lower end.

    >>> range_text(1, 2, first=True), range_text(2, 5)
    ('1 to 2', '> 2 to 5')
    """
    if math.isinf(high):
        return f"> {volume_text(low)}"
    if low == high:
        return volume_text(low)
    both = f"{volume_text(low)} to {volume_text(high)}"
    return both if first else f"> {both}"


def groups_in_words(risk: RiskGroups) -> list[str]:
    """Name each risk group with its range of volumes."""
    words = []
    for name, (low, high) in zip(risk.groups, pairwise([None, *risk.cutoffs, None]), strict=True):
        bounds = []
        if low is not None:
            bounds.append(f"above {volume_text(low)}")
        if high is not None:
            bounds.append(f"up to {volume_text(high)}")
        words.append(f"{name} ({' and '.join(bounds)} mm³)" if bounds else name)
    return words


def correct_in_words(risk: RiskGroups) -> str:
    """Say how many cases are in the right risk group, with kappa."""
    text = f"{risk.correct} of {risk.n} correct"
    if risk.n:
        text += f" ({risk.correct / risk.n:.0%})"
    if risk.kappa is not None:
        text += f", κ = {rounded(risk.kappa, 2)}"
    return text


def count_cases(number: int) -> str:
    """Return "1 case" or "N cases"."""
    return f"{number} case{'' if number == 1 else 's'}"


# ---------- results


def best_of(means: Sequence[Mean], measure: Measure) -> set[str]:
    """Return the models with the best mean; none for a single model, or when neither direction is better."""
    known = [entry for entry in means if math.isfinite(entry.mean)]
    if measure.higher_is_better is None or len(means) < 2 or not known:
        return set()
    best = (max if measure.higher_is_better else min)(entry.mean for entry in known)
    return {entry.model for entry in known if entry.mean == best}


def highlights(evaluation: Evaluation, label: str) -> list[str]:
    """Return the main results of one label in a few sentences."""
    return [
        *(_best_mean(evaluation, label, column) for column in HIGHLIGHTED),
        *_significant_differences(evaluation, label),
        *_right_groups(evaluation, label),
    ]


def _best_mean(evaluation: Evaluation, label: str, column: str) -> str:
    means = [mean for mean in evaluation.means_of(label, column) if math.isfinite(mean.mean)]
    title = title_in_sentence(column)
    if not means:
        return f"Mean {title}: not defined in any case."
    best = (max if BY_COLUMN[column].higher_is_better else min)(means, key=lambda entry: entry.mean)
    # formatted with all models, so that the decimals are those of the table
    texts = format_values(column, *(value for m in means for value in (m.mean, m.low, m.high)))
    mean, low, high = texts[3 * means.index(best) :][:3]
    level = evaluation.options.confidence_text
    interval = f"{level} confidence interval {ends}, " if (ends := interval_text(low, high)) else ""
    result = f"{mean}{unit_of(column)} ({interval}{count_cases(best.n)})"
    if len(evaluation.models) == 1:
        return f"Mean {title}: {result}."
    superlative = "highest" if BY_COLUMN[column].higher_is_better else "smallest"
    return f"{best.model} has the {superlative} mean {title}: {result}."


def _significant_differences(evaluation: Evaluation, label: str) -> Iterator[str]:
    """Name the models that are significantly better in the highlighted measures."""
    for column in HIGHLIGHTED:
        tests = evaluation.tests_of(label, column)
        worse_by_better: dict[str, list[str]] = {}
        for test in tests:
            if pair := better_and_worse(test):
                worse_by_better.setdefault(pair[0], []).append(pair[1])
        title = title_in_sentence(column)
        if worse_by_better:
            claims = [f"{better} is better than {join_names(worse)}" for better, worse in worse_by_better.items()]
            yield f"By {title}, {'; '.join(claims)} (corrected p < {SIGNIFICANT})."
        unclear = [test for test in tests if significant(test) and better_and_worse(test) is None]
        for test in unclear:
            yield (
                f"By {title}, {test.first} and {test.second} differ (corrected p < {SIGNIFICANT}), but not in one "
                "direction: the mean, on which a few cases can weigh heavily, and the ranks of the cases disagree."
            )
        if tests and not worse_by_better and not unclear:
            yield f"By {title}, no difference between models is statistically significant."


def _right_groups(evaluation: Evaluation, label: str) -> Iterator[str]:
    risks = [risk for risk in evaluation.risks_of(label) if risk.n]
    shares = [f"{risk.model} {risk.correct} of {risk.n} ({risk.correct / risk.n:.0%})" for risk in risks]
    if shares:
        yield f"Cases in the right risk group: {', '.join(shares)}."


def join_names(names: Sequence[str]) -> str:
    """List names as in a sentence.

    >>> join_names("A"), join_names("AB"), join_names("ABC")
    ('A', 'A and B', 'A, B and C')
    """
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def better_and_worse(test: PairedTest) -> tuple[str, str] | None:
    """Return the better and the worse model of a test.

    None if it is not significant, if neither direction is better, or if means and ranks differ in direction.
    """
    higher = BY_COLUMN[test.measure].higher_is_better if test.measure in BY_COLUMN else None
    if higher is None or test.difference * test.direction <= 0 or not significant(test):
        return None
    return (test.second, test.first) if (test.difference > 0) == higher else (test.first, test.second)


def verdict(test: PairedTest) -> str:
    """Summarise a paired test; a difference that is not significant is not called an absence of one."""
    if not test.n:
        return "No case to compare"
    if test.p is None:
        return "Equal in every case"
    if not significant(test):
        return "Not significant"
    pair = better_and_worse(test)
    if pair:
        return f"{pair[0]} is better"
    return "They differ" if test.difference * test.direction > 0 else "They differ, but mean and ranks disagree"


def significant(test: PairedTest) -> bool:
    """Return whether the p-value, corrected if there is a correction, is significant."""
    p = test.p if test.p_holm is None else test.p_holm
    return p is not None and p < SIGNIFICANT


def agreement_in_words(entry: Agreement) -> str:
    """Describe bias and limits of agreement."""
    if not math.isfinite(entry.bias):
        return "No case has both volumes"
    text = "No bias on average"
    if entry.bias:
        size = format_values("difference_mm3", abs(entry.bias), entry.lower, entry.upper)[0]
        text = f"Mean {'over' if entry.bias > 0 else 'under'}estimation of {size} mm³"
    if math.isfinite(entry.lower) and math.isfinite(entry.upper):
        lower, upper = format_values("difference_mm3", entry.lower, entry.upper, sign=True)
        text += f"; about 95% of differences lie between {lower} and {upper} mm³"
    return text


def measure_by_quantity(measure: str, quantity: str) -> str:
    """Return a title such as "Dice by slice thickness"."""
    return f"{TITLES.get(measure, measure)} by {TITLES.get(quantity, quantity).lower()}"
