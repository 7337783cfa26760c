"""Segment a folder of scans, and write a table of volumes with warnings for the reader."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import (
    add_device_argument,
    add_plan_arguments,
    parser_for,
    positive_float,
    positive_int,
    usable_device,
    whole_number,
)
from nnunet_vit_mae.processes.signals import command


@command("Segmentations that are done are kept, and the same command goes on with the others.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_quantify`."""
    parser = parser_for("mae3d_quantify", __doc__, "-i scans -o volumes.csv -d 501")
    add = parser.add_argument
    add("-i", dest="images", required=True, type=Path, metavar="FOLDER", help="images, named as for nnU-Net")
    add("-o", dest="table", required=True, type=Path, metavar="TABLE.csv", help="table to write")
    add_plan_arguments(parser)
    add("-tr", dest="trainer", default="nnUNetTrainerViTMAE", metavar="NAME", help="trainer of the model")
    add("-f", dest="folds", nargs="+", default=["0"], metavar="FOLD", help="trained folds")
    add("-chk", dest="checkpoint", metavar="FILE", help="checkpoint (default: the calibrated one, if any)")
    add(
        "--cutoffs",
        nargs="+",
        type=positive_float,
        metavar="MM3",
        help="cutoffs between risk groups (default: quartiles)",
    )
    add("-num_parts", type=positive_int, default=1, metavar="N", help="number of parts to divide the cases into")
    add("-part_id", type=whole_number, default=0, metavar="K", help="part to process here, from 0")
    add_device_argument(parser, "cuda")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.models import find_model, model_folder
    from nnunet_vit_mae.nnunet.quantification import Part, best_checkpoint, quantify

    device = usable_device(args.device).type
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    part = Part(args.part_id, args.num_parts)
    dataset = find_dataset(args.dataset)
    folder = model_folder(dataset, args.trainer, args.plans, args.configuration)
    checkpoint = args.checkpoint or best_checkpoint(folder, args.folds)
    chosen = {"trainer": args.trainer, "folds": args.folds, "checkpoint": checkpoint}
    model = find_model(dataset, args.plans, args.configuration, **chosen)
    cutoffs = sorted(args.cutoffs) if args.cutoffs else None
    images, table = args.images.resolve(), args.table.resolve()
    written = quantify(model, images, table, part, cutoffs=cutoffs, device=device)
    print(f"Wrote {' and '.join(map(str, written))} with {checkpoint}; segmentations in {table.stem}_segmentations.")
