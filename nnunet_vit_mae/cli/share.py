"""Write a pre-trained encoder with a model card in the layout of the Hugging Face hub; with --repo, push it there."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.cli.arguments import add_plan_arguments, parser_for
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.hub import REPOSITORY, push
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.storage.unfinished import new_folder


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_share`."""
    args = _parser().parse_args(argv)
    if args.public and not args.repo:
        raise UserError("--public is for a repository on the hub: name it with --repo.")

    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.sharing.model_folder import write_model_folder
    from nnunet_vit_mae.storage.layout import encoder_file

    dataset = find_dataset(args.dataset)
    encoder = encoder_file(dataset.results, args.plans, args.configuration, args.fold)
    if not encoder.is_file():
        plan = load_plan(dataset, args.plans, args.configuration)  # raises what is wrong with -p and -c
        raise UserError(f"There is no encoder {encoder}: run mae3d_pretrain {plan.flags_text} -f {args.fold} first.")
    with new_folder(args.output, vars(args)):
        files = write_model_folder(
            encoder, args.output, licence=args.licence, repository=args.repo, case_hashes=args.case_hashes
        )
        print(f"Wrote {', '.join(files)} to {args.output}: read {args.output / 'README.md'} before others do.")
        if args.repo:
            address = push(args.output, files, args.repo, public=args.public)
            print(f"Pushed to {args.repo}. Others use it with mae3d_plan --encoder {address}")


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(
        "mae3d_share",
        __doc__,
        "-d 501 -o shared --licence cc-by-4.0",
        "-d 501 -p ViT_M_p4 -o shared --repo owner/name",
    )
    add = parser.add_argument
    add_plan_arguments(parser)
    add("-f", dest="fold", default="all", help="fold of the pre-training, or all")
    add("-o", dest="output", required=True, type=Path, metavar="FOLDER", help="new folder to write")
    add(
        "--licence",
        type=_licence,
        default="other",
        metavar="ID",
        help="licence of the weights, as the hub spells it, e.g. cc-by-4.0",
    )
    add("--case_hashes", action="store_true", help="keep the hashes of case names, which show who was in pre-training")
    add("--repo", type=_repository, metavar="OWNER/NAME", help="repository on the hub to push to, private if it is new")
    add("--public", action="store_true", help="make a new repository public")
    return parser


def _repository(text: str) -> str:
    if not re.fullmatch(REPOSITORY, text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text} is not OWNER/NAME")
    return text


def _licence(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
        raise argparse.ArgumentTypeError(f"{text} is not a licence as the hub spells it, such as cc-by-4.0")
    return text
