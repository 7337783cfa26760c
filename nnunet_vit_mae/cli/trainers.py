"""Print the folder of the trainers, for nnU-Net's plug-in variable: export nnUNet_extTrainer="$(mae3d_trainers)"."""

from __future__ import annotations

from collections.abc import Sequence

from nnunet_vit_mae.cli.arguments import parser_for


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_trainers`."""
    parser_for("mae3d_trainers", __doc__, "").parse_args(argv)

    from nnunet_vit_mae.installation import trainers_folder

    print(trainers_folder())
