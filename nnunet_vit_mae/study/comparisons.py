"""What a study asks, and its answers: paired comparisons of arms on the test cases, and the sentences to report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from nnunet_vit_mae.evaluation.results import EvaluationOptions
from nnunet_vit_mae.evaluation.words import (
    SIGNIFICANT,
    format_values,
    interval_text,
    p_text,
    title_in_sentence,
    unit_of,
)
from nnunet_vit_mae.statistics import compare, holm, mean_interval
from nnunet_vit_mae.study.arms import BASELINE, Arm, scratch_pairs
from nnunet_vit_mae.study.design import StudyDesign

COMPARED = ("dice", "absolute_difference_mm3")
OPTIONS = EvaluationOptions()
NNUNET_ITERATIONS = 250_000  # of nnU-Net's own schedule: 1000 epochs of 250


class Variant(NamedTuple):
    """An arm, calibrated or as trained."""

    arm: str
    calibrated: bool

    def __str__(self) -> str:
        return f"calibrated {self.arm}" if self.calibrated else self.arm


@dataclass(frozen=True)
class Question:
    """Pairs that are compared for one reason; Holm's correction covers all comparisons of a question and measure."""

    title: str
    pairs: tuple[tuple[Variant, Variant], ...]  # the difference is the second minus the first


@dataclass(frozen=True)
class PairedDifference:
    """The difference of two arms with the same number of labels, paired by case; values are means over seeds first."""

    first: Variant
    second: Variant
    few: int
    label: str
    measure: str
    cases: int
    seeds: int
    first_mean: float
    second_mean: float
    difference: float
    low: float  # of the bootstrap interval over cases, or over patients if several cases are of one
    high: float
    seed_differences: tuple[float, ...]  # the mean difference of each seed
    direction: int  # of the test's ranks: 1 if the second tends to be larger, -1 if smaller
    p: float | None
    p_holm: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is significant."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT


@dataclass(frozen=True)
class SeriesPoint:
    """A point of a learning curve."""

    mean: float  # over cases, of means over seeds
    low: float  # of the bootstrap interval over cases
    high: float
    seeds: tuple[float, ...]  # the mean over cases of each seed


def questions_of(study: StudyDesign) -> list[Question]:
    """Return what the arms of a study can answer."""
    arms = study.arms

    def against(built_in: str, first: bool, second: bool) -> tuple[tuple[Variant, Variant], ...]:
        baseline = study.same_as(built_in)
        return tuple(
            (Variant(baseline, first), Variant(name, second))
            for name, arm in arms.items()
            if baseline and name != baseline and (arm.calibrate or not second)
        )

    questions = [
        Question(
            "Pre-trained minus from scratch",
            tuple((Variant(scratch, False), Variant(trained, False)) for scratch, trained in scratch_pairs(arms)),
        ),
        Question("Other arms minus U-Net", against("unet", False, False)),
        Question("Other arms minus U-Net, both calibrated", against("unet", True, True)),
        Question("Other arms calibrated minus U-Net as trained", against("unet", False, True)),
        Question("Other arms minus U-Net trained by AdamW", against("unet_adamw", False, False)),
        Question(
            "Calibrated minus not calibrated",
            tuple((Variant(name, False), Variant(name, True)) for name, arm in arms.items() if arm.calibrate),
        ),
    ]
    return [question for question in questions if question.pairs]


def answer(question: Question, table: pd.DataFrame) -> list[PairedDifference]:
    """Compare the pairs of a question for each label, number of labels and measure.

    Args:
        question: The question.
        table: The results, as in `results.csv`.

    Returns:
        The comparisons of which there are results, with p-values corrected by Holm's method for each measure.
    """
    answers = []
    for measure in COMPARED:
        found = [
            paired
            for label in distinct(table, "label")
            for few in sorted(distinct(table, "few"))
            for first, second in question.pairs
            if (paired := compare_pair(table, first, second, few, label, measure)) is not None
        ]
        corrected = holm([paired.p for paired in found])
        answers += [replace(paired, p_holm=p) for paired, p in zip(found, corrected, strict=True)]
    return answers


