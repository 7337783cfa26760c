"""Feature maps on the way from tokens to logits, and how much checkerboard is in them (ViTiac, figure 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.networks.upsampling import as_map
from nnunet_vit_mae.settings import Triple

ROUNDING = 1e-13  # variance over mean square: fp32 cannot tell less from a constant


class FeatureMap(NamedTuple):
    """The output of one step of the network. It covers the whole token grid, padding included."""

    name: str
    values: Float[Tensor, "c z y x"]
    cell: Triple  # values per token along z y x: the period of all upsampling so far
    stride: Triple  # voxels of the volume per value


def feature_maps(network: Segmenter, volume: Float[Tensor, "1 c z y x"]) -> list[FeatureMap]:
    """Return the "image", the encoder's last map ("tokens"), the decoder's stages ("scale 1" ...) and the "logits".

    The network runs as it is, so switch it to `eval` first. The maps are fp32 copies on the CPU.
    """
    encoded: list[Encoded] = []
    outputs: list[Tensor] = []

    def see_encoded(_: nn.Module, inputs: Any) -> None:
        encoded.extend(inputs)

    def see_output(_: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    stages = list(cast(Iterable[nn.Module], network.decoder.stages))
    hooks = [module.register_forward_hook(see_output) for module in (*stages, network.decoder)]
    hooks.append(network.decoder.register_forward_pre_hook(see_encoded))
    try:
        with torch.no_grad():
            network(volume)
    finally:
        for hook in hooks:
            hook.remove()

    (given,) = encoded
    names = ["image", "tokens", *(f"scale {number}" for number in range(1, len(stages) + 1)), "logits"]
    maps = [given.volume, as_map(given.tokens, given.grid), *outputs]
    return [
        _feature_map(name, values[0], given.grid, network.encoder.token)
        for name, values in zip(names, maps, strict=True)
    ]


def checkerboard(values: Float[Tensor, "c z y x"], period: Triple) -> float:
    """Measure the share (0 to 1) of a map's variance that repeats with a period, in values along z y x.

    It is the variance of the cell that one gets by averaging all cells of the period, over the total variance: the
    energy at the period's frequency and its harmonics. Both are sums over the channels, so that a strong channel
    counts more. Upsampling that treats the places within a cell differently leaves such a pattern; anatomy does not,
    for it does not know where cells begin. What an average over few cells still has of anatomy or noise is estimated
    from how much the cells differ, and subtracted. What changes its sign from cell to cell cancels out, so the share is
    a lower bound. A constant map gives 0, a map of one cell NaN.

    Only the `inner` part counts. Raises `ValueError` when the map is smaller than one cell.
    """
    part = inner(values, period)
    if part[0].numel() == math.prod(period):
        return math.nan
    repeated, total = (sum(variances) for variances in zip(*(_variances(c, period) for c in part), strict=True))
    return max(0.0, repeated) / total if total else 0.0


def inner(values: Float[Tensor, "c z y x"], period: Triple) -> Float[Tensor, "c zz yy xx"]:
    """Return the whole cells of a map, without the outermost ones of an axis that has four or more.

    Convolutions meet zeros beyond the border, which makes a frame there that has nothing to do with upsampling. Shorter
    axes are left whole, for two cells are the fewest that can repeat.
    """
    z, y, x = (_inside(side, step) for side, step in zip(values.shape[1:], period, strict=True))
    return values[:, z, y, x]


def _variances(values: Float[Tensor, "z y x"], period: Triple) -> tuple[float, float]:
    """Return the variance of a channel that repeats, less what chance leaves in an average of cells, and all of it."""
    pz, py, px = period
    pattern = "(z pz) (y py) (x px) -> (z y x) (pz py px)"
    cells = rearrange(values.double(), pattern, pz=pz, py=py, px=px)
    total = cells.var(correction=0)
    if total <= ROUNDING * cells.square().mean():
        return 0.0, 0.0
    within = cells - cells.mean(dim=1, keepdim=True)
    chance = within.var(dim=0, correction=1).mean() / len(cells)
    return float(within.mean(dim=0).var(correction=0) - chance), float(total)


def _inside(side: int, step: int) -> slice:
    cells = side // step
    if not cells:
        raise ValueError(f"a map of {side} values has no whole cell of {step}")
    first, last = (1, cells - 1) if cells > 3 else (0, cells)
    return slice(first * step, last * step)


def _feature_map(name: str, values: Float[Tensor, "c z y x"], grid: Triple, token: Triple) -> FeatureMap:
    z, y, x = (side // cells for side, cells in zip(values.shape[1:], grid, strict=True))
    stride = (token[0] // z, token[1] // y, token[2] // x)
    return FeatureMap(name, values.detach().float().cpu(), (z, y, x), stride)
