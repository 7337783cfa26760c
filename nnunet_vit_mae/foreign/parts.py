"""What the conversions share: what one of them returns, sizes by their shape, and the blocks of plain ViTs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.transformer import MLP_RATIO
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import TOKEN_SIDES

Z_SCORE = "ZScoreNormalization"


@dataclass(kw_only=True)
class ConvertedEncoder:
    """An encoder of ours in the making: its weights, and what its card says."""

    kind: str
    size: str
    token: list[int]
    network: dict[str, Any]
    tensors: dict[str, Tensor]
    channel_names: list[str]
    dataset: str
    patch_size: list[int] = field(default_factory=list)  # empty: unknown
    spacing: list[float] = field(default_factory=list)
    normalization: list[str] = field(default_factory=lambda: [Z_SCORE])
    licence: str = "not stated in the checkpoint"
    notes: list[str] = field(default_factory=list)


def size_of(width: int, depth: int) -> str:
    """Return the size with this width and number of blocks."""
    for name, size in SIZES.items():
        if (size.width, size.depth) == (width, depth):
            return name
    known = ", ".join(f"{name} {size.width}/{size.depth}" for name, size in SIZES.items())
    raise UserError(f"its width {width} with {depth} blocks is none of our sizes ({known})")


def checked_token(sides: list[int]) -> list[int]:
    """Return the voxels of a token; raise `UserError` for sides that our decoders cannot double."""
    if not all(side in TOKEN_SIDES for side in sides):
        raise UserError(f"its tokens of {' x '.join(map(str, sides))} have sides other than {list(TOKEN_SIDES)}")
    return sides


def cube_root(tokens: int) -> int:
    """Return the side of a cube of this many tokens, or 0 if they make none."""
    side = round(tokens ** (1 / 3))
    return side if side**3 == tokens else 0


def mlp_tensors(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Return the two layers (weight, bias) of a `vit` block's MLP, which is `MLP_RATIO` times as wide as the tokens.

    A narrower one is filled up: new features have random weights from the tokens and zero weights to the output, so
    that the result is the same and they can learn.
    """
    (into, into_bias), (out, out_bias) = first, second
    hidden, width = into.shape
    missing = MLP_RATIO * width - hidden
    if missing < 0:
        raise UserError(f"its MLPs are {hidden} features wide, more than {MLP_RATIO} x {width}")
    random = torch.randn(missing, width, generator=torch.Generator().manual_seed(hidden)) * width**-0.5
    return {
        "mlp.0.weight": torch.cat([into, random]),
        "mlp.0.bias": functional.pad(into_bias, (0, missing)),
        "mlp.2.weight": functional.pad(out, (0, missing)),
        "mlp.2.bias": out_bias,
    }