def answers_of(study: StudyDesign, table: pd.DataFrame) -> dict[Question, list[PairedDifference]]:
    """Return the answers to the questions of which there are results."""
    answers = {question: answer(question, table) for question in questions_of(study)}
    return {question: found for question, found in answers.items() if found}


def compare_pair(
    table: pd.DataFrame, first: Variant, second: Variant, few: int, label: str, measure: str
) -> PairedDifference | None:
    """Compare two arms on the cases and seeds that both have; None if there are none.

    Where a seed of one arm has no value of a case, such as the Dice of two empty masks, that seed of the other arm does
    not count for the case either.
    """
    ours, others = (case_by_seed(table, variant, few, label, measure) for variant in (first, second))
    ours, others = ours.align(others, join="inner")
    known = ours.notna() & others.notna()
    values = [part.where(known) for part in (ours, others)]
    seeds = [seed for seed in ours if known[seed].to_numpy().any()]
    means = pd.concat([part.mean(axis=1) for part in values], axis=1).dropna()
    if means.empty:
        return None
    pairs = means.to_numpy(dtype=float)
    groups = _patients(table, means.index)
    compared = compare(*pairs.T, groups=groups)
    low, high = mean_interval(pairs[:, 1] - pairs[:, 0], groups=groups, **OPTIONS.bootstrap)
    by_seed = tuple((values[1][seeds] - values[0][seeds]).mean().tolist())
    return PairedDifference(
        first, second, few, label, measure, len(means), len(seeds), compared.first, compared.second,
        compared.difference, low, high, by_seed, compared.direction, compared.p,
    )  # fmt: skip


def distinct(table: pd.DataFrame, column: str) -> list[Any]:
    """Return the values of a column in the order in which they occur."""
    return list(dict.fromkeys(table[column].tolist()))


def case_by_seed(table: pd.DataFrame, variant: Variant, few: int, label: str, measure: str) -> pd.DataFrame:
    """Return a measure with a row for each case and a column for each seed."""
    chosen = (table["arm"] == variant.arm) & (table["calibrated"] == variant.calibrated)
    chosen &= (table["few"] == few) & (table["label"] == label)
    return table[chosen].pivot(index="case", columns="seed", values=measure)


def point_of(table: pd.DataFrame, variant: Variant, few: int, label: str, measure: str) -> SeriesPoint | None:
    """Return a point of a learning curve; None if there are no results."""
    values = case_by_seed(table, variant, few, label, measure)
    means = values.mean(axis=1).dropna()
    if means.empty:
        return None
    interval = mean_interval(means, groups=_patients(table, means.index), **OPTIONS.bootstrap)
    return SeriesPoint(float(means.mean()), *interval, tuple(values.mean().tolist()))


def _patients(table: pd.DataFrame, cases: pd.Index) -> np.ndarray | None:
    """Return the patients of cases; None if each case is of another patient."""
    if "patient" not in table:
        return None
    return table.drop_duplicates("case").set_index("case").loc[cases, "patient"].to_numpy()


# ---------- words


def sentence_of(paired: PairedDifference) -> str:
    """Return the sentence that a paper needs."""
    first, second, difference, low, high = format_values(
        paired.measure, paired.first_mean, paired.second_mean, paired.difference, paired.low, paired.high
    )
    unit = unit_of(paired.measure)
    interval = f"95% confidence interval {ends}; " if (ends := interval_text(low, high)) else ""
    test = "equal in every case" if paired.p is None else f"Wilcoxon, corrected p {_equals(paired.p_holm)}"
    seeds = f", means of {paired.seeds} seeds" if paired.seeds > 1 else ", one seed"
    return (
        f"With {paired.few} labels, {paired.label}: mean {title_in_sentence(paired.measure)} was {second}{unit} "
        f"({paired.second}) and {first}{unit} ({paired.first}), a difference of {difference}{unit} ({interval}{test}; "
        f"{paired.cases} test case{'s' if paired.cases != 1 else ''}{seeds})."
    )


