"""Install a model from a file of `mae3d_export` after checking all of it; nothing in the file is executed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from nnunet_vit_mae.cli.arguments import parser_for
from nnunet_vit_mae.processes.signals import command


@command("Nothing is written: run the same command again.")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_import`."""
    parser = parser_for("mae3d_import", __doc__, "model.zip")
    parser.add_argument("file", type=Path, metavar="FILE.zip", help="archive of mae3d_export")
    help_ = "folder of results to install it in (default: nnUNet_results)"
    parser.add_argument("-o", dest="results", type=Path, metavar="FOLDER", help=help_)
    parser.add_argument("--overwrite", action="store_true", help="move a model of the same name aside")
    args = parser.parse_args(argv)

    from nnunet_vit_mae.nnunet.folders import others_of_number, results_folder
    from nnunet_vit_mae.nnunet.importing import import_model
    from nnunet_vit_mae.nnunet.trainers import OUR_TRAINERS

    installed = import_model(args.file, args.results or results_folder(), overwrite=args.overwrite)
    card = installed.card
    if installed.moved:
        print(f"The earlier model is now {installed.moved}.")
    print(f"Wrote {installed.folder}: {', '.join(card.checkpoints)}, folds {' '.join(card.folds)}.")
    if others := others_of_number(card.dataset):
        print(f"{', '.join(others)} has the same number: from now on, name either dataset in full with -d.")
    if card.trainer in OUR_TRAINERS:
        print('First: export nnUNet_extTrainer="$(mae3d_trainers)", where it is not set yet.')
    print(
        f"Predict with nnUNetv2_predict -i IN -o OUT -d {quote(card.dataset)} -c {card.configuration} -p {card.plans} "
        f"-tr {card.trainer} -f {' '.join(card.folds)} -chk {card.checkpoints[-1]}."
    )
