"""Splits in which no patient is on two sides, for nnU-Net's `splits_final.json`.

nnU-Net reads a single file of splits, with any number of folds. The folds for learning curves, with few training
patients, are therefore appended to the same file: with 3 folds and `--few 10 25`, folds 0 to 2 are the
cross-validation, folds 3 to 5 train on 10 patients of folds 0 to 2 and validate on the same cases, and folds 6 to 8
train on 25 patients that include those 10. `nnUNetv2_train ... 3` trains one of them.

Patients are split, never cases. Strata (a column of a table, tertiles of the labelled volume) are kept in proportion
as far as possible.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nnunet_vit_mae.datasets.split.patients import on_both_sides
from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, without_ending
from nnunet_vit_mae.storage.csv_tables import NUMBER

Split = dict[str, list[str]]  # train and val, as in splits_final.json
TERTILES = ("low", "middle", "high")


@dataclass(frozen=True)
class LabelledCase:
    """A labelled case, its patient and its stratum."""

    case: str
    patient: str
    stratum: str = ""


@dataclass(frozen=True)
class SplitOptions:
    """How to split: a cross-validation of `folds`, or one fold that validates on a `development` share of patients.

    `test` is the share of patients held out of every fold. `few` are numbers of training patients for learning curves.
    """

    folds: int = 5
    development: float = 0.0
    test: float = 0.0
    few: tuple[int, ...] = ()
    one_per_patient: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Splits:
    """Folds as nnU-Net reads them, a description and the parent of each, cases in no fold, and notes for the user.

    The parent of a fold with few training patients is the fold that they were drawn from; other folds are their own.
    `other_series` are those of `left_out` that were left out only because another case of the patient was chosen.
    """

    folds: list[Split]
    meanings: list[str]
    parents: list[int]
    test: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    other_series: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_splits(cases: Sequence[LabelledCase], options: SplitOptions) -> Splits:
    """Split patients; the same options give the same splits, whatever the order of the cases.

    Raises `UserError` if there are too few patients.
    """
    ordered = sorted(cases, key=lambda case: case.case)
    chosen = _one_per_patient(ordered, options.seed) if options.one_per_patient else ordered
    other_series = sorted({case.case for case in ordered} - {case.case for case in chosen})
    notes: list[str] = []
    patients = len({case.patient for case in chosen})
    in_test, in_development = _number(options.test, patients), _number(options.development, patients)
    if patients - in_test - in_development < (1 if options.development else options.folds):
        raise UserError(
            f"{patients} patients are too few for {_flags(options)}: give less, because no patient is divided."
        )
    test = _hold_out(chosen, in_test, options.seed, notes)
    rest = [case for case in chosen if case.patient not in test]
    if options.development:
        held_out = [_hold_out(rest, in_development, options.seed + 1, notes)]
        meanings = ["training and development"]
    else:
        held_out = _cross_validation(rest, options.folds, options.seed, notes)
        meanings = [f"cross-validation, fold {fold} of {options.folds}" for fold in range(options.folds)]
    folds = [_fold(rest, patients_held_out) for patients_held_out in held_out]
    parents = list(range(len(folds)))
    for few in sorted(set(options.few)):
        for fold, patients_held_out in enumerate(held_out):
            training = [case for case in rest if case.patient not in patients_held_out]
            folds.append({"train": _few(training, few, (options.seed, fold)), "val": folds[fold]["val"]})
            meanings.append(f"{few} training patients of fold {fold}")
            parents.append(fold)
    held_out_for_test = [case.case for case in chosen if case.patient in test]
    return Splits(folds, meanings, parents, held_out_for_test, other_series, other_series, notes)


def assign_strata(columns: Sequence[Mapping[str, str]], cases: Sequence[str]) -> dict[str, str]:
    """Combine several columns to one stratum per case; a column of many different numbers is cut into tertiles."""
    parts = []
    for column in columns:
        values = {case: column.get(case, "") or "unknown" for case in cases}
        parts.append(_tertiles(values))
    return {case: " / ".join(part[case] for part in parts) for case in cases}


def find_problems(
    folds: Sequence[Split],
    patients: Mapping[str, str],
    cases: Collection[str],
    *,
    test: Collection[str] = (),
    left_out: Collection[str] = (),
) -> list[str]:
    """Return what is wrong with splits, one clause each.

    Cases of `test` and `left_out` are in no fold on purpose. Patients of a test case may not be in a fold either;
    those of a case that was left out may, as other scans of training patients are left out.
    """
    outside = {*test, *left_out}
    problems = []
    for number, fold in enumerate(folds):
        training, validation = fold["train"], fold["val"]
        used = {*training, *validation}
        problems += fold_problems(number, fold, cases)
        if not {*training} & {*validation} and (both := on_both_sides(patients, training, validation)):
            problems.append(f"fold {number} has patient {abbreviated(both)} in train and in val")
        if held := sorted(used & outside):
            problems.append(f"fold {number} has {abbreviated(held)}, a test case or one that was left out")
        elif both := on_both_sides(patients, used, test):
            problems.append(f"fold {number} has cases of {abbreviated(both)}, of whom other cases are for testing")
    listed = {case for fold in folds for case in (*fold["train"], *fold["val"])}
    if missing := sorted({*cases} - listed - outside):
        problems.append(f"{abbreviated(missing)} {'is' if len(missing) == 1 else 'are'} in no fold")
    return problems


def fold_problems(number: int, fold: Split, cases: Collection[str]) -> list[str]:
    """Return why a fold cannot be trained on, one clause each; `cases` are the labelled ones."""
    problems = []
    for name, side in fold.items():
        if not side:
            problems.append(f"fold {number} has no cases in {name}")
        if twice := [case for case, count in Counter(side).items() if count > 1]:
            problems.append(f"fold {number} lists {abbreviated(twice)} twice in {name}")
    training, validation = fold["train"], fold["val"]
    if shared := sorted({*training} & {*validation}):
        problems.append(f"fold {number} has {abbreviated(shared)} in train and in val")
    if unknown := sorted({*training, *validation} - {*cases}):
        clause = f"fold {number} has {abbreviated(unknown)}, without a label in the dataset"
        if any(without_ending(name, IMAGE_ENDINGS) in cases for name in unknown):
            clause += " (names of cases have no file ending)"
        problems.append(clause)
    return problems


def alike_names(patients: Collection[str]) -> list[list[str]]:
    """Group names that differ only in case, leading zeros, a trailing `.0` or how an umlaut is stored.

    Spreadsheets change the former; macOS stores an umlaut as two characters, most other programs as one.

    >>> alike_names(["007", "7", "8"])
    [['007', '7']]
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(patients):
        plain = unicodedata.normalize("NFKC", name).casefold()
        groups[re.sub(r"\.0+$", "", re.sub(r"\b0+(?=.)", "", plain))].append(name)
    return [names for names in groups.values() if len(names) > 1]


