"""Write a trained model, ours or nnU-Net's own, into one file for another site, without code, paths or case names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from nnunet_vit_mae.cli.arguments import add_model_arguments, parser_for
from nnunet_vit_mae.processes.signals import command


@command("Nothing is written: run the same command again.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_export`."""
    parser = parser_for("mae3d_export", __doc__, "-d 501 -o model.zip", "-d 501 -p ViT_M_p4 -f 0 1 2 3 4 -o model.zip")
    add = parser.add_argument
    add_model_arguments(parser)
    help_ = "checkpoints (default: the final one, and the calibrated one, if any)"
    add("-chk", dest="checkpoints", nargs="+", metavar="FILE", help=help_)
    add("-o", dest="output", required=True, type=Path, metavar="FILE.zip", help="archive to write")
    add("--case_names", action="store_true", help="keep the names of the cases that the threshold was fitted to")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet.exporting import export_model
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.models import best_checkpoint, find_model
    from nnunet_vit_mae.storage.layout import FINAL, model_folder

    dataset = find_dataset(args.dataset)
    folder = model_folder(dataset.results, args.trainer, args.plans, args.configuration)
    folds = list(dict.fromkeys(args.folds))
    checkpoints = args.checkpoints or [FINAL, best_checkpoint(folder, folds)]
    models = [
        find_model(dataset, args.plans, args.configuration, trainer=args.trainer, folds=folds, checkpoint=checkpoint)
        for checkpoint in dict.fromkeys(checkpoints)
    ]
    for note in export_model(models, args.output, case_names=args.case_names):
        print(note)
    names = ", ".join(model.checkpoint for model in models)
    print(f"Wrote {args.output}: {names} of {folder.name}, folds {' '.join(folds)}.")
    print(f"Install it elsewhere with mae3d_import {quote(args.output.name)}.")
