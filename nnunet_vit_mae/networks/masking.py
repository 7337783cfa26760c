"""Random masking: which tokens the encoder sees, and which of the others the decoder rebuilds.

Masks are drawn from noise where crops are read, on the host: the networks get indices, so that no step waits for a GPU
to say how many tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from nnunet_vit_mae.networks.tokenizer import moments, patchify, voxels_inside
from nnunet_vit_mae.settings import Triple, count_visible

# standard deviation of preprocessed intensities: below it, norm-pix would amplify ripples in air to targets
BACKGROUND_DEVIATION = 1e-3


class Masks(NamedTuple):
    """Indices of tokens for each sample of a batch (s), in the order z y x of the token grid."""

    visible: Int[Tensor, "s k"]  # the encoder sees them
    hidden: Int[Tensor, "s m"]  # the decoder rebuilds them
    counted: Bool[Tensor, "s m"]  # false for masked tokens that only fill up a sample: they carry no loss

    def to(self, device: torch.device) -> Masks:
        """Return the same masks on a device."""
        return Masks(*(part.to(device, non_blocking=True) for part in self))

    def pinned(self) -> Masks:
        """Return the same masks in memory from which a GPU copies without being waited for."""
        return Masks(*(part.pin_memory() for part in self))


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The share of tokens to hide, and the share of masked tokens to rebuild in a step."""

    mask_ratio: float
    rebuilt_share: float = 1.0

    def draw(self, noise: Float[Tensor, "s n"], taking_part: Bool[Tensor, "s n"] | None = None) -> Masks:
        """Hide the tokens with the highest noise of each sample.

        The noise is an argument, so that a sample's mask depends on its own seed alone, not on batch, worker or device.
        A batch has one shape. So a sample has as many visible and masked tokens as the average one: where it has more,
        some are left out at random; where it has fewer, its own ones are repeated, and repeated ones carry no loss.

        Args:
            noise: Random numbers, one for each token.
            taking_part: False for tokens that are neither shown nor hidden, such as those outside of a scan.

        Returns:
            All masked tokens; `rounds` says which of them are rebuilt.
        """
        if taking_part is None:
            visible = count_visible(noise.shape[1], self.mask_ratio)
            order = noise.argsort(dim=1)
            # parts of a larger tensor would be gathered outside of pinned memory, and a GPU be waited for
            shown, hidden = order[:, :visible].contiguous(), order[:, visible:].contiguous()
            return Masks(shown, hidden, torch.ones_like(hidden, dtype=torch.bool))
        available = taking_part.sum(dim=1)
        order = noise.masked_fill(~taking_part, torch.inf).argsort(dim=1)
        # float64, as in `count_visible`; a sample without tokens shows one, for there has to be a sequence
        visible = (available.double() * (1 - self.mask_ratio)).round().long().clamp(min=1)
        hidden = (available - visible).clamp(min=0)
        shown, rebuilt = (torch.arange(round(counts.double().mean().item())) for counts in (visible, hidden))
        places = visible[:, None] + rebuilt % hidden[:, None].clamp(min=1)
        return Masks(
            order.gather(1, shown % visible[:, None]),
            order.gather(1, places.clamp(max=noise.shape[1] - 1)),
            rebuilt < hidden[:, None],
        )

    def rounds(self, masks: Masks) -> list[Masks]:
        """Split the masked tokens into random shares, as many at a time as a step of training rebuilds."""
        count = count_rebuilt(masks.hidden.shape[1], self.rebuilt_share)
        parts = zip(masks.hidden.split(count, dim=1), masks.counted.split(count, dim=1), strict=True)
        return [Masks(masks.visible, hidden, counted) for hidden, counted in parts]


def count_rebuilt(hidden: int, share: float) -> int:
    """Return how many masked tokens a step rebuilds, at least one if there is one."""
    return min(hidden, max(1, round(hidden * share)))


def background_tokens(volume: Float[Tensor, "b c z y x"], token: Triple) -> Bool[Tensor, "b n"]:
    """Find tokens without content, such as air and zeros: no channel varies inside the volume."""
    _, variance = moments(patchify(volume, token), voxels_inside(volume, token))
    return (variance < BACKGROUND_DEVIATION**2).all(dim=2)[:, :, 0]


def take(tokens: Shaped[Tensor, "b n *rest"], index: Int[Tensor, "b k"]) -> Shaped[Tensor, "b k *rest"]:
    """Return the tokens at the given indices of each sample."""
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]
