"""Masked autoencoding of studies with any number of contrasts (AMAE, section 2.2)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, groups, present_contrasts, series_of
from nnunet_vit_mae.networks.decoders.mae import TokenDecoder
from nnunet_vit_mae.networks.mae import Reconstruction
from nnunet_vit_mae.networks.masking import split_tokens, take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import grid_of, patchify


class AdaptiveMaskedAutoencoder(nn.Module):
    """Hide a share of each contrast's tokens on its own, encode all visible ones together, and predict every contrast.

    Studies with equally many contrasts go through the transformers together, so no token of a batch is padding.
    """

    def __init__(self, encoder: AdaptiveEncoder, decoder: TokenDecoder, *, contrasts: int, mask_ratio: float):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_ratio = mask_ratio
        self.mask_token = nn.Parameter(torch.empty(decoder.width).normal_(std=0.02))
        self.contrast_embedding = nn.Parameter(torch.empty(contrasts, decoder.width).normal_(std=0.02))

    def targets(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "s 1 z y x"]:
        """What is to be rebuilt: each present contrast of each study, one after the other."""
        return series_of(volume, present_contrasts(volume))[0]

    def forward(self, volume: Float[Tensor, "b c z y x"], noise: Float[Tensor, "b c_n"]) -> Reconstruction:
        """Hide the tokens of each contrast with the highest noise; the result is in the order of `targets`."""
        token, channels = self.encoder.token, volume.shape[1]
        grid = grid_of(volume, token)
        if noise.shape[1] != channels * math.prod(grid):
            raise ValueError(
                f"expected noise for {channels} contrasts of {math.prod(grid)} tokens, got {noise.shape[1]}"
            )
        noise = rearrange(noise, "b (c n) -> b c n", c=channels)
        patches = rearrange(patchify(volume, token), "b n c v -> b c n v")
        parts, order = [], []
        for studies, contrasts, series in groups(present_contrasts(volume), volume.device):
            chosen = (studies[:, None], contrasts)
            parts.append(self._rebuild(patches[chosen], noise[chosen], contrasts, grid))
            order.append(series.flatten())
        back = torch.cat(order).argsort()
        return Reconstruction(*(torch.cat(field)[back] for field in zip(*parts, strict=True)))

    def _rebuild(
        self,
        patches: Float[Tensor, "g c n v"],
        noise: Float[Tensor, "g c n"],
        contrasts: Tensor,
        grid: tuple[int, int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (s m 1 v), visible (s k) and hidden (s m) of the series of a group of studies."""
        count = patches.shape[1]
        visible, hidden = split_tokens(rearrange(noise, "g c n -> (g c) n"), self.mask_ratio)
        seen = rearrange(take(rearrange(patches, "g c n v -> (g c) n v"), visible), "(g c) k v -> g c k v", c=count)
        places = sine_cosine_positions(grid, self.encoder.width, patches.device)[visible]
        sequence = self.encoder.tokens(seen, contrasts, rearrange(places, "(g c) k d -> g c k d", c=count))
        encoded = self.encoder.transformer(sequence)

        # where each token is and which contrast it is of, first for all visible ones, then for all hidden ones
        where = sine_cosine_positions(grid, self.decoder.width, patches.device)
        what = self.contrast_embedding[contrasts][:, :, None]

        def marks(index: Tensor) -> Tensor:
            places = rearrange(where[index], "(g c) k e -> g c k e", c=count)
            return rearrange(places + what, "g c k e -> g (c k) e")

        blanks = self.mask_token.expand(len(patches), count * hidden.shape[1], -1)
        predicted = self.decoder(encoded, torch.cat([marks(visible), marks(hidden)], dim=1), blanks)
        return rearrange(predicted, "g (c m) v -> (g c) m 1 v", c=count), visible, hidden
