"""The rows that `mae3d_omit` gives, one for each label of each case, and the table that sums them up."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.files import replacing
from nnunet_vit_mae.statistics import FEW_PAIRS, Comparison, compare

NOTHING_TO_OMIT = "nothing to omit"
NOTHING_LEFT = "no contrast would be left"
EMPTY_REFERENCE = "empty reference"


@dataclass(frozen=True)
class OmissionRow:
    """Dice of one label of one case; a row of the CSV. NaN where there is no value."""

    case: str
    label: str
    dice_with: float
    dice_without: float
    difference: float  # without minus with
    omitted: str  # contrasts that the case had and that were to be taken away
    left_out: str  # why the case is not compared; empty when it is


def omission_table(rows: Sequence[OmissionRow], omitted: Sequence[str]) -> str:
    """Mean Dice with and without, and what is to be known about them, as text.

    The first line of a label has the cases from which something was taken away, and they alone are tested. Where there
    are others, a second line has them all, as in AMAE's table 2: what had nothing to omit counts the same twice.
    """
    labels = list(dict.fromkeys(row.label for row in rows))
    some, every = f"without {', '.join(omitted)}", "all"
    wide, part = max(map(len, ["label", *labels])), len(some)
    lines = [f"{'label':{wide}}  {'cases':{part}}  {'n':>4}  {'with':>6}  {'without':>7}  {'difference':>10}  {'p':>8}"]
    notes = []
    for label in labels:
        own = [row for row in rows if row.label == label]
        tested, both = _compare(own, ""), _compare(own, "", NOTHING_TO_OMIT)
        lines.append(f"{label:{wide}}  {some:{part}}  {_means(tested)}  {_p(tested):>8}")
        if both.n > tested.n:
            lines.append(f"{label:{wide}}  {every:{part}}  {_means(both)}  {'-':>8}")
        notes += [f"{label}: {note}" for note in _notes(own, tested)]
    lines.append("Mean Dice; difference: without minus with; p: two-sided Wilcoxon signed-rank test of the pairs.")
    if any(row.left_out == NOTHING_TO_OMIT for row in rows):
        lines.append("Cases with nothing to omit are not tested; in the line of all cases they count the same twice.")
    if len(labels) > 1:
        lines.append("The p-values are not corrected for the number of labels.")
    return "\n".join(lines + notes)


def write_csv(rows: Sequence[OmissionRow], file: Path) -> None:
    """What has no value is empty."""
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(OmissionRow.__dataclass_fields__)
        for row in rows:
            writer.writerow("" if value != value else value for value in vars(row).values())  # NaN alone is not itself


def _compare(rows: Sequence[OmissionRow], *left_out: str) -> Comparison:
    chosen = [row for row in rows if row.left_out in left_out]
    return compare([row.dice_with for row in chosen], [row.dice_without for row in chosen])


def _means(found: Comparison) -> str:
    if not found.n:
        return f"{0:>4}  {'-':>6}  {'-':>7}  {'-':>10}"
    return f"{found.n:>4}  {found.first:6.3f}  {found.second:7.3f}  {found.difference:+10.3f}"


def _p(found: Comparison) -> str:
    return "-" if found.p is None else f"{found.p:.2g}"


def _notes(rows: Sequence[OmissionRow], tested: Comparison) -> list[str]:
    """What is to be known about the numbers of one label."""
    notes = []
    if empty := sum(row.left_out == EMPTY_REFERENCE for row in rows):
        notes.append(f"cases left out because their reference is empty: {empty}.")
    if not tested.n:
        notes.append("no p, for no case is left to compare.")
    elif tested.p is None:
        notes.append("no p, for Dice is the same with and without in all cases.")
    elif tested.changed < tested.n:
        notes.append(f"cases that the test leaves out because Dice is the same twice: {tested.n - tested.changed}.")
    if tested.p is not None and tested.changed <= FEW_PAIRS:
        notes.append(f"so few cases that differ ({tested.changed}) cannot give a p below {tested.smallest_p:g}.")
    return notes
