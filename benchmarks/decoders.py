"""What each decoder costs: parameters, floating-point operations, memory, and time of a training step.

Times are ratios to the `upscale` decoder (nearest) at the same token, steps taken in turn in this one process.

    python benchmarks/decoders.py          # prints the table of docs/decoders.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measuring import flops, taken_in_turn, training_step

from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.memory import finetuning_memory, segmentation_loss
from nnunet_vit_mae.presets import UPSAMPLINGS
from nnunet_vit_mae.settings import Network
from nnunet_vit_mae.units import GIB

UPSAMPLED = ("unetr", "sfpn", "upscale")
VARIANTS: dict[tuple[str, str], dict[str, Any]] = {
    **{(decoder, kind): {"decoder": decoder, "upsampling": kind} for decoder in UPSAMPLED for kind in UPSAMPLINGS},
    ("upscale, 2 convolutions", "nearest"): {"decoder": "upscale", "upscale_convolutions": 2},
    ("mae", ""): {"decoder": "mae"},
}
REFERENCE = ("upscale", "nearest")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--side", type=int, default=48, help="of the cubic patch")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    patch = (arguments.side,) * 3

    shape = f"{arguments.side}^3 patch, one channel, two classes"
    print(f"Size {arguments.size}, {shape}, {torch.get_num_threads()} thread.\n")
    print(
        "| token | decoder | upsampling | decoder's parameters (M) | forward GFLOP | GPU memory, batch 4 (GiB) | time |"
    )
    print("|---|---|---|---|---|---|---|")
    for side in arguments.tokens:
        networks = {
            name: Network(size=arguments.size, token=(side,) * 3, **choices) for name, choices in VARIANTS.items()
        }
        taken = taken_in_turn({key: step_of(network, patch) for key, network in networks.items()}, arguments.rounds)
        seconds = {key: statistics.median(values) for key, values in taken.items()}
        for (decoder, kind), network in networks.items():
            model = build_segmenter(network, 1, 2, drop_path=0.1)
            parameters = sum(p.numel() for p in model.decoder.parameters()) / 1e6
            memory = finetuning_memory(network, patch, 1, 2, 4) / GIB
            ratio = seconds[decoder, kind] / seconds[REFERENCE]
            print(
                f"| {side} | {decoder} | {kind} | {parameters:.2f} | {gigaflops(network, patch):.1f} | {memory:.2f} "
                f"| {ratio:.2f} |",
                flush=True,
            )


def step_of(network: Network, patch: tuple[int, ...]) -> Callable[[], None]:
    """Return a whole training step on one random patch."""
    model = build_segmenter(network, 1, 2, drop_path=0.1)
    volume, target = torch.randn(1, 1, *patch), torch.randint(2, (1, *patch))
    return training_step(model, lambda: segmentation_loss(model(volume), target))


def gigaflops(network: Network, patch: tuple[int, ...]) -> float:
    """Count operations of a forward pass on one patch."""

    def prepare() -> Callable[[], object]:
        model, volume = build_segmenter(network, 1, 2, drop_path=0.1).eval(), torch.empty(1, 1, *patch)
        return torch.no_grad()(lambda: model(volume))

    return flops(prepare) / 1e9


if __name__ == "__main__":
    main()
