"""What rotary positions cost: a step of pre-training with each kind of positions, against sine-cosine ones alone.

A step is forward, norm-pix loss, backward, clipping and AdamW (mask ratio 0.9), in fp32 on one CPU thread, or with
`--device cuda` on a GPU in bf16. All kinds take their steps in turn, and ratios are medians over the rounds.

    python benchmarks/positions.py      # prints the table of docs/speed.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import taken_in_turn, training_step
from torch import Tensor

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.presets import POSITIONS
from nnunet_vit_mae.settings import Network, Pretraining

SCENES = [(48, 8, 4), (96, 8, 1)]  # side of the cubic patch, token, batch
SIZES_SHOWN = ("XS", "S")


def main() -> None:
    """Print a row for each size and scene."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES_SHOWN)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| case | {' | '.join(f'{kind}, ms | ratio' for kind in POSITIONS)} |")
    print("|---" * (1 + 2 * len(POSITIONS)) + "|")
    for size in arguments.sizes:
        for side, token, batch in SCENES:
            steps = {
                kind: step_of(kind, size, side, token, batch, torch.device(arguments.device)) for kind in POSITIONS
            }
            seconds = taken_in_turn(steps, arguments.rounds)
            cells = [f"size {size}, {side}^3, token {token}, batch {batch}"]
            for own in seconds.values():
                ratio = statistics.median(a / b for a, b in zip(own, seconds["sine_cosine"], strict=True))
                cells += [f"{1000 * statistics.median(own):.0f}", f"{ratio:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def step_of(kind: str, size: str, side: int, token: int, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a training step with one kind of positions; masks differ from step to step."""
    torch.manual_seed(0)
    protocol = Pretraining(batch_size=batch)
    network = Network(size=size, token=(token,) * 3, positions=kind)
    model = build_autoencoder(network, 1, protocol).to(device)
    volume = torch.randn(batch, 1, side, side, side, device=device)
    masking = Masking(mask_ratio=protocol.mask_ratio)

    def loss() -> Tensor:
        masks = masking.draw(torch.rand(batch, (side // token) ** 3)).to(device)
        with autocast(device):
            return reconstruction_loss(model(volume, masks), norm_pix=True)

    return training_step(model, loss)


if __name__ == "__main__":
    main()
