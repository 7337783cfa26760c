"""Masked autoencoding of studies with any number of contrasts (AMAE, section 2.2)."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, groups, present_contrasts, split_contrasts
from nnunet_vit_mae.networks.autoencoder import Reconstruction
from nnunet_vit_mae.networks.decoders.mae import TokenDecoder
from nnunet_vit_mae.networks.masking import Masking, take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import Triple, grid_of, patchify


class AdaptiveMaskedAutoencoder(nn.Module):
    """Hide a share of each contrast's tokens on its own, encode all visible ones together, and predict every contrast.

    Studies with equally many contrasts go through the transformers together, so no token of a batch is padding.
    """

    def __init__(self, encoder: AdaptiveEncoder, decoder: TokenDecoder, masking: Masking, *, contrasts: int):
        super().__init__()
        self.encoder, self.decoder, self.masking = encoder, decoder, masking
        self.mask_token = nn.Parameter(torch.empty(decoder.width).normal_(std=0.02))
        self.contrast_embedding = nn.Parameter(torch.empty(contrasts, decoder.width).normal_(std=0.02))

    def targets(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "s 1 z y x"]:
        """What is to be rebuilt: each present contrast of each study, one after the other."""
        return split_contrasts(volume, present_contrasts(volume))[0]

    def forward(
        self, volume: Float[Tensor, "b c z y x"], noise: Float[Tensor, "b c_n"], *, everything: bool = False
    ) -> Reconstruction:
        """Hide the tokens of each contrast with the highest noise; the result is in the order of `targets`.

        With `everything`, all hidden tokens are rebuilt, as many at a time as in training.
        """
        token, channels = self.encoder.token, volume.shape[1]
        grid = grid_of(volume, token)
        if noise.shape[1] != channels * math.prod(grid):
            raise ValueError(
                f"expected noise for {channels} contrasts of {math.prod(grid)} tokens, got {noise.shape[1]}"
            )
        present = present_contrasts(volume)
        targets, _ = split_contrasts(volume, present)
        noise, _ = split_contrasts(rearrange(noise, "b (c n) -> b c n", c=channels), present)
        visible, hidden = self.masking.split(targets, token, noise[:, 0])
        rounds = self.masking.rounds(hidden, everything=everything)
        seen = take(patchify(targets, token)[:, :, 0], visible)
        parts, order = [], []
        for _, contrasts, series in groups(present, volume.device):
            blank = [part[series] for part in rounds]
            parts.append(self._rebuild(seen[series], visible[series], blank, contrasts, grid))
            order.append(series.flatten())
        patches = torch.cat(parts)[torch.cat(order).argsort()]
        return Reconstruction(patches[:, :, None], visible, torch.cat(rounds, dim=1))

    def _rebuild(
        self,
        seen: Float[Tensor, "g c k v"],
        visible: Int[Tensor, "g c k"],
        rounds: list[Int[Tensor, "g c _"]],
        contrasts: Int[Tensor, "g c"],
        grid: Triple,
    ) -> Float[Tensor, "g_c m v"]:
        """The rebuilt patches of the series of a group of studies."""
        places = sine_cosine_positions(grid, self.encoder.width, seen.device)[visible]
        encoded = self.encoder.transformer(self.encoder.tokens(seen, contrasts, places))

        # where each token is and which contrast it is of, first for all visible ones, then for all hidden ones
        where = sine_cosine_positions(grid, self.decoder.width, seen.device)
        what = self.contrast_embedding[contrasts][:, :, None]

        def marks(index: Int[Tensor, "g c k"]) -> Float[Tensor, "g c_k e"]:
            return rearrange(where[index] + what, "g c k e -> g (c k) e")

        predicted = []
        for hidden in rounds:
            positions = torch.cat([marks(visible), marks(hidden)], dim=1)
            blanks = self.mask_token.expand(len(hidden), hidden[0].numel(), -1)
            patches = self.decoder(encoded, positions, blanks)
            predicted.append(rearrange(patches, "g (c m) v -> (g c) m v", c=contrasts.shape[1]))
        return torch.cat(predicted, dim=1)
