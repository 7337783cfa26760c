"""What the options of the pre-training decoder save: time and peak memory of a step, against the plain decoder.

A step is forward, loss, backward, clipping and AdamW in fp32 on one thread. All options take their steps in turn in
this one process, and ratios are medians over the rounds. A third of each volume is empty.

    python benchmarks/pretraining_decoder.py       # prints the table of docs/speed.md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
from typing import Any

import torch
from measuring import peak_memory, printed_apart, taken_in_turn, training_step

from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking, background_tokens
from nnunet_vit_mae.pretraining.loss import PretrainingLoss
from nnunet_vit_mae.settings import Network, Pretraining, token_grid
from nnunet_vit_mae.units import MIB

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "4 heads": {"decoder_heads": 4},
    "a quarter rebuilt": {"rebuilt_share": 0.25},
    "a quarter rebuilt, 4 heads": {"rebuilt_share": 0.25, "decoder_heads": 4},
    "cross": {"decoder": "cross"},
    "cross, 4 heads": {"decoder": "cross", "decoder_heads": 4},
    "cross, a quarter rebuilt": {"decoder": "cross", "rebuilt_share": 0.25},
    "cross, a quarter rebuilt, mask ratio 0.75": {"decoder": "cross", "rebuilt_share": 0.25, "mask_ratio": 0.75},
    "cross, a quarter rebuilt, 4 heads": {"decoder": "cross", "rebuilt_share": 0.25, "decoder_heads": 4},
    "background tokens left out": {"skip_background": True},
    "cross, a quarter rebuilt, background tokens left out": {
        "decoder": "cross",
        "rebuilt_share": 0.25,
        "skip_background": True,
    },
}
CPU = torch.device("cpu")
DRAWN_MASKS = 4
SCENES = [(96, 8, 1), (48, 8, 4)]  # side of the cubic patch, token, batch


def main() -> None:
    """Print the table, or (with `--memory`) measure the memory of one option in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        name, scene = arguments.memory
        print(peak_memory(partial(step_of, OPTIONS[name], arguments.size, *scene)))
        return
    cells = {name: [name] for name in OPTIONS}
    for scene in SCENES:
        steps = {name: step_of(options, arguments.size, *scene) for name, options in OPTIONS.items()}
        seconds = taken_in_turn(steps, arguments.rounds)
        for name, own in seconds.items():
            peak = int(printed_apart(__file__, "--size", arguments.size, "--memory", json.dumps([name, scene])))
            ratio = statistics.median(a / b for a, b in zip(own, seconds["plain"], strict=True))
            cells[name] += [f"{1000 * statistics.median(own):.0f}", f"{ratio:.2f}", f"{peak / MIB:.0f}"]
    scenes = [f"{side}^3, token {token}, batch {batch}" for side, token, batch in SCENES]
    print(f"Size {arguments.size}, mask ratio 0.9 unless a row says otherwise, one thread.\n")
    print(f"| decoder | {' | '.join(f'{scene}: ms per step | time | memory (MiB)' for scene in scenes)} |")
    print("|---" * (1 + 3 * len(scenes)) + "|")
    for row in cells.values():
        print(f"| {' | '.join(row)} |")


def step_of(
    options: Mapping[str, Any],
    size: str,
    side: int,
    token: int,
    batch: int,
    *,
    device: torch.device = CPU,
    compiler: Mapping[str, Any] | None = None,
) -> Callable[[], None]:
    """Return a whole step on random volumes whose first third along z is empty; masks differ from step to step.

    Masks are drawn before, as readers do. `compiler` are arguments of `torch.compile`; None: it is not used.
    """
    network, protocol = Network(size=size, token=(token,) * 3), Pretraining(batch_size=batch, **options)
    with device:
        model = build_autoencoder(network, 1, protocol)
    volume = torch.randn(batch, 1, side, side, side, device=device)
    volume[:, :, : side // 3] = 0
    tokens = math.prod(token_grid(volume.shape[2:], network.token))
    masking = Masking(mask_ratio=protocol.mask_ratio, rebuilt_share=protocol.rebuilt_share)
    taking_part = ~background_tokens(volume, network.token).cpu() if protocol.skip_background else None
    drawn = [masking.draw(torch.rand(batch, tokens), taking_part) for _ in range(DRAWN_MASKS)]
    masks = cycle([masking.rounds(one)[0].to(device) for one in drawn])

    module = PretrainingLoss(model)
    loss = module if compiler is None else torch.compile(module, fullgraph=True, **compiler)
    return training_step(model, lambda: loss(volume, next(masks), norm_pix=protocol.norm_pix)[0])


if __name__ == "__main__":
    main()
