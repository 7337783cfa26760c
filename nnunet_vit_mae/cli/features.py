"""Draw the feature maps of trained networks on one case, and measure how much checkerboard is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import add_device_argument, parser_for, usable_device
from nnunet_vit_mae.errors import exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_features`."""
    parser = parser_for("mae3d_features", __doc__)
    parser.add_argument("-d", dest="dataset", required=True, metavar="ID", help="data set number or name, e.g. 501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres", metavar="NAME", help="configuration")
    parser.add_argument("-p", dest="plans", nargs="+", required=True, metavar="NAME", help="plans, a row for each")
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainerViTMAE", metavar="NAME", help="trainer of all")
    parser.add_argument("-f", dest="fold", default="0", help="fold that was trained: 0 to 4, or all")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="FILE", help="checkpoint")
    parser.add_argument("--case", metavar="NAME", help="training case (default: the first validation case of the fold)")
    parser.add_argument("-o", dest="output", required=True, metavar="FILE", type=Path, help="picture to write, a .png")
    add_device_argument(parser, "cpu")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet.features import checkerboard_table, draw_features, refuse_without_features
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.models import find_model

    device = usable_device(args.device)
    dataset = find_dataset(args.dataset)
    refuse_without_features(args.trainer)
    chosen = {"trainer": args.trainer, "folds": [args.fold], "checkpoint": args.checkpoint}
    runs = [find_model(dataset, name, args.configuration, **chosen) for name in dict.fromkeys(args.plans)]
    shares = draw_features(runs, args.case, args.output, device)
    print(checkerboard_table(shares))
    print(f"Wrote {args.output} and {args.output.with_suffix('.csv')}.")
