"""Splits in which no patient is on two sides, for nnU-Net's `splits_final.json`.

nnU-Net knows one file of splits and a fold by its number in it, and it takes as many folds as there are. So the splits
for learning curves, with few labels to train on, are further folds of the same file: with 3 folds and `--few 10 25`,
folds 0 to 2 are the cross-validation, 3 to 5 train on 10 patients of folds 0 to 2 and validate on the same cases as
these, and 6 to 8 on 25 patients, the 10 among them. `nnUNetv2_train ... 3` then picks one. Another file for each number
would have to be swapped in by hand before every training.

Patients are split, never cases; strata (a column of a table, thirds of the labelled volume) are kept in proportion as
far as patients allow. The numbers of `--few` are patients too.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_vit_mae.datasets.split.patients import on_both_sides
from nnunet_vit_mae.errors import UserError, abbreviated

Split = dict[str, list[str]]  # train and val, as in splits_final.json
THIRDS = ("low", "middle", "high")


@dataclass(frozen=True)
class LabelledCase:
    """A labelled case, the patient whom it shows, and its stratum."""

    case: str
    patient: str
    stratum: str = ""


@dataclass(frozen=True)
class SplitOptions:
    """What to split into: `folds` of cross-validation, or one fold with a `development` share; both beside `test`.

    Shares are of patients. `few` are numbers of patients to train on, for learning curves.
    """

    folds: int = 5
    development: float = 0.0
    test: float = 0.0
    few: tuple[int, ...] = ()
    one_per_patient: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Splits:
    """Folds as nnU-Net wants them, what each of them is, cases in none of them, and what one should know."""

    folds: list[Split]
    meanings: list[str]
    test: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_splits(series: Sequence[LabelledCase], wishes: SplitOptions) -> Splits:
    """Split patients as wished; the same wishes and seed give the same splits, in whatever order cases come.

    Raises `UserError` when there are too few patients.
    """
    ordered = sorted(series, key=lambda one: one.case)
    chosen = _one_per_patient(ordered, wishes.seed) if wishes.one_per_patient else ordered
    left_out = sorted({one.case for one in ordered} - {one.case for one in chosen})
    notes: list[str] = []
    patients = len({one.patient for one in chosen})
    in_test, in_development = _number(wishes.test, patients), _number(wishes.development, patients)
    if patients - in_test - in_development < (1 if wishes.development else wishes.folds):
        raise UserError(
            f"{patients} patients are too few for {_described(wishes)}: a patient is never divided, so ask for less."
        )
    test = _hold_out(chosen, in_test, wishes.seed, notes)
    rest = [one for one in chosen if one.patient not in test]
    if wishes.development:
        held = [_hold_out(rest, in_development, wishes.seed + 1, notes)]
        meanings = ["training and development"]
    else:
        held = _cross_validation(rest, wishes.folds, wishes.seed, notes)
        meanings = [f"cross-validation, fold {fold} of {wishes.folds}" for fold in range(wishes.folds)]
    splits = [_split(rest, validated) for validated in held]
    for few in sorted(set(wishes.few)):
        for fold, validated in enumerate(held):
            training = [one for one in rest if one.patient not in validated]
            splits.append({"train": _few(training, few, (wishes.seed, fold)), "val": splits[fold]["val"]})
            meanings.append(f"{few} training patients of fold {fold}")
    return Splits(splits, meanings, [one.case for one in chosen if one.patient in test], left_out, notes)


def strata(columns: Sequence[Mapping[str, str]], cases: Sequence[str]) -> dict[str, str]:
    """One stratum for each case from several columns; many different numbers in a column become thirds."""
    parts = []
    for column in columns:
        values = {case: column.get(case, "") or "unknown" for case in cases}
        parts.append(_thirds(values))
    return {case: " / ".join(part[case] for part in parts) for case in cases}


def verify(
    folds: Sequence[Split],
    patients: Mapping[str, str],
    cases: Collection[str],
    outside: Collection[str] = (),
) -> list[str]:
    """What is wrong with splits, a clause for each; `outside` are cases that are meant to be in no fold."""
    problems = []
    for number, fold in enumerate(folds):
        training, validation = fold["train"], fold["val"]
        for name, side in (("train", training), ("val", validation)):
            if not side:
                problems.append(f"fold {number} has no cases in {name}")
            if twice := [case for case, count in Counter(side).items() if count > 1]:
                problems.append(f"fold {number} lists {abbreviated(twice)} twice in {name}")
        used = {*training, *validation}
        if shared := sorted({*training} & {*validation}):
            problems.append(f"fold {number} has {abbreviated(shared)} in train and in val")
        elif both := on_both_sides(patients, training, validation):
            problems.append(f"fold {number} has patient {abbreviated(both)} in train and in val")
        if unknown := sorted(used - {*cases}):
            problems.append(f"fold {number} has {abbreviated(unknown)}, without a label in the data set")
        if held := sorted(used & {*outside}):
            problems.append(f"fold {number} has {abbreviated(held)}, a test case or one that was left out")
    listed = {case for fold in folds for case in (*fold["train"], *fold["val"])}
    if missing := sorted({*cases} - listed - {*outside}):
        problems.append(f"{abbreviated(missing)} {'is' if len(missing) == 1 else 'are'} in no fold")
    return problems


def alike_names(patients: Collection[str]) -> list[list[str]]:
    """Names that differ only in capitals, leading zeros, or in `.0` of a number: spreadsheets change names so."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(patients):
        groups[re.sub(r"\.0+$", "", re.sub(r"\b0+(?=.)", "", name.lower()))].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _number(share: float, patients: int) -> int:
    """How many patients a share is: one at least, when there is a share."""
    return max(1, round(share * patients)) if share else 0


