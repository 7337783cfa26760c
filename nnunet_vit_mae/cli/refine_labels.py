"""Refine generously drawn labels: keep what reaches a threshold and remove small components. Input is never changed."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import parser_for, positive_int, whole_number
from nnunet_vit_mae.datasets.refinement_rule import CONNECTIVITIES, RefinementRule
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.unfinished import new_folder


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_refine_labels`; the exit code is 2 if a case could not be refined."""
    args = _parser().parse_args(argv)
    if args.dataset and (args.images or args.labels_folder):
        raise UserError("-d was given with -i or -l: give either a dataset or two folders.")
    if not args.dataset and not (args.images and args.labels_folder):
        raise UserError("There is nothing to refine: give a dataset with -d, or two folders with -i and -l.")
    if not math.isfinite(args.threshold):
        raise UserError(f"--threshold is {args.threshold}: give a number.")
    with new_folder(args.output, vars(args)):
        problems = _refine(args)
    for problem in problems:
        print(f"Not refined: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


def _refine(args: argparse.Namespace) -> list[str]:
    """Refine the labels, and return the problems of cases that could not be refined."""
    from nnunet_vit_mae.datasets.label_refinement import REPORT, refine_folder, refinement_table

    images, labels = args.images, args.labels_folder
    if args.dataset:
        from nnunet_vit_mae.nnunet.folders import find_dataset

        raw = find_dataset(args.dataset).raw
        images, labels = raw / "imagesTr", raw / "labelsTr"
        if missing := [folder for folder in (images, labels) if not folder.is_dir()]:
            raise UserError(f"{missing[0]} is missing: check -d, or give two folders with -i and -l.")
    values = tuple(args.labels) if args.labels else None
    rule = RefinementRule(args.threshold, args.min_voxels, args.connectivity, values)
    refined = refine_folder(images, labels, rule, args.output, channel=args.channel)
    print(refinement_table(refined.changes))
    print(f"Wrote {refined.written} labels and {REPORT} to {args.output}.")
    return refined.problems


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("mae3d_refine_labels", __doc__, "-d 501 -o refined --threshold 130")
    add = parser.add_argument
    add("-d", dest="dataset", metavar="ID", help="dataset number or name, whose imagesTr and labelsTr are used")
    add("-i", dest="images", type=Path, metavar="FOLDER", help="images, instead of -d")
    add("-l", dest="labels_folder", type=Path, metavar="FOLDER", help="labels, instead of -d")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new folder for the refined labels")
    rule = RefinementRule()
    add(
        "--threshold", type=float, default=rule.threshold, metavar="HU", help="lowest value that is kept inside a label"
    )
    add("--min_voxels", type=positive_int, default=rule.min_voxels, metavar="N", help="smallest component that is kept")
    add("--connectivity", choices=CONNECTIVITIES, default=rule.connectivity, help="components per slice or in 3D")
    add("--labels", type=positive_int, nargs="+", metavar="VALUE", help="label values to refine (otherwise all)")
    add("--channel", type=whole_number, default=0, metavar="N", help="channel to compare with the threshold")
    return parser
