"""The most important results of an evaluation as text, for the terminal."""

from __future__ import annotations

import math

from nnunet_vit_mae.evaluation.results import Evaluation, Mean

HEADLINE = {  # title and decimals by measure
    "dice": ("Dice", 3),
    "absolute_difference_mm3": ("|volume difference| mm3", 1),
    "hd95_mm": ("HD95 mm", 2),
}


def headline_text(evaluation: Evaluation) -> str:
    """Return the most important means, the comparison of two models, and the notes, as text."""
    level = evaluation.options.confidence_text
    return "\n".join(
        [
            *_headline_lines(evaluation),
            f"Means with {level} bootstrap intervals; n: cases with a value, where not all have one.",
            *_comparison_lines(evaluation),
            *evaluation.notes,
        ]
    )


def _headline_lines(evaluation: Evaluation) -> list[str]:
    rows = [["label", "model", "cases", *(title for title, _ in HEADLINE.values())]]
    means = {(mean.label, mean.model, mean.measure): mean for mean in evaluation.means}
    for label in evaluation.labels:
        for model in evaluation.models:
            chosen = [means[label, model, measure] for measure in HEADLINE]
            cases = str(chosen[0].n + chosen[0].left_out)
            rows.append([label, model, cases, *(_mean_text(mean, HEADLINE[mean.measure][1]) for mean in chosen)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _comparison_lines(evaluation: Evaluation) -> list[str]:
    """Compare two models; more are compared in the report only."""
    if len(evaluation.models) != 2:
        return []
    what = "patients" if "patient" in evaluation.cases else "n"
    lines = []
    for test in evaluation.tests:
        if test.measure in HEADLINE and test.p is not None:
            title, digits = HEADLINE[test.measure]
            lines.append(
                f"{test.label}: {title}, {test.second} minus {test.first}: {test.difference:+.{digits}f} "
                f"({what}={test.n}, p={test.p:.2g}, {test.p_holm:.2g} after Holm's correction)"
            )
    return lines


def _mean_text(mean: Mean, digits: int) -> str:
    if not mean.n:
        return "-"
    text = f"{mean.mean:.{digits}f}"
    if math.isfinite(mean.low):
        text += f" [{mean.low:.{digits}f}, {mean.high:.{digits}f}]"
    if mean.left_out:
        text += f" n={mean.n}"
    return text
