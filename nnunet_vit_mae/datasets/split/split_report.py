"""What `mae3d_split` prints about the splits it has written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from shlex import quote

from nnunet_vit_mae.datasets.split.cohort import Cohort, WrittenSplits
from nnunet_vit_mae.datasets.split.splits import Splits, question_about
from nnunet_vit_mae.errors import abbreviated


def split_report(written: WrittenSplits, cohort: Cohort, dataset: str) -> str:
    """Return the table of folds and everything the user should know; `dataset` is what `-d` named."""
    splits = written.splits
    lines = [fold_table(splits, cohort.patients, written.strata), *splits.notes, *_cases_in_no_fold(splits, cohort)]
    if question := question_about(cohort.patients.values()):
        lines.append(question)
    if written.options.few:
        regular = " ".join(str(fold) for fold in range(len(splits.folds) // (1 + len(written.options.few))))
        lines.append(
            f"Without -f, nnU-Net predicts with folds 0 to 4, including those with few labels: give -f {regular}."
        )
    lines += [f"Moved aside: {file}." for file in written.moved]
    lines.append(
        f"Wrote {written.file}; train one fold of the table with nnUNetv2_train {quote(dataset)} 3d_fullres FOLD."
    )
    return "\n".join(lines)


def _cases_in_no_fold(splits: Splits, cohort: Cohort) -> Iterator[str]:
    if splits.test or splits.left_out:
        yield f"Cases in no fold: {len(splits.test)} for testing, {len(splits.left_out)} left out."
    if not splits.test:
        return
    test_patients = {cohort.patients[case] for case in splits.test}
    siblings = [case for case in splits.left_out if cohort.patients[case] in test_patients]
    also = f", and {abbreviated(siblings)} too, which are of the same patients" if siblings else ""
    yield (
        "Training with fold all uses every case of imagesTr, unlike pre-training: first move the test cases to "
        f"imagesTs{also}."
    )


def fold_table(splits: Splits, patients: Mapping[str, str], strata: Mapping[str, str]) -> str:
    """Return a row for each fold, with cases and patients on both sides, and one for each stratum."""
    lines = [f"{'fold':>4}  {'content':34}  {'training':>18}  {'validation':>18}  (cases of patients)"]
    for number, (fold, meaning) in enumerate(zip(splits.folds, splits.meanings, strict=True)):
        sides = [f"{len(fold[side])} of {len({patients[case] for case in fold[side]})}" for side in ("train", "val")]
        lines.append(f"{number:4}  {meaning:34}  {sides[0]:>18}  {sides[1]:>18}")
    names = sorted(set(strata.values()))
    if len(names) > 1:
        lines.append("Training + validation cases of each stratum, by fold:")
        width = max(map(len, names))
        lines += [f"  {name:{width}}  {_counts(splits, strata, name)}" for name in names]
    return "\n".join(lines)


def _counts(splits: Splits, strata: Mapping[str, str], name: str) -> str:
    """Return the training and validation cases of one stratum in each fold."""
    columns = []
    for fold in splits.folds:
        training, validation = (sum(strata[case] == name for case in fold[side]) for side in ("train", "val"))
        columns.append(f"{training}+{validation}")
    return "  ".join(f"{column:>7}" for column in columns)
