"""Preprocess the unlabelled images (imagesUn) of a dataset with nnU-Net's preprocessor and plans."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nnunet_vit_mae.cli.arguments import add_plan_arguments, parser_for, positive_int
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.progress import with_progress


@command("Cases that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_preprocess`; the exit code is 2 if a case could not be preprocessed."""
    parser = parser_for("mae3d_preprocess", __doc__, "-d 501", "-d 501 -np 8")
    add_plan_arguments(parser)
    parser.add_argument("-np", dest="processes", type=positive_int, default=4, metavar="N", help="number of processes")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.nnunet.preprocessing import preprocess_unlabelled, raw_unlabelled_cases
    from nnunet_vit_mae.storage.files import locked

    plan = load_plan(find_dataset(args.dataset), args.plans, args.configuration)
    with locked(plan.unlabelled_folder):
        to_do, outcomes = preprocess_unlabelled(plan, args.processes)
        shown = with_progress(outcomes, total=to_do, unit="case", desc="preprocessing")
        failed = [outcome for outcome in shown if outcome.problem]

    total = len(raw_unlabelled_cases(plan))
    print(f"{total - len(failed)} of {total} unlabelled cases are in {plan.unlabelled_folder} ({to_do} were to do).")
    for outcome in sorted(failed, key=lambda outcome: outcome.case):
        print(f"Not preprocessed: {outcome.case} {outcome.problem}.", file=sys.stderr)
    if failed:
        sys.exit(2)