def _equals(p: float | None) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def verdict_of(paired: PairedDifference) -> str:
    """Say which of two arms is better; a difference that is not significant is not called an absence of one."""
    if paired.p is None:
        return "Equal in every case"
    if not paired.significant:
        return "Cannot be told"
    if paired.difference * paired.direction <= 0:
        return "They differ, but mean and ranks disagree"
    better = paired.second if (paired.difference > 0) == (paired.measure == "dice") else paired.first
    text = f"{better} is better"
    return text if seeds_agree(paired) else f"{text}, but not with every seed"


def seeds_agree(paired: PairedDifference) -> bool:
    """Return whether the difference has the same sign with every seed."""
    return len({np.sign(value) for value in paired.seed_differences}) == 1


def limits_of_study(
    answers: Sequence[PairedDifference],
    arms: Mapping[str, Arm],
    *,
    iterations: int,
    seeds: int,
    cases: int,
    patients: int,
    by_patient: bool,
) -> Iterator[str]:
    """Yield what a study cannot say, a sentence for each reason; `iterations` are those of each training."""
    if seeds < 3:
        many = "is one training run" if seeds == 1 else f"are {seeds} training runs"
        yield (
            f"There {many} of each arm: how much results differ between runs is not known, so small differences may "
            "be chance. Use three seeds or more."
        )
    if patients < 20:
        tested = f"{cases} test cases" if patients == cases else f"{patients} test patients"
        yield (
            f"There are only {tested}: even large differences may not reach significance, and the intervals "
            "are too narrow."
        )
    if answers and not any(paired.significant for paired in answers):
        yield "No difference is significant. This does not show that the arms are equally good."
    unsteady = [paired for paired in answers if paired.significant and not seeds_agree(paired)]
    if unsteady:
        yield f"{len(unsteady)} of the significant differences have another sign with at least one seed."
    yield (
        "The intervals and tests are over test cases, or over patients of whom there are several, with the mean over "
        "seeds. They do not cover other choices of training cases, other datasets or other scanners."
    )
    if not by_patient:
        yield "Without --csv every case counted as a patient of its own: scans of one patient may be on two sides."
    yield from _limits_of_training(arms, iterations)


def _limits_of_training(arms: Mapping[str, Arm], iterations: int) -> Iterator[str]:
    """Yield how the trainings of the arms differ besides in their networks."""
    by_sgd = [name for name, arm in arms.items() if arm.trainer == BASELINE]
    by_adamw = [name for name, arm in arms.items() if arm.scheduled and name not in by_sgd]
    if by_sgd and by_adamw and iterations < NNUNET_ITERATIONS:
        yield (
            f"Each training had {iterations:,} iterations. {', '.join(by_sgd)}: nnU-Net's SGD, whose schedule is made "
            f"for {NNUNET_ITERATIONS:,}. {', '.join(by_adamw)}: AdamW, which learns faster at first. A difference "
            "between them can come from the optimiser, not from the network: the arm unet_adamw is nnU-Net's network "
            "with AdamW, and the curves of the trainings show which arms were still learning."
        )
    stock = [name for name, arm in arms.items() if not (arm.scheduled or arm.members)]
    if stock:
        yield (
            f"{', '.join(stock)}: nnU-Net's own trainer has its own number of steps and no seed, and mirrors along all "
            "axes, so this comparison is not at equal training."
        )
    planned = [name for name, arm in arms.items() if arm.planner]
    if planned:
        yield f"{', '.join(planned)}: plans of its own, whose patch or batch may differ from those of the other arms."
