"""The rows of `mae3d_omit`, one for each label of each case, and the table that summarises them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnunet_vit_mae.statistics import FEW_PAIRS, Comparison, compare

NOTHING_TO_OMIT = "nothing to omit"
NOTHING_LEFT = "no contrast would be left"
EMPTY_REFERENCE = "empty reference"


@dataclass(frozen=True)
class OmissionRow:
    """Dice of one label of one case, a row of the CSV file; NaN means that there is no value."""

    case: str
    label: str
    dice_with: float
    dice_without: float
    difference: float  # without minus with
    omitted: str  # contrasts of the case that were omitted
    left_out: str  # why the case is not compared; empty if it is


def omission_table(rows: Sequence[OmissionRow], omitted: Sequence[str]) -> str:
    """Return the mean Dice with and without the omitted contrasts as text, with notes.

    The first line of a label has the cases from which a contrast was omitted; only these are tested. If there are other
    cases, a second line has all of them, as AMAE's table 2: a case with nothing to omit has the same Dice twice.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    omitting = f"without {', '.join(omitted)}"
    wide, part = max(map(len, ["label", *labels])), len(omitting)
    lines = [f"{'label':{wide}}  {'cases':{part}}  {'n':>4}  {'with':>6}  {'without':>7}  {'difference':>10}  {'p':>8}"]
    notes = []
    for label in labels:
        label_rows = [row for row in rows if row.label == label]
        tested, every = _compare(label_rows, ""), _compare(label_rows, "", NOTHING_TO_OMIT)
        lines.append(f"{label:{wide}}  {omitting:{part}}  {_means(tested)}  {_p(tested):>8}")
        if every.n > tested.n:
            lines.append(f"{label:{wide}}  {'all':{part}}  {_means(every)}  {'-':>8}")
        notes += [f"{label}: {note}" for note in _notes(label_rows, tested)]
    lines.append("Mean Dice; difference: without minus with; p: two-sided Wilcoxon signed-rank test of the pairs.")
    if any(row.left_out == NOTHING_TO_OMIT for row in rows):
        lines.append("Cases with nothing to omit are not tested; in the line of all cases their Dice counts twice.")
    if len(labels) > 1:
        lines.append("The p-values are not corrected for the number of labels.")
    return "\n".join(lines + notes)


def _compare(rows: Sequence[OmissionRow], *left_out: str) -> Comparison:
    chosen = [row for row in rows if row.left_out in left_out]
    return compare([row.dice_with for row in chosen], [row.dice_without for row in chosen])


def _means(comparison: Comparison) -> str:
    if not comparison.n:
        return f"{0:>4}  {'-':>6}  {'-':>7}  {'-':>10}"
    return f"{comparison.n:>4}  {comparison.first:6.3f}  {comparison.second:7.3f}  {comparison.difference:+10.3f}"


def _p(comparison: Comparison) -> str:
    return "-" if comparison.p is None else f"{comparison.p:.2g}"


def _notes(rows: Sequence[OmissionRow], tested: Comparison) -> list[str]:
    """Return what a reader should know about the numbers of one label."""
    notes = []
    if empty := sum(row.left_out == EMPTY_REFERENCE for row in rows):
        notes.append(f"{empty} cases are left out because their reference is empty.")
    if not tested.n:
        notes.append("no p, because there is no case to compare.")
    elif tested.p is None:
        notes.append("no p, because Dice is the same with and without in all cases.")
    elif tested.changed < tested.n:
        unchanged = tested.n - tested.changed
        notes.append(f"the test leaves out {unchanged} of {tested.n} cases, whose Dice does not change.")
    if tested.p is not None and tested.changed <= FEW_PAIRS:
        notes.append(f"with only {tested.changed} cases that change, p cannot be below {tested.smallest_p:g}.")
    return notes
