"""Pre-train the ViT encoder by masked autoencoding on a dataset's training and unlabelled images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from nnunet_vit_mae.cli.arguments import (
    add_device_argument,
    add_plan_arguments,
    parser_for,
    positive_float,
    positive_int,
    usable_device,
    whole_number,
)
from nnunet_vit_mae.pretraining import NOT_STARTED
from nnunet_vit_mae.processes.signals import command
from nnunet_vit_mae.units import GIB

CHANGES = ("epochs", "mask_ratio", "batch_size", "lr", "seed")  # flags that replace settings of the plans


@command(NOT_STARTED)
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `mae3d_pretrain`."""
    args = _parser().parse_args(argv)

    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.nnunet.pretraining import Machine, pretrain
    from nnunet_vit_mae.pretraining.distributed import is_rank_0, log_to_console, reported_once

    log_to_console()
    with reported_once():
        machine = Machine(
            device=usable_device(args.device),
            processes=args.num_gpus,
            readers=args.readers,
            cache_bytes=round((args.cache or 0) * GIB),
        )
        encoder = pretrain(
            load_plan(args.dataset, args.plans, args.configuration),
            args.fold,
            machine=machine,
            changes={name: value for name in CHANGES if (value := getattr(args, name)) is not None},
            resume=args.resume,
            adaptive=args.adaptive,
        )
    if is_rank_0():
        print(f"The encoder is {encoder}.")


def _parser() -> argparse.ArgumentParser:
    parser = parser_for("mae3d_pretrain", __doc__, "-d 501", "-d 501 -f 0 --c", "-d 501 -p ViT_M_p4 -num_gpus 4")
    add = parser.add_argument
    add_plan_arguments(parser)
    add("-f", dest="fold", default="all", help="fold whose training cases are used, or all")
    add("--epochs", type=positive_int, help="epochs, each with one sample per case (default: the plans')")
    add("--mask_ratio", type=positive_float, help="share of masked tokens (default: the plans')")
    add("--batch_size", type=positive_int, help="samples per step (default: the plans')")
    add("--lr", type=positive_float, help="peak learning rate (default: the plans' base_lr x batch / 256)")
    add(
        "--adaptive",
        action="store_true",
        help="pre-train a network for any number of contrasts per case, whatever the plans say",
    )
    add("--seed", type=whole_number, help="random seed of weights, crops and masks (default: the plans')")
    add("--c", dest="resume", action="store_true", help="continue from the last saved state")
    add_device_argument(parser, "cuda")
    add(
        "-num_gpus",
        type=positive_int,
        default=1,
        help="GPUs on this machine, each with a process and a share of every batch",
    )
    add(
        "-np",
        dest="readers",
        type=whole_number,
        metavar="N",
        help="processes that read crops for each GPU (default: up to 8; on a CPU the training itself reads)",
    )
    add(
        "--cache",
        type=positive_float,
        metavar="GiB",
        help="keep volumes in memory, in half precision, up to this size; on the GPU if all fit there",
    )
    return parser
