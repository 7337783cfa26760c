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
from nnunet_vit_mae.networks.masking import Masking, background_tokens, take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import grid_of, moments, patchify, voxels_inside

NORM_PIX_EPSILON = 1e-6  # of the variance in norm-pix, as in the original


class Reconstruction(NamedTuple):
    """Which tokens were visible, which hidden ones were rebuilt, and what the decoder made of these."""

    patches: Float[Tensor, "b m c v"]
    visible: Int[Tensor, "b k"]
    hidden: Int[Tensor, "b m"]


class MaskedAutoencoder(nn.Module):
    """Encode a random share of the tokens and predict others from them."""

    def __init__(self, encoder: Encoder, decoder: TokenDecoder, masking: Masking):
        super().__init__()
        self.encoder, self.decoder, self.masking = encoder, decoder, masking
        self.mask_token = nn.Parameter(torch.empty(decoder.width).normal_(std=0.02))

    def targets(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b c z y x"]:
        """What is to be rebuilt."""
        return volume

    def forward(
        self, volume: Float[Tensor, "b c z y x"], noise: Float[Tensor, "b n"], *, everything: bool = False
    ) -> Reconstruction:
        """Hide the tokens with the highest noise and predict the voxels of those that are to be rebuilt.

        With `everything`, all hidden tokens are rebuilt, as many at a time as in training.
        """
        token = self.encoder.token
        grid = grid_of(volume, token)
        if noise.shape[1] != math.prod(grid):
            raise ValueError(
                f"expected noise for the {math.prod(grid)} tokens of the grid {grid}, got {noise.shape[1]}"
            )
        visible, hidden = self.masking.split(volume, token, noise)
        encoded = self.encoder(patchify(volume, token), grid, visible)

        # visible tokens first, hidden ones behind them: attention has no order, so nothing is ever put back in place
        positions = sine_cosine_positions(grid, self.decoder.width, volume.device)
        rounds = self.masking.rounds(hidden, everything=everything)
        predicted = [
            self.decoder(encoded, positions[torch.cat([visible, part], dim=1)], self.mask_token.expand(*part.shape, -1))
            for part in rounds
        ]
        patches = rearrange(torch.cat(predicted, dim=1), "b m (c v) -> b m c v", c=volume.shape[1])
        return Reconstruction(patches, visible, torch.cat(rounds, dim=1))


def reconstruction_loss(
    volume: Float[Tensor, "b c z y x"],
    rebuilt: Reconstruction,
    token: tuple[int, int, int],
    *,
    norm_pix: bool,
    skip_background: bool = False,
) -> Float[Tensor, ""]:
    """Mean squared error over the rebuilt tokens' voxels that lie inside the volume.

    With `norm_pix` the target of each token and channel has mean 0 and (unbiased) variance 1 over those voxels. With
    `skip_background` tokens without content, which fill up poor samples, do not count.
    """
    target = take(patchify(volume, token), rebuilt.hidden)
    inside = hidden_voxels(volume, rebuilt, token)
    if norm_pix:
        target = norm_pix_targets(target, inside)
    if skip_background:
        inside = hidden_voxels(volume, rebuilt, token, skip_background=True)
    error = (rebuilt.patches.float() - target).square() * inside
    return error.sum() / (inside.sum() * volume.shape[1]).clamp(min=1)


def hidden_voxels(
    volume: Float[Tensor, "b c z y x"],
    rebuilt: Reconstruction,
    token: tuple[int, int, int],
    *,
    skip_background: bool = False,
) -> Float[Tensor, "b m 1 v"]:
    """One where a voxel counts in the loss: inside the volume, and with `skip_background` in a token with content."""
    inside = take(voxels_inside(volume, token).expand(volume.shape[0], -1, -1, -1), rebuilt.hidden)
    return (
        inside * take(~background_tokens(volume, token), rebuilt.hidden)[:, :, None, None]
        if skip_background
        else inside
    )


def norm_pix_targets(patches: Float[Tensor, "b m c v"], inside: Float[Tensor, "b m 1 v"]) -> Float[Tensor, "b m c v"]:
    """Each token and channel shifted and scaled to mean 0 and variance 1."""
    mean, deviation = statistics(patches, inside)
    return (patches - mean) / deviation


def statistics(
    patches: Float[Tensor, "b m c v"], inside: Float[Tensor, "b m 1 v"]
) -> tuple[Float[Tensor, "b m c 1"], Float[Tensor, "b m c 1"]]:
    """Mean and (unbiased) standard deviation of each token and channel over its voxels inside the volume."""
    mean, variance = moments(patches, inside)
    return mean, (variance + NORM_PIX_EPSILON).sqrt()