def question_about(patients: Collection[str]) -> str:
    """Return a question about patients with names that are alike, or an empty string.

    >>> question_about(["007", "7", "8"])
    'Are these different patients? 007, 7.'
    """
    alike = alike_names({*patients})
    return f"Are these different patients? {'; '.join(map(', '.join, alike))}." if alike else ""


def parts_of(folds: Sequence[Split], test: Sequence[str]) -> dict[str, list[str]]:
    """Return the cases of each part of a split by name.

    These are training and development set, or the validation cases of each fold of a cross-validation, and the test
    set. Folds for learning curves validate on the cases of another one, so they are not parts of their own.
    """
    distinct = {tuple(fold["val"]): fold for fold in reversed(folds)}  # of equal ones, the first fold stays
    kept = [fold for fold in folds if distinct[tuple(fold["val"])] is fold]
    parts = {f"fold {number}": fold["val"] for number, fold in enumerate(kept)}
    if len(kept) == 1:
        parts = {"training": kept[0]["train"], "validation": kept[0]["val"]}
    return parts | ({"test": [*test]} if test else {})


def _number(share: float, patients: int) -> int:
    """Return how many patients a share is: at least one, unless the share is 0."""
    return max(1, round(share * patients)) if share else 0


def _flags(options: SplitOptions) -> str:
    parts = [f"--test {options.test:g}"] if options.test else []
    parts += [f"--development {options.development:g}" if options.development else f"--folds {options.folds}"]
    return " and ".join(parts)


