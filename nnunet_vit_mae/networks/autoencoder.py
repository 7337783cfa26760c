"""Masked autoencoding of volumes (He et al. 2022, https://arxiv.org/abs/2111.06377; ViTiac, section 2.2).

The encoder sees the visible tokens only; the decoder gets them and mask tokens, and predicts the masked ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import Masks, take
from nnunet_vit_mae.networks.token_decoder import TokenDecoder
from nnunet_vit_mae.networks.tokenizer import grid_of, moments, patchify, voxels_inside
from nnunet_vit_mae.settings import Triple

NORM_PIX_EPSILON = 1e-6  # of the variance, as in the original


class Reconstruction(NamedTuple):
    """The masked tokens that were rebuilt: what the decoder made of them, what they are, and which voxels count."""

    patches: Float[Tensor, "s m c v"]
    targets: Float[Tensor, "s m c v"]
    counted: Float[Tensor, "s m 1 v"]  # 1 where a voxel carries loss, else 0


class MaskedAutoencoder(nn.Module):
    """Encode the visible tokens of a volume and predict masked ones from them."""

    def __init__(self, encoder: Encoder, decoder: TokenDecoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_token = nn.Parameter(torch.empty(decoder.width).normal_(std=0.02))

    def forward(
        self, volume: Float[Tensor, "b c z y x"], masks: Masks, present: list[list[int]] | None = None
    ) -> Reconstruction:
        """Rebuild the masked tokens of each sample. All channels are stacked, so `present` plays no part here."""
        token = self.encoder.token
        grid, patches = grid_of(volume, token), patchify(volume, token)
        encoded = self.encoder(patches, grid, masks.visible)

        # visible tokens first, masked ones behind them: attention has no order, so nothing is ever put back in place
        places = self.decoder.places(grid, volume.device).at(torch.cat([masks.visible, masks.hidden], dim=1))
        predicted = self.decoder(encoded, places, self.mask_token.expand(*masks.hidden.shape, -1))
        predicted = rearrange(predicted, "b m (c v) -> b m c v", c=volume.shape[1])
        return Reconstruction(predicted, take(patches, masks.hidden), counted_voxels(volume, token, masks))


def reconstruction_loss(rebuilt: Reconstruction, *, norm_pix: bool) -> Float[Tensor, ""]:
    """Return the mean squared error over the voxels that count.

    With `norm_pix` the target of each token and channel has mean 0 and (unbiased) variance 1 over those voxels.
    """
    targets = norm_pix_targets(rebuilt.targets, rebuilt.counted) if norm_pix else rebuilt.targets
    error = (rebuilt.patches.float() - targets).square() * rebuilt.counted
    return error.sum() / (rebuilt.counted.sum() * targets.shape[2]).clamp(min=1)


def counted_voxels(volume: Float[Tensor, "s c z y x"], token: Triple, masks: Masks) -> Float[Tensor, "s m 1 v"]:
    """Return 1 for the voxels of masked tokens that lie inside the volume, and 0 in tokens that do not count."""
    inside = take(voxels_inside(volume, token).expand(volume.shape[0], -1, -1, -1), masks.hidden)
    return inside * masks.counted[:, :, None, None]


def norm_pix_targets(patches: Float[Tensor, "b m c v"], inside: Float[Tensor, "b m 1 v"]) -> Float[Tensor, "b m c v"]:
    """Shift and scale each token and channel to mean 0 and variance 1 over the voxels that are `inside`."""
    mean, deviation = mean_and_deviation(patches, inside)
    return (patches - mean) / deviation


def mean_and_deviation(
    patches: Float[Tensor, "b m c v"], inside: Float[Tensor, "b m 1 v"]
) -> tuple[Float[Tensor, "b m c 1"], Float[Tensor, "b m c 1"]]:
    """Return mean and (unbiased) standard deviation of each token and channel over the voxels that are `inside`."""
    mean, variance = moments(patches, inside)
    return mean, (variance + NORM_PIX_EPSILON).sqrt()
