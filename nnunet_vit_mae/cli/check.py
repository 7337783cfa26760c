"""Check a raw dataset before training: unreadable files, wrong labels, duplicates, outliers and leakage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import (
    add_dataset_argument,
    add_patient_arguments,
    parser_for,
    patient_columns,
    positive_int,
)
from nnunet_vit_mae.processes.signals import command


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_check`; the exit code is 2 if there are errors."""
    parser = parser_for("mae3d_check", __doc__, "-d 501", "-d 501 -o check --csv patients.csv")
    add = parser.add_argument
    add_dataset_argument(parser)
    add("-o", dest="output", type=Path, metavar="FOLDER", help="folder for the results (otherwise ./check_DATASET)")
    add_patient_arguments(parser)
    add("--list_empty", action="store_true", help="list cases with empty labels, which mae3d_split can leave out")
    add("-np", dest="processes", type=positive_int, default=4, metavar="N", help="number of processes")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.datasets.check.check_report import EMPTY, check_report, write_check
    from nnunet_vit_mae.datasets.check.checking import check_dataset
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.storage.files import make_folder

    dataset = find_dataset(args.dataset)
    output = args.output or Path(f"check_{dataset.name}")
    make_folder(output)
    patients = patient_columns(args, dataset.raw)
    check = check_dataset(dataset.raw, patients, dataset.preprocessed, args.processes)
    list_empty = args.list_empty or (output / EMPTY).is_file()  # an earlier list may be true no longer
    write_check(check, output, list_empty=list_empty)
    print(check_report(check, output, list_empty=list_empty))
    if check.errors:
        sys.exit(2)
