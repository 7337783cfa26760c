"""Split a data set by patients for nnU-Net: no patient on two sides. Or verify the splits that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import add_patient_arguments, parser_for, positive_int, seed, table_file
from nnunet_vit_mae.errors import UserError, abbreviated, exit_on_user_error

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.split.files import Labelled
    from nnunet_vit_mae.datasets.split.splits import Splits
    from nnunet_vit_mae.datasets.tables import CaseTable


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_split`; the exit code is 2 when `--verify` finds something."""
    parser = parser_for("mae3d_split", __doc__)
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="ID", help="data set number or name, e.g. 501")
    add("-o", dest="output", type=Path, metavar="FOLDER", help="where to write, else where nnU-Net looks")
    add_patient_arguments(parser)
    add("--folds", type=positive_int, default=5, metavar="N", help="folds of the cross-validation")
    add("--development", type=share, default=0.0, metavar="SHARE", help="share of patients; one fold instead of many")
    add("--test", type=share, default=0.0, metavar="SHARE", help="share of patients in no fold at all")
    add("--stratify", nargs="+", default=[], metavar="COLUMN", help="columns to keep in proportion, e.g. the scanner")
    add("--stratify_volume", action="store_true", help="keep thirds of the labelled volume in proportion")
    add("--few", type=positive_int, nargs="+", default=[], metavar="N", help="further folds with N training patients")
    add("--one_per_patient", action="store_true", help="one case of each patient, at random")
    add("--leave_out", type=Path, metavar="FILE", help="names of cases to leave out, one a line")
    add("--seed", type=seed, default=0, metavar="N", help="seed of all that is random")
    add("--overwrite", action="store_true", help="move splits that are there aside")
    add("--verify", action="store_true", help="only verify the splits that are there")
    args = parser.parse_args(argv)
    _refuse_contradictions(args)

    from nnunet_vit_mae.datasets.split.files import labelled_cases
    from nnunet_vit_mae.nnunet.folders import find_dataset

    dataset = find_dataset(args.dataset)
    labelled = labelled_cases(dataset.raw, dataset.preprocessed)
    folder = args.output or dataset.preprocessed
    csv_file = table_file(args.csv, dataset.raw)
    table, patients = _patients(csv_file, args.case, args.patient, labelled, folder)
    if args.verify:
        _verify(labelled, patients, folder)
    else:
        _split(args, labelled, table, patients, folder)