def _described(wishes: SplitOptions) -> str:
    parts = [f"--test {wishes.test:g}"] if wishes.test else []
    parts += [f"--development {wishes.development:g}" if wishes.development else f"--folds {wishes.folds}"]
    return " and ".join(parts)


def _one_per_patient(series: Sequence[LabelledCase], seed: int) -> list[LabelledCase]:
    random = np.random.default_rng(seed)
    by_patient = _by_patient(series)
    chosen = [of_one[int(random.integers(len(of_one)))] for _, of_one in sorted(by_patient.items())]
    return sorted(chosen, key=lambda one: one.case)


def _by_patient(series: Sequence[LabelledCase]) -> dict[str, list[LabelledCase]]:
    by_patient: dict[str, list[LabelledCase]] = defaultdict(list)
    for one in series:
        by_patient[one.patient].append(one)
    return dict(by_patient)


def _stratum_of_patients(series: Sequence[LabelledCase]) -> dict[str, str]:
    """Most of the patient's cases are in it; sorted by patient."""
    by_patient = sorted(_by_patient(series).items())
    return {patient: Counter(one.stratum for one in of_one).most_common(1)[0][0] for patient, of_one in by_patient}


def _split(series: Sequence[LabelledCase], validation: Collection[str]) -> Split:
    return {
        "train": [one.case for one in series if one.patient not in validation],
        "val": [one.case for one in series if one.patient in validation],
    }


def _hold_out(series: Sequence[LabelledCase], number: int, seed: int, notes: list[str]) -> set[str]:
    """So many patients, in proportion to their strata."""
    from sklearn.model_selection import train_test_split

    if not number:
        return set()
    stratum = _stratum_of_patients(series)
    patients, labels = list(stratum), list(stratum.values())
    if len(set(labels)) == 1:
        return set(train_test_split(patients, test_size=number, random_state=seed)[1])
    try:
        return set(train_test_split(patients, test_size=number, random_state=seed, stratify=labels)[1])
    except ValueError:  # a stratum of one patient, or more strata than patients to hold out
        notes.append(f"{number} patients were held out without regard to strata, of which some are too small for that.")
        return set(train_test_split(patients, test_size=number, random_state=seed)[1])


def _cross_validation(series: Sequence[LabelledCase], folds: int, seed: int, notes: list[str]) -> list[set[str]]:
    """Patients to validate on in each fold; all patients occur once."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    patients, labels = [one.patient for one in series], [one.stratum for one in series]
    if len(set(labels)) > 1 and max(Counter(labels).values()) < folds:
        notes.append("Strata are not kept, as each has fewer cases than there are folds: ask for fewer of either.")
        labels = [""] * len(labels)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of strata that are not in every fold, which is no harm: the table shows them
        warnings.simplefilter("ignore", UserWarning)
        found = list(splitter.split(patients, labels, patients))
    held = [{patients[index] for index in indices} for _, indices in found]
    if not all(held):  # it may leave a fold without any, where patients differ much in their number of cases
        notes.append("Strata could not be kept, as patients are few or have very different numbers of cases.")
        found = GroupKFold(folds).split(patients, None, patients)
        held = [{patients[index] for index in indices} for _, indices in found]
    return held


def _few(training: Sequence[LabelledCase], number: int, seed: tuple[int, int]) -> list[str]:
    """Cases of the first patients in an order that keeps strata in proportion: more patients include fewer."""
    order = _order(_stratum_of_patients(training), seed)
    if number > len(order):
        raise UserError(
            f"--few {number}: fold {seed[1]} has only {len(order)} training patients; give at most so many."
        )
    first = set(order[:number])
    return [one.case for one in training if one.patient in first]


def _order(stratum: Mapping[str, str], seed: tuple[int, int]) -> list[str]:
    """Patients at random, each stratum spread evenly over the order."""
    random = np.random.default_rng(seed)
    members: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(stratum):
        members[stratum[patient]].append(patient)
    places = {}
    for name in sorted(members):
        offset = random.random()
        for rank, index in enumerate(random.permutation(len(members[name]))):
            places[members[name][index]] = (rank + offset) / len(members[name])
    return sorted(places, key=lambda patient: (places[patient], patient))


def _thirds(values: Mapping[str, str]) -> dict[str, str]:
    """Thirds by rank where values are many different numbers, and 0 (nothing labelled) for itself; else as they are."""
    try:
        numbers = {case: float(value) for case, value in values.items() if value != "unknown"}
        numbers = {case: number for case, number in numbers.items() if math.isfinite(number)}
    except ValueError:
        return dict(values)
    if len(set(numbers.values())) <= len(THIRDS) + 2:  # a grade or a field strength is a class already
        return dict(values)
    ranked = sorted(set(numbers.values()) - {0.0})
    named = {value: THIRDS[len(THIRDS) * rank // len(ranked)] for rank, value in enumerate(ranked)}
    return {case: named.get(numbers[case], "none") if case in numbers else "unknown" for case in values}
