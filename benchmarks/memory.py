"""The planner's estimate of training memory against what a step on this CPU really takes (fp32).

Each case runs in a fresh process, whose resident memory is compared before the network is built and at its peak.

    python benchmarks/memory.py            # prints the table of docs/decoders.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from measuring import peak_memory, printed_apart, training_step

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.memory import finetuning_memory, pretraining_memory, segmentation_loss
from nnunet_vit_mae.settings import Network, Pretraining, token_grid
from nnunet_vit_mae.units import MIB

PATCH = (40, 48, 56)


@dataclass(frozen=True)
class Case:
    """A training step; `phase` is finetuning or pretraining."""

    phase: str
    size: str
    token: tuple[int, int, int]
    decoder: str
    upsampling: str
    batch: int
    patch: tuple[int, int, int] = PATCH


@dataclass(frozen=True)
class Sizes:
    """Peak bytes: measured and estimated in fp32, and estimated for a GPU (bf16)."""

    measured: int
    estimated: int
    on_gpu: int


CASES = [
    *(Case("finetuning", "S", (8, 8, 8), decoder, "nearest", 2) for decoder in ("upscale", "sfpn", "unetr", "mae")),
    *(Case("finetuning", "S", (8, 8, 8), decoder, "transposed", 2) for decoder in ("upscale", "sfpn", "unetr")),
    *(Case("finetuning", "S", (4, 4, 4), decoder, "nearest", 1) for decoder in ("unetr", "mae")),
    *(Case("finetuning", "M", (16, 16, 16), decoder, "nearest", 2) for decoder in ("unetr", "sfpn", "mae")),
    Case("finetuning", "M", (8, 8, 8), "upscale", "nearest", 2),
    Case("finetuning", "S", (2, 8, 8), "unetr", "nearest", 1),
    Case("pretraining", "S", (8, 8, 8), "mae", "nearest", 8),
    Case("pretraining", "S", (4, 4, 4), "mae", "nearest", 2),
    Case("pretraining", "M", (8, 8, 8), "mae", "nearest", 4),
    Case("pretraining", "B", (16, 16, 16), "mae", "nearest", 4),
]


def compare(cases: Iterable[Case]) -> Iterator[tuple[Case, Sizes]]:
    """Measure and estimate each case."""
    for case in cases:
        yield case, Sizes(**json.loads(printed_apart(__file__, "--case", json.dumps(dataclasses.asdict(case)))))


def run(case: Case) -> Sizes:
    """Take the step, in a process that has done nothing else."""
    network = Network(size=case.size, token=case.token, decoder=case.decoder, upsampling=case.upsampling)
    protocol = Pretraining(batch_size=case.batch)

    def prepare() -> Callable[[], None]:
        volume = torch.randn(case.batch, 1, *case.patch)
        if case.phase == "finetuning":
            model = build_segmenter(network, 1, 2, drop_path=0.1)
            target = torch.zeros(case.batch, *case.patch, dtype=torch.long)
            return training_step(model, lambda: segmentation_loss(model(volume), target))
        model = build_autoencoder(network, 1, protocol)
        noise = torch.rand(case.batch, math.prod(token_grid(case.patch, case.token)))
        masks = Masking(mask_ratio=protocol.mask_ratio).draw(noise)
        return training_step(model, lambda: reconstruction_loss(model(volume, masks), norm_pix=protocol.norm_pix))

    measured = peak_memory(prepare)

    def estimate(*, on_gpu: bool) -> int:
        if case.phase == "finetuning":
            return finetuning_memory(network, case.patch, 1, 2, case.batch, on_gpu=on_gpu)
        return pretraining_memory(network, protocol, case.patch, 1, case.batch, on_gpu=on_gpu)

    return Sizes(measured, estimate(on_gpu=False), estimate(on_gpu=True))


def main() -> None:
    """Print the table, or (with `--case`) run one case for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        lists = {name: tuple(value) for name, value in arguments.case.items() if isinstance(value, list)}
        print(json.dumps(dataclasses.asdict(run(Case(**(arguments.case | lists))))))
        return
    print(f"Patch {' x '.join(map(str, PATCH))}, one channel, two classes. MiB.\n")
    print("| step | size | token | decoder | upsampling | batch | measured | estimated | ratio | estimated, GPU bf16 |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for case, sizes in compare(CASES):
        token = " x ".join(map(str, case.token))
        megabytes = [round(size / MIB) for size in (sizes.measured, sizes.estimated, sizes.on_gpu)]
        print(
            f"| {case.phase} | {case.size} | {token} | {case.decoder} | {case.upsampling} | {case.batch} "
            f"| {megabytes[0]} | {megabytes[1]} | {sizes.estimated / sizes.measured:.2f} | {megabytes[2]} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
