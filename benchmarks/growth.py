"""How time and memory of pre-training grow with tokens, cases and contrasts, and with which exponents.

Tokens: a step of size `--size` on volumes of more and more tokens (token 4, batch 1); cases: making the list of
samples and drawing from it, for datasets of 10 to 100,000 files; contrasts: a step of the adaptive network with 1 to 8
contrasts per study. One CPU thread, fp32; memory in fresh processes. An exponent is that of the last two rows.

    python benchmarks/growth.py            # prints the tables; the largest steps take minutes
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import exponent, peak_memory, printed_apart, taken_in_turn, training_step

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.units import MIB

# z y x in tokens: 64, 512, 4,096 and 32,768 of them, and twice as many between
GRIDS = [(4, 4, 4), (4, 4, 8), (8, 8, 8), (8, 8, 16), (16, 16, 16), (16, 16, 32), (32, 32, 32)]
CASES = [10, 100, 1_000, 10_000, 100_000]
CONTRASTS = [1, 2, 4, 8]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--largest", type=int, default=32_768, help="number of tokens")
    parser.add_argument("--only", choices=("tokens", "cases", "contrasts"))
    parser.add_argument("--memory_of", nargs=2, metavar=("TABLE", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare = {
        "tokens": partial(step_of_tokens, arguments.size),
        "contrasts": partial(step_of_contrasts, arguments.size),
    }
    if arguments.memory_of:
        table, row = arguments.memory_of
        print(peak_memory(partial(prepare[table], int(row)), times=1))
        return
    tokens = [count for count in map(count_of, range(len(GRIDS))) if count <= arguments.largest]
    tables: dict[str, Callable[[], None]] = {
        "tokens": lambda: steps("tokens", tokens, prepare["tokens"], arguments),
        "contrasts": lambda: steps("contrasts", CONTRASTS, prepare["contrasts"], arguments),
        "cases": cases,
    }
    for name, table in tables.items():
        if arguments.only in (None, name):
            table()


def steps(
    name: str, sizes: Sequence[int], prepare: Callable[[int], Callable[[], None]], arguments: argparse.Namespace
) -> None:
    """Print time and memory of a step, a row for each size."""
    print(f"| {name} | s per step | MiB |\n|---|---|---|")
    seconds, peaks = [], []
    for row, size in enumerate(sizes):
        seconds.append(statistics.median(taken_in_turn({name: prepare(row)}, arguments.rounds)[name]))
        peaks.append(int(printed_apart(__file__, "--size", arguments.size, "--memory_of", name, str(row))) / MIB)
        print(f"| {size:,} | {seconds[-1]:.3g} | {peaks[-1]:.0f} |", flush=True)
    print(f"| exponent | {exponent(sizes, seconds):.2f} | {exponent(sizes, peaks):.2f} |\n")


def cases() -> None:
    """Print the time to make the list of samples, and to find the files of a pass, by the number of files."""
    print("| cases | ms to begin | us per sample |\n|---|---|---|")
    drawing = MaskDrawing(masking=Masking(mask_ratio=0.9), token=(8, 8, 8))
    begins, draws = [], []
    for count in CASES:
        files = [Path(f"case_{number}.b2nd") for number in range(count)]
        crops: list[RandomCrops] = []

        def begin(files: Sequence[Path] = files, crops: list[RandomCrops] = crops) -> None:
            crops[:] = [RandomCrops(files, (64, 64, 64), drawing, seed=0)]
            crops[0].file_of(0)

        def draw(count: int = count, crops: list[RandomCrops] = crops) -> None:
            for index in range(count):
                crops[0].file_of(index)

        taken = taken_in_turn({"begin": begin, "draw": draw}, 5)
        begins.append(1e3 * statistics.median(taken["begin"]))
        draws.append(1e6 * statistics.median(taken["draw"]) / count)
        print(f"| {count:,} | {begins[-1]:.3g} | {draws[-1]:.2g} |", flush=True)
    print(f"| exponent | {exponent(CASES, begins):.2f} | {exponent(CASES, draws):.2f} |\n")


def count_of(row: int) -> int:
    """Return the number of tokens in a grid."""
    z, y, x = GRIDS[row]
    return z * y * x


def step_of_tokens(size: str, row: int) -> Callable[[], None]:
    """Return a step on one volume with a grid of tokens."""
    network = Network(size=size, token=(4, 4, 4))
    return step_of(network, torch.randn(1, 1, *(4 * tokens for tokens in GRIDS[row])), count_of(row), ratio=0.9)


def step_of_contrasts(size: str, row: int) -> Callable[[], None]:
    """Return a step on two studies that both have so many contrasts, with 64 tokens per contrast."""
    network = Network(size=size, token=(16, 16, 16), decoder="unetr", adaptive=True)
    volume = torch.randn(2, CONTRASTS[row], 64, 64, 64)
    return step_of(network, volume, 64, ratio=0.7)


def step_of(network: Network, volume: torch.Tensor, tokens: int, *, ratio: float) -> Callable[[], None]:
    """Return a step on the volume, with random masks, for so many tokens of an image."""
    studies, channels = volume.shape[:2]
    model = build_autoencoder(network, channels, Pretraining())
    masking, present = Masking(mask_ratio=ratio), [list(range(channels))] * studies

    def loss() -> torch.Tensor:
        masks = masking.draw(torch.rand(network.token_sequences(channels) * studies, tokens))
        return reconstruction_loss(model(volume, masks, present), norm_pix=True)

    return training_step(model, loss)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
