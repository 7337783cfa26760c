"""How the tokens of a grid are told apart: sine-cosine positions that are added, and rotary ones in every attention.

Sine-cosine positions are those of He et al. 2022, extended to three axes (ViTiac, section 2.2). Rotary positions turn
queries and keys by their place (Su et al. 2021, https://arxiv.org/abs/2104.09864), so that attention sees how far apart
two tokens are along each axis. Both are rebuilt for the grid at hand and never stored, so an encoder moves between
patch sizes without interpolation. Encoders from elsewhere may have learned positions, which are weights of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.settings import Network, Triple

PERIOD = 10_000
TABLE_DEVIATION = 0.02  # of learned positions before anything is learned, as in other ViTs
TOKENS_FIRST, HEADS_FIRST = "parts b h n w -> b n parts h w", "b n parts h w -> parts b h n w"


class Places(NamedTuple):
    """Where the tokens of a sequence are: what is added to them, and how far attention turns them."""

    embedding: Float[Tensor, "*b n d"]
    rotation: Float[Tensor, "*b n 2 r"] | None  # cosines and sines

    def at(self, index: Int[Tensor, "*s k"]) -> Places:
        """Return the places of the tokens at these indices of the grid."""
        return Places(self.embedding[index], None if self.rotation is None else self.rotation[index])


@dataclass(frozen=True)
class Positions:
    """The positions of a network.

    Args:
        kind: `sine_cosine`, `rotary` or `both`.
        step: Distance of neighbouring tokens along z y x, in the unit of coordinates.
        base: The rotary frequencies fall from 1 to almost 1 / base. With 100, the slowest turns once in about 600
            units: grids have some tens of tokens along an axis.
    """

    kind: str = "sine_cosine"
    step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    base: float = Network.rotary_base

    def places(self, grid: Triple, width: int, head_width: int, device: torch.device) -> Places:
        """Return the places of all tokens of a grid, in the order z y x, for a transformer of a width."""
        embedding = sine_cosine_positions(grid, width, device, self.step)
        if self.kind == "sine_cosine":
            return Places(embedding, None)
        rotation = rotary_positions(grid, head_width, device, self.step, self.base)
        return Places(embedding if self.kind == "both" else torch.zeros_like(embedding), rotation)


class PositionTable(nn.Module):
    """Learned positions, made for one grid (z y x) and interpolated to any other."""

    def __init__(self, grid: Triple, width: int):
        super().__init__()
        self.values = nn.Parameter(torch.randn(*grid, width) * TABLE_DEVIATION)

    def forward(self, grid: Triple) -> Float[Tensor, "n d"]:
        """Return the positions of all tokens of a grid, in the order z y x."""
        values = self.values
        if tuple(values.shape[:3]) != grid:
            spread = functional.interpolate(rearrange(values, "z y x d -> 1 d z y x"), size=grid, mode="trilinear")
            values = rearrange(spread, "1 d z y x -> z y x d")
        return values.flatten(0, 2)


def sine_cosine_positions(
    grid: Triple, width: int, device: torch.device, step: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Float[Tensor, "n d"]:
    """Return the sine-cosine positions of all tokens of a grid, in the order z y x.

    Each axis fills a third of the width: sines, then cosines, of `width // 6` frequencies. What a width that 6 does not
    divide has left over stays zero.
    """
    return _table(_sine_cosine, device, grid, width, step)


def rotary_positions(
    grid: Triple, head_width: int, device: torch.device, step: tuple[float, float, float], base: float
) -> Float[Tensor, "n 2 r"]:
    """Return cosines and sines of the angles of all tokens of a grid: `head_width // 6` frequencies for each axis."""
    return _table(_rotary, device, grid, head_width, step, base)


def rotated(
    heads: Float[Tensor, "parts b h n w"], rotation: Float[Tensor, "*b n 2 r"], *, turned: int, padding: int = 0
) -> Float[Tensor, "parts b h n _"]:
    """Turn the first `turned` parts: pairs (i, i + r) by the angle of their place, what is left over not at all.

    `padding` zeros are appended to each head.
    """
    return _Rotated.apply(heads, rotation.to(heads.dtype), turned, padding)


class _Rotated(torch.autograd.Function):
    """The rotation with its gradient, which is the rotation back: autograd's own takes three times as many kernels."""

    @staticmethod
    def forward(
        ctx: Any, heads: Float[Tensor, "parts b h n w"], rotation: Float[Tensor, "*b n 2 r"], turned: int, padding: int
    ) -> Float[Tensor, "parts b h n _"]:
        ctx.save_for_backward(rotation)
        ctx.turned, ctx.padding = turned, padding
        result = functional.pad(heads, (0, padding)) if padding else heads.clone(memory_format=torch.contiguous_format)
        return _turn(result, heads, rotation, turned, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Float[Tensor, "parts b h n _"]) -> tuple[Tensor, None, None, None]:
        (rotation,) = ctx.saved_tensors
        gradient = gradients[0][..., : gradients[0].shape[-1] - ctx.padding]
        # in memory as the heads are, which come from a linear layer
        result = rearrange(rearrange(gradient, TOKENS_FIRST).clone(memory_format=torch.contiguous_format), HEADS_FIRST)
        return _turn(result, gradient, rotation, ctx.turned, backwards=True), None, None, None


