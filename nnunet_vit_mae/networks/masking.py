"""Random masking: which tokens the encoder sees."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def count_visible(tokens: int, mask_ratio: float) -> int:
    """Visible tokens out of all, at least one. Rounded: truncation would turn 0.9 of 1000 into 99 visible tokens."""
    return max(1, round(tokens * (1 - mask_ratio)))


def split_tokens(noise: Float[Tensor, "b n"], mask_ratio: float) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
    """Indices of the visible and of the hidden tokens: those with the lowest noise stay visible.

    The noise is an argument, so that a sample's mask depends on its own seed alone, not on batch, worker or device.
    """
    order = noise.argsort(dim=1)
    visible = count_visible(noise.shape[1], mask_ratio)
    return order[:, :visible], order[:, visible:]


def take(tokens: Shaped[Tensor, "b n *rest"], index: Int[Tensor, "b k"]) -> Shaped[Tensor, "b k *rest"]:
    """The tokens at the given indices of each sample."""
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]
