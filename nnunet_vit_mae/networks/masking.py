"""Random masking: which tokens the encoder sees, and which of the others the decoder rebuilds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from nnunet_vit_mae.networks.tokenizer import Triple, moments, patchify, voxels_inside

BACKGROUND_DEVIATION = (
    1e-3  # standard deviation of preprocessed intensities; below it, norm-pix would amplify ripples in air to targets
)


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The share of tokens to hide, the share of hidden tokens to rebuild, and whether flat tokens take part."""

    mask_ratio: float
    rebuilt_share: float = 1.0
    skip_background: bool = False

    def split(
        self, volume: Float[Tensor, "b c z y x"], token: Triple, noise: Float[Tensor, "b n"]
    ) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
        """Indices of the visible and of the hidden tokens; with `skip_background`, as if there were no others.

        A batch has one shape: each of its samples goes on with as many tokens as have content in the average one. A
        richer sample leaves some out at random; a poorer one is filled up with flat tokens, which carry no loss.
        """
        if not self.skip_background:
            return split_tokens(noise, self.mask_ratio)
        flat = background_tokens(volume, token)
        # a rehearsal has no values to look at: in the largest step no token is flat
        count = flat.shape[1] if is_fake(flat) else max(1, round(flat.logical_not().sum().item() / len(flat)))
        kept = noise.masked_fill(flat, torch.inf).argsort(dim=1, stable=True)[:, :count]
        visible, hidden = split_tokens(noise.gather(1, kept), self.mask_ratio)
        return kept.gather(1, visible), kept.gather(1, hidden)

    def rounds(self, hidden: Int[Tensor, "b m"], *, everything: bool) -> tuple[Int[Tensor, "b _"], ...]:
        """The hidden tokens to rebuild: a random share, or all of them, as many at a time as the share allows."""
        parts = hidden.split(count_rebuilt(hidden.shape[1], self.rebuilt_share), dim=1)
        return parts if everything else parts[:1]


def count_visible(tokens: int, mask_ratio: float) -> int:
    """Visible tokens out of all, at least one. Rounded: truncation would turn 0.9 of 1000 into 99 visible tokens."""
    return max(1, round(tokens * (1 - mask_ratio)))


def count_rebuilt(hidden: int, share: float) -> int:
    """Hidden tokens that are rebuilt, at least one if there is one."""
    return min(hidden, max(1, round(hidden * share)))


def split_tokens(noise: Float[Tensor, "b n"], mask_ratio: float) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b m"]]:
    """Indices of the visible and of the hidden tokens: those with the lowest noise stay visible.

    The noise is an argument, so that a sample's mask depends on its own seed alone, not on batch, worker or device.
    """
    order = noise.argsort(dim=1)
    visible = count_visible(noise.shape[1], mask_ratio)
    return order[:, :visible], order[:, visible:]


def background_tokens(volume: Float[Tensor, "b c z y x"], token: Triple) -> Bool[Tensor, "b n"]:
    """True for tokens without content, such as air and zeros: no channel varies inside the volume."""
    _, variance = moments(patchify(volume, token), voxels_inside(volume, token))
    return (variance < BACKGROUND_DEVIATION**2).all(dim=2)[:, :, 0]


def take(tokens: Shaped[Tensor, "b n *rest"], index: Int[Tensor, "b k"]) -> Shaped[Tensor, "b k *rest"]:
    """The tokens at the given indices of each sample."""
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]