def _turn(
    result: Tensor, heads: Tensor, rotation: Float[Tensor, "*b n 2 r"], turned: int, *, backwards: bool
) -> Tensor:
    """Turn `result`, which is a copy of the heads, in place."""
    cosine, sine = (part.unsqueeze(-3) for part in rotation.unbind(dim=-2))
    r = cosine.shape[-1]
    first, second = heads[:turned, ..., :r], heads[:turned, ..., r : 2 * r]
    pairs = result[:turned, ..., : 2 * r].unflatten(-1, (2, r))
    pairs.mul_(cosine[..., None, :])
    pairs[..., 0, :].addcmul_(second, sine, value=1 if backwards else -1)
    pairs[..., 1, :].addcmul_(first, sine, value=-1 if backwards else 1)
    return result


def _table(compute: Callable[..., Tensor], device: torch.device, *arguments: Any) -> Tensor:
    """Return a table, which is kept; compiled networks cannot keep it, and compute it at little cost."""
    if torch.compiler.is_compiling():
        return compute(device, *arguments)
    return _kept_table(compute, device, *arguments)


@lru_cache(maxsize=32)  # a run meets one or two grids, at two widths
def _kept_table(compute: Callable[..., Tensor], device: torch.device, *arguments: Any) -> Tensor:
    # normal tensors even when the first call comes from nnU-Net's predictor, for training may follow in this process
    with torch.inference_mode(False), torch.no_grad():
        return compute(torch.device("cpu"), *arguments).to(device)


def _sine_cosine(
    device: torch.device, grid: Triple, width: int, step: tuple[float, float, float]
) -> Float[Tensor, "n d"]:
    frequencies = width // 6
    omega = PERIOD ** -(torch.arange(frequencies, dtype=torch.float64, device=device) / frequencies)
    angles = [axis[:, None] * omega for axis in _coordinates(grid, step, device)]
    positions = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1).float()
    return functional.pad(positions, (0, width - 6 * frequencies))


def _rotary(
    device: torch.device, grid: Triple, head_width: int, step: tuple[float, float, float], base: float
) -> Float[Tensor, "n 2 r"]:
    frequencies = head_width // 6
    omega = base ** -(torch.arange(frequencies, dtype=torch.float64, device=device) / max(1, frequencies))
    angles = torch.cat([axis[:, None] * omega for axis in _coordinates(grid, step, device)], dim=1)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def _coordinates(grid: Triple, step: tuple[float, float, float], device: torch.device) -> list[Float[Tensor, " n"]]:
    axes = [
        torch.arange(tokens, dtype=torch.float64, device=device) * length
        for tokens, length in zip(grid, step, strict=True)
    ]
    return [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]


def forget_positions() -> None:
    """Forget the tables that are kept."""
    _kept_table.cache_clear()
