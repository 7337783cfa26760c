"""Draw the feature maps of trained networks on one case, and measure their checkerboard artefacts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import add_dataset_argument, add_device_argument, parser_for, usable_device
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.layout import FINAL


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_features`."""
    parser = parser_for("mae3d_features", __doc__, "-d 501 -p Nearest Transposed -o features.png")
    add = parser.add_argument
    add_dataset_argument(parser)
    add("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="nnU-Net configuration")
    add("-p", dest="plans", nargs="+", required=True, metavar="NAME", help="names of the plans, each drawn as a row")
    add("-tr", dest="trainer", default="nnUNetTrainerViTMAE", metavar="NAME", help="trainer of the models")
    add("-f", dest="fold", default="0", help="trained fold: its number, or all")
    add("-chk", dest="checkpoint", default=FINAL, metavar="FILE", help="checkpoint of the models")
    add("--case", metavar="NAME", help="preprocessed case (default: first validation case of the fold)")
    add("-o", dest="output", required=True, metavar="FILE", type=Path, help="figure to write, a .png")
    add_device_argument(parser, "cpu")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet.features import checkerboard_table, draw_features, refuse_without_features
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.models import find_model

    device = usable_device(args.device)
    dataset = find_dataset(args.dataset)
    refuse_without_features(args.trainer)
    chosen = {"trainer": args.trainer, "folds": [args.fold], "checkpoint": args.checkpoint}
    models = [find_model(dataset, name, args.configuration, **chosen) for name in dict.fromkeys(args.plans)]
    checkerboards = draw_features(models, args.case, args.output, device)
    print(checkerboard_table(checkerboards))
    print(f"Wrote {args.output} and {args.output.with_suffix('.csv')}.")
