"""Masked autoencoding of studies with any number of contrasts (AMAE, section 2.2)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, present_contrasts, split_contrasts
from nnunet_vit_mae.networks.autoencoder import Reconstruction, counted_voxels
from nnunet_vit_mae.networks.grouping import Group, groups
from nnunet_vit_mae.networks.masking import Masks, take
from nnunet_vit_mae.networks.positions import Places
from nnunet_vit_mae.networks.token_decoder import TokenDecoder
from nnunet_vit_mae.networks.tokenizer import grid_of, patchify
from nnunet_vit_mae.settings import Triple


class AdaptiveMaskedAutoencoder(nn.Module):
    """Hide a share of each contrast's tokens on its own, encode all visible ones together, and predict every contrast.

    Studies go through the transformers in groups or packed, so no token of a batch is padding.
    """

    def __init__(self, encoder: AdaptiveEncoder, decoder: TokenDecoder, *, contrasts: int):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.mask_token = nn.Parameter(torch.empty(decoder.width).normal_(std=0.02))
        self.contrast_embedding = nn.Parameter(torch.empty(contrasts, decoder.width).normal_(std=0.02))

    def forward(
        self, volume: Float[Tensor, "b c z y x"], masks: Masks, present: list[list[int]] | None = None
    ) -> Reconstruction:
        """Rebuild the masked tokens of each contrast image.

        Args:
            volume: Studies; a contrast that a study lacks is a channel of zeros.
            masks: The masks of the contrast images, one study after the other.
            present: The channels of each study that it has. Without it, the voxels tell.
        """
        token = self.encoder.token
        grid = grid_of(volume, token)
        present = present or present_contrasts(volume)
        images, contrasts = split_contrasts(volume, present)
        patches = patchify(images, token)
        seen = take(patches[:, :, 0], masks.visible)
        parts, order = [], []
        for group in groups(present, volume.device):
            own = Masks(*(part[group.images] for part in masks))
            parts.append(self._rebuild(seen[group.images], own, contrasts[group.images], grid, group))
            order.append(group.images)
        predicted = torch.cat(parts)[torch.cat(order).argsort()]
        targets = take(patches, masks.hidden)
        return Reconstruction(predicted[:, :, None], targets, counted_voxels(images, token, masks))

    def _rebuild(
        self, seen: Float[Tensor, "s k v"], masks: Masks, contrasts: Int[Tensor, " s"], grid: Triple, group: Group
    ) -> Float[Tensor, "s m v"]:
        """Return the rebuilt patches of the contrast images of a group."""
        visible = self.encoder.places(grid, seen.device).at(masks.visible)
        encoded = group.through(self.encoder.transformer, *self.encoder.images(seen, contrasts, visible))

        # where each token is and which contrast it is of, for the visible ones of an image and then for its hidden ones
        index = torch.cat([masks.visible, masks.hidden], dim=1)
        embedding, rotation = self.decoder.places(grid, seen.device).at(index)
        places = Places(embedding + self.contrast_embedding[contrasts][:, None], rotation)
        return self.decoder(encoded, places, self.mask_token.expand(*masks.hidden.shape, -1), group)
