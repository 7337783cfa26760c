"""Predict test cases with all contrasts, and again with some taken away, and compare their Dice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import add_device_argument, add_plan_arguments, parser_for, usable_device
from nnunet_vit_mae.errors import exit_on_user_error
from nnunet_vit_mae.files import refuse_in_use


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_omit`."""
    parser = parser_for("mae3d_omit", __doc__)
    add_plan_arguments(parser)
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainerAMAE", metavar="NAME", help="any trainer")
    parser.add_argument("-f", dest="folds", nargs="+", default=["0"], metavar="FOLD", help="folds that were trained")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="checkpoint")
    parser.add_argument("-i", dest="images", required=True, type=Path, metavar="FOLDER", help="images to predict")
    parser.add_argument("-r", dest="references", required=True, type=Path, metavar="FOLDER", help="their labels")
    parser.add_argument("--omit", nargs="+", required=True, metavar="NAME", help="contrasts to take away, all at once")
    parser.add_argument("-o", dest="output", required=True, type=Path, metavar="FOLDER", help="new folder")
    add_device_argument(parser, "cuda")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet import omission, omission_table
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.models import find_model

    device = usable_device(args.device).type
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images, references, output = (path.resolve() for path in (args.images, args.references, args.output))
    refuse_in_use(output)
    chosen = {"trainer": args.trainer, "folds": args.folds, "checkpoint": args.checkpoint}
    model = find_model(find_dataset(args.dataset), args.plans, args.configuration, **chosen)
    channels = omission.find_channels(model.plan, args.omit)
    studies = omission.find_omission_cases(model.plan, images, references, channels)
    print(omission.summary(model.plan, studies, channels), flush=True)
    rows = omission.omit(model, studies, channels, images=images, output=output, device=device)
    print(omission_table.omission_table(rows, [model.plan.channel_names[channel] for channel in channels]))
    print(f"Wrote omission.csv, log.txt and both predictions to {args.output}.")