def share(text: str) -> float:
    """An argparse type."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.stratify and not args.csv:
        raise UserError("--stratify needs a table with that column: give it with --csv.")
    if args.patient != "patient" and not args.csv:
        raise UserError("--patient needs a table with that column: give it with --csv.")
    if not args.development and args.folds < 2:
        raise UserError(f"--folds {args.folds}: give 2 or more, or a share for --development.")
    if args.development + args.test >= 1:
        raise UserError(f"--development {args.development:g} and --test {args.test:g} leave nothing to train on.")


def _patients(
    csv_file: Path | None, case: str | None, patient: str, labelled: Labelled, folder: Path
) -> tuple[CaseTable | None, dict[str, str]]:
    """The table if there is one, and patients by case: of the table, of a former call, or each case for itself."""
    from nnunet_vit_mae.datasets.split.patients import PATIENTS, read_patients
    from nnunet_vit_mae.datasets.tables import read_case_table

    table = read_case_table(csv_file, case, labelled.files) if csv_file else None
    if table:
        patients, source = table.patients(patient), table.file
    elif (folder / PATIENTS).is_file():
        patients, source = read_patients(folder / PATIENTS), folder / PATIENTS
        print(f"Patients are taken from {source}; --csv would replace it.")
    else:
        print("There is no --csv: every case counts as a patient of its own.")
        return None, {name: name for name in labelled.files}
    if missing := [name for name in labelled.files if name not in patients]:
        raise UserError(
            f"{source} has no row for {abbreviated(missing)}: "
            f"add {'it' if len(missing) == 1 else 'them'}, or check --case."
        )
    return table, patients


def _verify(labelled: Labelled, patients: Mapping[str, str], folder: Path) -> None:
    from nnunet_vit_mae.datasets.split.files import SPLITS, outside_of, read_splits
    from nnunet_vit_mae.datasets.split.splits import verify

    file = folder / SPLITS
    folds = read_splits(file)
    problems = verify(folds, patients, list(labelled.files), outside_of(folder))
    for problem in problems:
        print(f"Error: {file}: {problem}.", file=sys.stderr)
    if problems:
        sys.exit(2)
    cases = {case for fold in folds for side in ("train", "val") for case in fold[side]}
    number = len({patients[case] for case in cases})
    print(f"{file}: {len(folds)} folds of {len(cases)} cases of {number} patients, none on two sides.")


def _split(
    args: argparse.Namespace, labelled: Labelled, table: CaseTable | None, patients: Mapping[str, str], folder: Path
) -> None:
    from nnunet_vit_mae.datasets.split.files import SPLITS, label_volumes, write_splits
    from nnunet_vit_mae.datasets.split.splits import (
        LabelledCase,
        SplitOptions,
        alike_names,
        make_splits,
        strata,
        verify,
    )
    from nnunet_vit_mae.datasets.tables import read_names

    left_out = set(read_names(args.leave_out, labelled.files, "--leave_out") if args.leave_out else ())
    columns = [table.column(name, "--stratify") for name in args.stratify] if table else []
    columns += [label_volumes(labelled)] if args.stratify_volume else []
    cases = [case for case in labelled.files if case not in left_out]
    stratum = strata(columns, cases)
    wishes = SplitOptions(
        args.folds, args.development, args.test, tuple(sorted(set(args.few))), args.one_per_patient, args.seed
    )
    splits = make_splits([LabelledCase(case, patients[case], stratum[case]) for case in cases], wishes)
    splits = replace(splits, left_out=sorted({*splits.left_out, *left_out}))
    problems = verify(splits.folds, patients, list(labelled.files), {*splits.test, *splits.left_out})
    assert not problems, problems
    moved = write_splits(splits, wishes, patients, folder, overwrite=args.overwrite)
    print(table_of(splits, patients, stratum))
    for note in splits.notes:
        print(note)
    if splits.test or splits.left_out:
        print(f"Cases in no fold: {len(splits.test)} for testing, {len(splits.left_out)} left out.")
    if splits.test:
        of_test = {patients[case] for case in splits.test}
        siblings = [case for case in splits.left_out if patients[case] in of_test]
        print(
            "Training and pre-training with fold all take every case of imagesTr: move the test cases to imagesTs "
            f"before that{f', and {abbreviated(siblings)} too, which are of the same patients' if siblings else ''}."
        )
    if alike := alike_names({patients[case] for case in cases}):
        print(f"Are these patients different ones? {'; '.join(map(', '.join, alike))}.")
    if wishes.few:
        regular = " ".join(str(fold) for fold in range(len(splits.folds) // (1 + len(wishes.few))))
        print(f"Without -f nnU-Net predicts with folds 0 to 4, few labels or not: give -f {regular}.")
    for file in moved:
        print(f"Moved aside: {file}.")
    print(f"Wrote {folder / SPLITS}; train a line of the table with nnUNetv2_train {args.dataset} 3d_fullres FOLD.")


def table_of(splits: Splits, patients: Mapping[str, str], stratum: Mapping[str, str]) -> str:
    """A line for each fold: its number, what it is, cases and patients on both sides, and strata of the validation."""
    lines = [f"{'fold':>4}  {'what':34}  {'training':>18}  {'validation':>18}"]
    for number, (fold, meaning) in enumerate(zip(splits.folds, splits.meanings, strict=True)):
        sides = [f"{len(fold[side])} of {len({patients[case] for case in fold[side]})}" for side in ("train", "val")]
        lines.append(f"{number:4}  {meaning:34}  {sides[0]:>18}  {sides[1]:>18}")
    lines[0] += "  (cases of patients)"
    names = sorted(set(stratum.values()))
    if len(names) > 1:
        lines.append("Training + validation cases of each stratum, fold after fold:")
        width = max(map(len, names))
        for name in names:
            counts = (
                "+".join(str(sum(stratum[case] == name for case in fold[side])) for side in ("train", "val"))
                for fold in splits.folds
            )
            lines.append(f"  {name:{width}}  " + "  ".join(f"{count:>7}" for count in counts))
    return "\n".join(lines)
