"""Masked autoencoding of volumes (He et al. 2022, https://arxiv.org/abs/2111.06377; ViTiac, section 2.2).

The encoder sees the visible tokens only; the decoder gets them back with blanks and predicts the hidden ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.decoders.mae import TokenDecoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import split_tokens, take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import grid_of, patchify, voxels_inside

EPSILON = 1e-6  # of the variance in norm-pix, as in the original


class Reconstruction(NamedTuple):
    """What the decoder made of the hidden tokens, and which tokens were visible and hidden."""

    patches: Float[Tensor, "b m c v"]
    visible: Int[Tensor, "b k"]
    hidden: Int[Tensor, "b m"]


class MaskedAutoencoder(nn.Module):
    """Encode a random share of the tokens and predict the others from them."""

    def __init__(self, encoder: Encoder, decoder: TokenDecoder, *, mask_ratio: float):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.empty(decoder.width).normal_(std=0.02))

    def targets(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        """What is to be rebuilt."""
        return volume

    def forward(self, volume: Float[Tensor, "b c z y x"], noise: Float[Tensor, "b n"]) -> Reconstruction:
        """Hide the tokens with the highest noise and predict their voxels."""
        grid = grid_of(volume, self.encoder.token)
        if noise.shape[1] != math.prod(grid):
            raise ValueError(
                f"expected noise for the {math.prod(grid)} tokens of the grid {grid}, got {noise.shape[1]}"
            )
        visible, hidden = split_tokens(noise, self.mask_ratio)
        encoded = self.encoder(patchify(volume, self.encoder.token), grid, visible)

        # visible tokens first, hidden ones behind them: attention has no order, so nothing is ever put back in place
        positions = sine_cosine_positions(grid, self.decoder.width, volume.device)[torch.cat([visible, hidden], dim=1)]
        blanks = self.mask_token.expand(*hidden.shape, -1)
        predicted = self.decoder(encoded, positions, blanks)
        return Reconstruction(rearrange(predicted, "b m (c v) -> b m c v", c=volume.shape[1]), visible, hidden)


def reconstruction_loss(
    volume: Float[Tensor, "b c z y x"], rebuilt: Reconstruction, token: tuple[int, int, int], *, norm_pix: bool
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden tokens' voxels that lie inside the volume.

    With `norm_pix` the target of each token and channel has mean 0 and (unbiased) variance 1 over those voxels.
    """
    target = take(patchify(volume, token), rebuilt.hidden)
    inside = hidden_voxels(volume, rebuilt, token)
    if norm_pix:
        target = normalised(target, inside)
    error = (rebuilt.patches.float() - target).square() * inside
    return error.sum() / (inside.sum() * volume.shape[1]).clamp(min=1)


def hidden_voxels(
    volume: Float[Tensor, "b c z y x"], rebuilt: Reconstruction, token: tuple[int, int, int]
) -> Float[Tensor, "b m 1 v"]:
    """One where a voxel of a hidden token lies inside the volume, zero in the padding: what the loss is a mean over."""
    return take(voxels_inside(volume, token).expand(volume.shape[0], -1, -1, -1), rebuilt.hidden)


def normalised(patches: Float[Tensor, "b m c v"], inside: Float[Tensor, "b m 1 v"]) -> Float[Tensor, "b m c v"]:
    """Each token and channel shifted and scaled to mean 0 and variance 1."""
    mean, deviation = statistics(patches, inside)
    return (patches - mean) / deviation


def statistics(
    patches: Float[Tensor, "b m c v"], inside: Float[Tensor, "b m 1 v"]
) -> tuple[Float[Tensor, "b m c 1"], Float[Tensor, "b m c 1"]]:
    """Mean and (unbiased) standard deviation of each token and channel over its voxels inside the volume."""
    count = inside.sum(dim=-1, keepdim=True)
    mean = (patches * inside).sum(dim=-1, keepdim=True) / count
    variance = ((patches - mean).square() * inside).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    return mean, (variance + EPSILON).sqrt()
