"""The ViT encoder: what pre-training learns and fine-tuning starts from. Its state dict is what we save and load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.masking import take
from nnunet_vit_mae.networks.positions import Places, Positions, PositionTable
from nnunet_vit_mae.networks.tokenizer import ConvolutionalTokenizer, Tokenizer, grid_of, padded, patchify
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.settings import Triple


class Encoded(NamedTuple):
    """All that a segmentation decoder may build on."""

    tokens: Float[Tensor, "b n d"]
    hidden: list[Float[Tensor, "b n d"]]  # after the tapped blocks, early to late
    volume: Float[Tensor, "b c z y x"]  # padded to whole tokens
    grid: Triple
    shape: Triple  # of the volume before it was padded
    present: list[list[int]] | None = None  # channels of each study, where contrasts are adaptive
    stem: Sequence[Float[Tensor, "b f _ _ _"]] = ()  # maps of a convolutional tokenizer, fine to coarse


class Encoder(nn.Module):
    """Tokenizer, positions, transformer. Masked tokens never enter it: with 90% masked it works on a tenth.

    Args:
        tokenizer: From cut patches to tokens.
        transformer: Its blocks.
        token: Voxels of a token (z y x).
        positions: How tokens are told apart.
        position_table: Learned positions, in place of sine-cosine ones.
        register_tokens: Number of learned tokens without a place, which only attention sees.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | ConvolutionalTokenizer,
        transformer: Transformer,
        *,
        token: Triple,
        positions: Positions,
        position_table: PositionTable | None = None,
        register_tokens: int = 0,
    ):
        super().__init__()
        self.tokenizer, self.transformer, self.position_table = tokenizer, transformer, position_table
        self.token, self.positions = token, positions
        self.register_tokens = None
        if register_tokens:
            self.register_tokens = nn.Parameter(torch.randn(register_tokens, transformer.width) * 0.02)

    def forward(
        self, patches: Float[Tensor, "b n c v"], grid: Triple, visible: Int[Tensor, "b k"]
    ) -> Float[Tensor, "b k d"]:
        """Encode the visible tokens of a grid."""
        tokens, places = self.tokenizer(take(patches, visible)), self.places(grid, patches.device).at(visible)
        tokens, rotation = self._with_registers(tokens + places.embedding, places.rotation)
        return self._without_registers(self.transformer(tokens, rotation))

    def places(self, grid: Triple, device: torch.device) -> Places:
        """Return the places of all tokens of a grid."""
        places = self.positions.places(grid, self.transformer.width, self.transformer.head_width, device)
        return places if self.position_table is None else places._replace(embedding=self.position_table(grid))

    def _with_registers(
        self, tokens: Float[Tensor, "b n d"], rotation: Float[Tensor, "*b n 2 r"] | None
    ) -> tuple[Float[Tensor, "b rn d"], Float[Tensor, "*b rn 2 r"] | None]:
        """Put the register tokens, which attention does not turn, before the others."""
        if self.register_tokens is None:
            return tokens, rotation
        count = len(self.register_tokens)
        tokens = torch.cat([self.register_tokens.expand(len(tokens), -1, -1).to(tokens), tokens], dim=1)
        if rotation is not None:
            cosine, sine = rotation[..., :1, :1, :], rotation[..., :1, 1:, :]
            unturned = torch.cat([torch.ones_like(cosine), torch.zeros_like(sine)], dim=-2)
            rotation = torch.cat([*[unturned] * count, rotation], dim=-3)
        return tokens, rotation

    def _without_registers(self, tokens: Float[Tensor, "b rn d"]) -> Float[Tensor, "b n d"]:
        return tokens if self.register_tokens is None else tokens[:, len(self.register_tokens) :]

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
        tokens, rotation = self._with_registers(tokens + places.embedding, places.rotation)
        tokens, hidden = self.transformer.with_hidden(tokens, rotation, taps)
        tokens, *hidden = map(self._without_registers, [tokens, *hidden])
        return Encoded(tokens, hidden, volume, grid, (z, y, x), stem=stem)