def _one_per_patient(cases: Sequence[LabelledCase], seed: int) -> list[LabelledCase]:
    random = np.random.default_rng(seed)
    by_patient = sorted(_by_patient(cases).items())
    chosen = [of_patient[int(random.integers(len(of_patient)))] for _, of_patient in by_patient]
    return sorted(chosen, key=lambda case: case.case)


def _by_patient(cases: Sequence[LabelledCase]) -> dict[str, list[LabelledCase]]:
    by_patient: dict[str, list[LabelledCase]] = defaultdict(list)
    for case in cases:
        by_patient[case.patient].append(case)
    return dict(by_patient)


def _stratum_of_patients(cases: Sequence[LabelledCase]) -> dict[str, str]:
    """Return the most frequent stratum of each patient, sorted by patient."""
    by_patient = sorted(_by_patient(cases).items())
    return {
        patient: Counter(case.stratum for case in of_patient).most_common(1)[0][0] for patient, of_patient in by_patient
    }


def _fold(cases: Sequence[LabelledCase], validation: Collection[str]) -> Split:
    return {
        "train": [case.case for case in cases if case.patient not in validation],
        "val": [case.case for case in cases if case.patient in validation],
    }


def _hold_out(cases: Sequence[LabelledCase], number: int, seed: int, notes: list[str]) -> set[str]:
    """Draw a number of patients, in proportion to their strata."""
    from sklearn.model_selection import train_test_split

    if not number:
        return set()
    stratum = _stratum_of_patients(cases)
    patients, labels = list(stratum), list(stratum.values())
    if len(set(labels)) == 1:
        return set(train_test_split(patients, test_size=number, random_state=seed)[1])
    try:
        return set(train_test_split(patients, test_size=number, random_state=seed, stratify=labels)[1])
    except ValueError:  # a stratum of one patient, or more strata than patients to hold out
        notes.append(f"{number} patients were held out without stratification, because some strata are too small.")
        return set(train_test_split(patients, test_size=number, random_state=seed)[1])


def _cross_validation(cases: Sequence[LabelledCase], folds: int, seed: int, notes: list[str]) -> list[set[str]]:
    """Return the patients to validate on in each fold; each patient occurs once."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    patients, labels = [case.patient for case in cases], [case.stratum for case in cases]
    if len(set(labels)) > 1 and max(Counter(labels).values()) < folds:
        notes.append("The folds are not stratified, because each stratum has fewer cases than there are folds.")
        labels = [""] * len(labels)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # about strata that are not in every fold: harmless, and the table shows them
        warnings.simplefilter("ignore", UserWarning)
        indices_of_folds = list(splitter.split(patients, labels, patients))
    held_out = [{patients[index] for index in indices} for _, indices in indices_of_folds]
    if not all(held_out):  # a fold may stay empty if patients have very different numbers of cases
        notes.append("The folds are not stratified, because patients are few or differ much in their number of cases.")
        indices_of_folds = GroupKFold(folds).split(patients, None, patients)
        held_out = [{patients[index] for index in indices} for _, indices in indices_of_folds]
    return held_out


def _few(training: Sequence[LabelledCase], number: int, seed: tuple[int, int]) -> list[str]:
    """Return the cases of the first patients in a stratified order, so that larger numbers include smaller ones."""
    order = _stratified_order(_stratum_of_patients(training), seed)
    if number > len(order):
        raise UserError(f"--few {number} is too many: fold {seed[1]} has only {len(order)} training patients.")
    first = set(order[:number])
    return [case.case for case in training if case.patient in first]


def _stratified_order(stratum: Mapping[str, str], seed: tuple[int, int]) -> list[str]:
    """Shuffle the patients and spread each stratum evenly over the order."""
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


def _tertiles(values: Mapping[str, str]) -> dict[str, str]:
    """Replace many different numbers by tertiles, with a class of its own for 0; return anything else as it is."""
    numbers = {case: float(value) for case, value in values.items() if NUMBER.fullmatch(value)}
    if len(set(numbers.values())) <= len(TERTILES) + 2:  # a grade or a field strength is a class already
        return dict(values)
    ranked = sorted(set(numbers.values()) - {0.0})
    named = {value: TERTILES[len(TERTILES) * rank // len(ranked)] for rank, value in enumerate(ranked)}
    return {case: named.get(numbers[case], "none") if case in numbers else value for case, value in values.items()}
