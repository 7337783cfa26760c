"""The ViT encoder: what pre-training learns and fine-tuning starts from. Its state dict is what we save and load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.masking import take
from nnunet_vit_mae.networks.positions import Places, Positions
from nnunet_vit_mae.networks.tokenizer import (
    ConvolutionalTokenizer,
    Tokenizer,
    Triple,
    grid_of,
    padded,
    patchify,
)
from nnunet_vit_mae.networks.transformer import Transformer


class Encoded(NamedTuple):
    """All that a segmentation decoder may build on."""

    tokens: Float[Tensor, "b n d"]
    hidden: list[Float[Tensor, "b n d"]]  # after the tapped blocks, early to late
    volume: Float[Tensor, "b c z y x"]  # padded to whole tokens
    grid: Triple
    present: list[list[int]] | None = None  # channels of each study, where contrasts are adaptive
    stem: Sequence[Float[Tensor, "b f _ _ _"]] = ()  # maps of a convolutional tokenizer, fine to coarse
    shape: Triple | None = None  # of the volume before it was padded


class Encoder(nn.Module):
    """Tokenizer, positions, transformer. Hidden tokens never enter it: with 90% masked it works on a tenth."""

    def __init__(
        self,
        tokenizer: Tokenizer | ConvolutionalTokenizer,
        transformer: Transformer,
        *,
        token: Triple,
        positions: Positions | None = None,
    ):
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.token, self.positions = token, positions or Positions()

    def forward(
        self, patches: Float[Tensor, "b n c v"], grid: Triple, visible: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k_or_n d"]:
        """Encode the visible tokens of a grid, or all of them."""
        places = self.places(grid, patches.device)
        if visible is not None:
            patches, places = take(patches, visible), places.at(visible)
        return self.transformer(self.tokenizer(patches) + places.embedding, places.rotation)

    def places(self, grid: Triple, device: torch.device) -> Places:
        """Return the places of all tokens of a grid."""
        return self.positions.places(grid, self.transformer.width, self.transformer.head_width, device)

    def encode(
        self, volume: Float[Tensor, "b c z y x"], taps: Sequence[int], present: list[list[int]] | None = None
    ) -> Encoded:
        """Encode all tokens of a volume, and keep what the tapped blocks (counted from 1) give on the way.

        All channels are stacked in the tokens, so `present` plays no part here.
        """
        z, y, x = volume.shape[2:]
        volume, grid = padded(volume, self.token), grid_of(volume, self.token)
        tokens, stem = self.tokenizer.with_maps(patchify(volume, self.token), grid)
        places = self.places(grid, volume.device)
        tokens, hidden = self.transformer.with_hidden(tokens + places.embedding, places.rotation, taps)
        return Encoded(tokens, hidden, volume, grid, stem=stem, shape=(z, y, x))
