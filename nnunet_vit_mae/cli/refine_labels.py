"""Refine circled labels: keep what is above a threshold inside them, and drop single voxels. Input is never changed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_vit_mae.cli.arguments import parser_for, positive_int, whole_number
from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.files import refuse_in_use

if TYPE_CHECKING:
    from nnunet_vit_mae.datasets.label_refinement import Change


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_refine_labels`; the exit code is 2 when a case could not be refined."""
    parser = parser_for("mae3d_refine_labels", __doc__)
    add = parser.add_argument
    add("-d", dest="dataset", metavar="ID", help="data set number or name: its imagesTr and labelsTr")
    add("-i", dest="images", type=Path, metavar="FOLDER", help="images, instead of -d")
    add("-l", dest="labels_folder", type=Path, metavar="FOLDER", help="labels, instead of -d")
    add("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new folder for the refined labels")
    add("--threshold", type=float, default=130.0, metavar="HU", help="smallest value inside the circle that stays")
    add("--min_voxels", type=positive_int, default=2, metavar="N", help="smallest component that stays")
    add("--connectivity", choices=("2d", "3d"), default="2d", help="components in each slice across z, or in 3D")
    add("--labels", type=positive_int, nargs="+", metavar="VALUE", help="label values to refine, else all foreground")
    add("--channel", type=whole_number, default=0, metavar="N", help="channel that the threshold is for")
    args = parser.parse_args(argv)
    if args.dataset and (args.images or args.labels_folder):
        raise UserError("-d was given with -i or -l: give either a data set, or two folders.")
    if not args.dataset and not (args.images and args.labels_folder):
        raise UserError("Nothing was given to refine: give a data set with -d, or two folders with -i and -l.")
    if not math.isfinite(args.threshold):
        raise UserError(f"--threshold {args.threshold}: give a number.")
    refuse_in_use(args.output)

    from tqdm import tqdm

    from nnunet_vit_mae.datasets.label_refinement import (
        REPORT,
        Rule,
        find_pairs,
        refine_all,
        values_to_refine,
        write_changes,
    )

    images, labels = args.images, args.labels_folder
    if args.dataset:
        from nnunet_vit_mae.nnunet.folders import find_dataset

        raw = find_dataset(args.dataset).raw
        images, labels = raw / "imagesTr", raw / "labelsTr"
    rule = Rule(args.threshold, args.min_voxels, args.connectivity, tuple(args.labels) if args.labels else None)
    pairs = find_pairs(images, labels, args.channel)
    values = values_to_refine(rule, labels.resolve().parent / "dataset.json")
    changes, problems = [], []
    for _, of_case, problem in tqdm(
        refine_all(pairs, rule, values, args.output), total=len(pairs), unit="case", desc="refining"
    ):
        changes += of_case
        problems += [problem] if problem else []
    write_changes(changes, args.output / REPORT)
    print(refinement_table(changes))
    print(f"Wrote {len(pairs) - len(problems)} labels and {REPORT} to {args.output}.")
    for problem in problems:
        print(f"Not refined: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


def refinement_table(changes: Sequence[Change]) -> str:
    """Voxels of each case and label that has changed, and the sums; cases left without the label are named."""
    header = f"{'case':24}  label   before  below threshold  in small components    after"
    row = "{:24}  {:5}  {:7}  {:15}  {:19}  {:7}".format
    changed = [change for change in changes if change.after != change.before]
    lines = [header]
    for one in changed:
        lines.append(
            row(one.case, one.label, one.before, one.below_threshold, one.in_small_components, one.after)
            + ("  (now empty)" if not one.after else "")
        )
    parts = ("before", "below_threshold", "in_small_components", "after")
    lines.append(row("all", "", *(sum(getattr(change, part) for change in changes) for part in parts)))
    lines.append(f"{len(changed)} of {len(changes)} labels have changed.")
    return "\n".join(lines)
