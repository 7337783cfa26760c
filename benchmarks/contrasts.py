"""Batches of studies with different numbers of contrasts: tokens lost to padding, and the time they would cost.

Our groups (studies with the same number of contrasts) against padding each batch to its richest study. Steps are
taken in turn in this one process; the padded step works on that many contrasts for every study of the batch.

    python benchmarks/contrasts.py         # prints the table of docs/explanation.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from unittest.mock import patch

import numpy as np
import torch
from measuring import training_step

from nnunet_vit_mae.networks import grouping
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.pretraining.loss import PretrainingLoss
from nnunet_vit_mae.settings import Network, Pretraining

# contrasts per study: eight sessions of multiple sclerosis (dataset 506), and AMAE's seven, each one present by chance
MIXTURES = {"506": [4, 4, 4, 2, 3, 3, 2, 2], "1 to 7, alike": list(range(1, 8))}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--side", type=int, default=64, help="of the cubic patch")
    parser.add_argument("--token", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    shape = f"{arguments.side}^3 patch, token {arguments.token}, batch {arguments.batch}"
    print(f"Size {arguments.size}, {shape}, mask ratio 0.7.\n")
    print("| contrasts per study | tokens that would be padding | tokens that are padding | time, ours / padded |")
    print("|---|---|---|---|")
    for name, mixture in MIXTURES.items():
        padding, ratio = compare(mixture, arguments)
        print(f"| {name} | {padding:.0%} | 0% | {ratio:.2f} |", flush=True)


def compare(mixture: list[int], arguments: argparse.Namespace) -> tuple[float, float]:
    """Share of padding over many random batches, and the ratio of the times of some of them."""
    random = np.random.default_rng(0)
    batches = random.choice(mixture, (1000, arguments.batch))
    padding = 1 - batches.sum() / (batches.max(axis=1) * arguments.batch).sum()

    contrasts = max(mixture)
    network = Network(size=arguments.size, token=(arguments.token,) * 3, decoder="unetr", adaptive=True)
    model = build_autoencoder(network, contrasts, Pretraining())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens, masking = (arguments.side // arguments.token) ** 3, Masking(mask_ratio=0.7)

    def seconds(counts: np.ndarray) -> float:
        volume = torch.randn(arguments.batch, contrasts, *(arguments.side,) * 3)
        for study, count in enumerate(counts):
            volume[study, count:] = 0
        present = [list(range(count)) for count in counts]
        masks = masking.draw(torch.rand(int(counts.sum()), tokens))
        started = time.perf_counter()
        loss = reconstruction_loss(model(volume, masks, present), norm_pix=False)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return time.perf_counter() - started

    seconds(batches[0])  # the first step warms up
    pairs = [(seconds(counts), seconds(np.full_like(counts, counts.max()))) for counts in batches[: arguments.rounds]]
    return padding, statistics.fmean(ours for ours, _ in pairs) / statistics.fmean(padded for _, padded in pairs)


def step_of(
    run: str, mixture: Sequence[int], size: str, side: int, token: int, batch: int, device: torch.device
) -> Callable[[], None]:
    """Return a step on studies that take turns in their numbers of contrasts, `packed` or in `groups`."""
    contrasts, counts = max(mixture), list(islice(cycle(mixture), batch))
    network, protocol = Network(size=size, token=(token,) * 3, decoder="unetr", adaptive=True), Pretraining()
    with device:
        model = build_autoencoder(network, contrasts, protocol)
        volume = torch.randn(batch, contrasts, side, side, side)
    masks = Masking(mask_ratio=0.7).draw(torch.rand(sum(counts), (side // token) ** 3)).to(device)
    present, module = [list(range(count)) for count in counts], PretrainingLoss(model)
    step = training_step(model, lambda: module(volume, masks, present, norm_pix=False)[0])

    def decided() -> None:
        with patch.object(grouping, "packs", lambda _: run == "packed"):
            step()

    return decided


if __name__ == "__main__":
    main()
