"""Predict test cases with all contrasts and again without some of them, and compare the Dice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import (
    add_device_argument,
    add_model_arguments,
    chosen_model,
    parser_for,
    usable_device,
)
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.layout import FINAL
from nnunet_vit_mae.storage.unfinished import new_folder


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_omit`."""
    parser = parser_for("mae3d_omit", __doc__, "-d 501 -i imagesTs -r labelsTs --omit T2 -o omission")
    add = parser.add_argument
    add_model_arguments(parser, "nnUNetTrainerAMAE")
    add("-chk", dest="checkpoint", default=FINAL, metavar="FILE", help="checkpoint to predict with")
    add("-i", dest="images", required=True, type=Path, metavar="FOLDER", help="images to predict")
    add("-r", dest="references", required=True, type=Path, metavar="FOLDER", help="reference segmentations")
    add("--omit", nargs="+", required=True, metavar="NAME", help="contrasts to omit, all at once")
    add("-o", dest="output", required=True, type=Path, metavar="FOLDER", help="new folder to write")
    add_device_argument(parser, "cuda")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet import omission
    from nnunet_vit_mae.nnunet.omission_table import omission_table

    device = usable_device(args.device).type
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    images, references, output = (path.resolve() for path in (args.images, args.references, args.output))
    model = chosen_model(args)
    channels = omission.find_channels(model.plan, args.omit)
    cases = omission.find_omission_cases(model.plan, images, references, channels)
    print(omission.summary(model.plan, cases, channels), flush=True)
    with new_folder(output, vars(args)):
        rows = omission.omit(model, cases, channels, images=images, output=output, device=device)
    print(omission_table(rows, [model.plan.channel_names[channel] for channel in channels]))
    print(f"Wrote omission.csv, log.txt and both predictions to {args.output}.")
