"""Split a dataset by patient for nnU-Net, so that no patient is in more than one part, or verify existing splits."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import (
    add_dataset_argument,
    add_patient_arguments,
    parser_for,
    patient_columns,
    positive_int,
    share,
    whole_number,
)
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import command

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.split.cohort import Cohort
    from nnunet_vit_mae.evaluation.split_figure import ScanProperties

FIGURE_ENDINGS = (".png", ".svg")


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_split`; the exit code is 2 if `--verify` finds a problem."""
    args = _parser().parse_args(argv)
    _refuse_contradictions(args)

    from nnunet_vit_mae.datasets.split.cohort import StrataOptions, read_cohort, split_cohort, verify_folder
    from nnunet_vit_mae.datasets.split.files import SPLITS, collect_test_cases
    from nnunet_vit_mae.datasets.split.split_report import split_report
    from nnunet_vit_mae.datasets.split.splits import SplitOptions
    from nnunet_vit_mae.evaluation.words import count_cases
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.storage.files import refuse_in_use

    dataset = find_dataset(args.dataset)
    folder = args.output or dataset.preprocessed
    cohort = read_cohort(dataset.raw, dataset.preprocessed, patient_columns(args, dataset.raw), folder)
    if cohort.note:
        print(cohort.note)
    scans = _properties(cohort, dataset.raw) if args.figure else None
    if args.test_folder:
        refuse_in_use(args.test_folder, "--test_folder")
    if args.verify:
        summary, problems = verify_folder(cohort, folder)
        for problem in problems:
            print(f"Error: {folder / SPLITS}: {problem}.", file=sys.stderr)
        if problems:
            sys.exit(2)
        print(summary)
    else:
        few = tuple(sorted(set(args.few)))
        options = SplitOptions(args.folds, args.development, args.test, few, args.one_per_patient, args.seed)
        strata = StrataOptions(args.stratify, args.stratify_volume)
        written = split_cohort(cohort, options, folder, strata, leave_out=args.leave_out, overwrite=args.overwrite)
        print(split_report(written, cohort, args.dataset))
    if scans:
        _draw(folder, scans, args.figure)
    if args.test_folder:
        images, labels = args.test_folder / "images", args.test_folder / "labels"
        count = collect_test_cases(dataset.raw, folder, images, labels)
        print(f"Linked {count_cases(count)} held out for testing to {images} and {labels}.")


def _properties(cohort: Cohort, raw: Path) -> ScanProperties:
    """Read what the figure shows, before anything is written."""
    from nnunet_vit_mae.datasets.acquisition import KERNEL, find_scans_table, read_scans_table, slice_thickness
    from nnunet_vit_mae.datasets.split.files import label_volumes
    from nnunet_vit_mae.evaluation.split_figure import ScanProperties

    file = find_scans_table([raw])
    table = cohort.table or (read_scans_table(file, cohort.cases) if file else None)
    volumes = {case: float(text) for case, text in label_volumes(cohort.labels).items()}
    return ScanProperties(volumes, slice_thickness(table) if table else {}, table.known(KERNEL) if table else {})


def _draw(folder: Path, scans: ScanProperties, file: Path) -> None:
    from nnunet_vit_mae.datasets.split.files import SPLITS, read_split_record, read_splits
    from nnunet_vit_mae.datasets.split.splits import parts_of
    from nnunet_vit_mae.evaluation.split_figure import split_figure
    from nnunet_vit_mae.plots import save_figure

    parts = parts_of(read_splits(folder / SPLITS), read_split_record(folder).test)
    save_figure(split_figure(parts, scans), file)
    print(f"Wrote {file}.")


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(
        "mae3d_split",
        __doc__,
        "-d 501 --csv patients.csv",
        "-d 501 --csv patients.csv --test 0.2 --few 10 25",
        "-d 501 --verify --test_folder held_out",
    )
    add = parser.add_argument
    add_dataset_argument(parser)
    add("-o", dest="output", type=Path, metavar="FOLDER", help="output folder (otherwise where nnU-Net looks)")
    add_patient_arguments(parser)
    add("--folds", type=positive_int, default=5, metavar="N", help="number of cross-validation folds")
    add(
        "--development",
        type=share,
        default=0.0,
        metavar="SHARE",
        help="one fold that validates on this share of patients, instead of --folds",
    )
    add("--test", type=share, default=0.0, metavar="SHARE", help="share of patients to hold out of every fold")
    help_ = "link images and labels of the held-out cases to folders in this one"
    add("--test_folder", type=Path, metavar="FOLDER", help=help_)
    add("--stratify", nargs="+", default=[], metavar="COLUMN", help="columns to stratify by, e.g. the scanner")
    add("--stratify_volume", action="store_true", help="stratify by tertiles of the labelled volume")
    add(
        "--few",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="add folds with N training patients, for learning curves",
    )
    add("--one_per_patient", action="store_true", help="use one random case of each patient")
    add("--leave_out", type=Path, metavar="FILE", help="text file of cases to leave out, one per line")
    add("--seed", type=whole_number, default=0, metavar="N", help="random seed")
    add("--overwrite", action="store_true", help="move existing splits aside")
    add("--verify", action="store_true", help="only verify existing splits")
    add("--figure", type=Path, metavar="FILE", help="draw volume, slice thickness and kernel by part (.png or .svg)")
    return parser


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.figure and args.figure.suffix not in FIGURE_ENDINGS:
        raise UserError(f"--figure {args.figure} must end with {' or '.join(FIGURE_ENDINGS)}.")
    if args.figure and not args.figure.resolve().parent.is_dir():
        raise UserError(f"--figure {args.figure}: the folder {args.figure.parent} does not exist: make it first.")
    if args.test_folder and not (args.test or args.verify):
        raise UserError(
            f"--test_folder {args.test_folder} is for held-out cases: add --test, or --verify if there are some."
        )
    if not args.development and args.folds < 2:
        raise UserError(f"--folds {args.folds} is too few: give 2 or more, or a share for --development.")
    if args.development + args.test >= 1:
        raise UserError(
            f"--development {args.development:g} and --test {args.test:g} leave no patient to train on: give less."
        )
