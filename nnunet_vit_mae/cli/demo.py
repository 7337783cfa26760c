"""Run the whole workflow on synthetic CT: pre-trained ViT, ViT from scratch and nnU-Net side by side, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import parser_for, whole_number
from nnunet_vit_mae.processes.signals import command


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_demo`."""
    parser = parser_for("mae3d_demo", __doc__, "-o demo")
    parser.add_argument("-o", dest="output", type=Path, default=Path("mae3d_demo"), metavar="FOLDER", help="new folder")
    parser.add_argument("--seed", type=whole_number, default=0, help="random seed of phantoms and networks")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.demonstration import demonstrate

    page = demonstrate(args.output.resolve(), seed=args.seed)
    print(f"Wrote results.png and all other files to {args.output}; reconstructions are in its results/.")
    print(f"The report: {page.as_uri()}")
