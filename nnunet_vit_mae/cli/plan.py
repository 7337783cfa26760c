"""Write plans for the ViT: nnU-Net's plans with a `vit_mae` block, on the same preprocessed files."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from nnunet_vit_mae.cli.arguments import add_plan_arguments, parser_for, positive_float, positive_int, whole_number
from nnunet_vit_mae.errors import abbreviated
from nnunet_vit_mae.presets import DECODERS, SIZES, UPSAMPLINGS
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.recipes import merged, read_recipe

SAME_AS_PLANS = "plans"

logger = logging.getLogger(__name__)


@command()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_plan`."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.token and len(args.token) not in (1, 3):
        parser.error(f"--token takes one number or three (z y x), but {len(args.token)} were given")

    from nnunet_vit_mae.nnunet.encoders import find_encoder
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.planner import choose_settings
    from nnunet_vit_mae.nnunet.plans import load_plan, refuse_cascade
    from nnunet_vit_mae.nnunet.written_plans import refuse_name, trained_otherwise, write_plans

    source = load_plan(find_dataset(args.dataset), args.plans, args.configuration)
    refuse_cascade(source.configuration)
    refuse_name(source, args.output)
    if args.batch_size == SAME_AS_PLANS:
        args.batch_size = source.configuration.batch_size
    changes = merged(read_recipe(args.recipe) if args.recipe else {}, _changes(args))
    encoder = find_encoder(source, args.encoder, name=args.output, token=_token(args), token_order=args.token_order)
    settings, choices = choose_settings(source, changes, encoder=encoder, memory_target=args.gpu_memory_target)
    if encoder is not None:
        encoder.write_if_converted()
    before = trained_otherwise(source, args.output, settings)
    file = write_plans(source, args.output, settings)
    for choice in choices:
        print(f"{choice.name:20}  {choice.value:12}  {choice.reason}")
    print(f"Wrote {file}, with every other setting in its block vit_mae. Use it with -p {args.output}.")
    if before:
        logger.warning(
            "%s had another network in the plans %s and cannot be continued: give another name with -o to keep both.",
            abbreviated(before),
            args.output,
        )


def _parser() -> argparse.ArgumentParser:
    parser = parser_for(
        "mae3d_plan",
        __doc__,
        "-d 501 -o ViT_M_p4 --size M --token 4 --decoder mae",
        "-d 501 -o ViT_fits -gpu_memory_target 8",
        "-d 501 -o Paper --recipe vitiac",
    )
    add = parser.add_argument
    add_plan_arguments(parser, "plans to start from; if mae3d_plan wrote them, their settings are the defaults")
    add("-o", dest="output", required=True, metavar="NAME", help="name of the plans to write")
    add("--recipe", metavar="NAME|FILE", help="vitiac, amae or quick, or a JSON file with a part of the block")
    add("--size", choices=SIZES, help="size of the ViT (default: S)")
    add("--decoder", choices=DECODERS, help="segmentation decoder (default: unet; adaptive: unetr)")
    add("--token", nargs="+", type=positive_int, metavar="N", help="voxels of a token: one number, or three (z y x)")
    add("--upsampling", choices=UPSAMPLINGS, help="upsampling in the convolutional decoders (default: nearest)")
    add("--adaptive", action="store_true", default=None, help="a network for any number of contrasts per case (AMAE)")
    add(
        "--encoder",
        metavar="FILE|hf:OWNER/NAME@REVISION",
        help="start from this encoder, which sets size and token: one of ours, or a checkpoint of nnssl (OpenMind), "
        "timm or MONAI, which is converted; hf: an encoder of ours on the Hugging Face hub",
    )
    add(
        "--token_order",
        choices=("yzx", "zyx"),
        help="order in which a checkpoint of nnssl flattens its tokens (default: that of its trainer)",
    )
    add(
        "-gpu_memory_target",
        type=positive_float,
        metavar="GiB",
        help="reduce batches and enlarge the token until pre-training and fine-tuning fit this GPU memory",
    )
    add("--epochs", type=positive_int, help="epochs of fine-tuning and nnUNetTrainerBaseline (default: 1000)")
    add("--iterations", type=positive_int, help="iterations per epoch, for the same trainers (default: 250)")
    add(
        "--batch_size",
        type=_batch,
        metavar="N",
        help="batch size of fine-tuning (default: nnU-Net's, which the baseline always has); 'plans' is nnU-Net's",
    )
    add(
        "--mirroring",
        metavar="auto|none|AXES",
        help="axes along which fine-tuning and prediction mirror, such as zy (default: all, but none where labels name "
        "a side of the body)",
    )
    add("--lr", type=positive_float, help="peak learning rate of fine-tuning (default: 1e-3 with unet, otherwise 3e-4)")
    add("--seed", type=whole_number, help="random seed of fine-tuning and nnUNetTrainerBaseline (default: none)")
    return parser


def _batch(text: str) -> int | str:
    return text if text == SAME_AS_PLANS else positive_int(text)


def _changes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the block that the flags spell out; flags that were not given are left out."""
    network = {"token": _token(args)} | {
        name: getattr(args, name) for name in ("size", "decoder", "upsampling", "adaptive")
    }
    names = ("epochs", "iterations", "batch_size", "lr", "mirroring", "seed")
    block = {"network": network, "finetuning": {name: getattr(args, name) for name in names}}
    return {section: {k: v for k, v in values.items() if v is not None} for section, values in block.items()}


def _token(args: argparse.Namespace) -> list[int] | None:
    """Return the voxels of a token along z y x, if given."""
    return args.token and (args.token * 3 if len(args.token) == 1 else args.token)
