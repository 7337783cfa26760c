"""The ViT encoder: what pre-training learns and fine-tuning starts from. Its state dict is what we save and load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.masking import take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import Tokenizer, Triple, grid_of, padded, patchify
from nnunet_vit_mae.networks.transformer import Transformer


class Encoded(NamedTuple):
    """All that a segmentation decoder may build on."""

    tokens: Float[Tensor, "b n d"]
    hidden: list[Float[Tensor, "b n d"]]  # after the tapped blocks, early to late
    volume: Float[Tensor, "b c z y x"]  # padded to whole tokens
    grid: Triple
    present: list[list[int]] | None = None  # channels of each study, where contrasts are adaptive


class Encoder(nn.Module):
    """Tokenizer, positions, transformer. Hidden tokens never enter it: with 90% masked it works on a tenth."""

    def __init__(self, tokenizer: Tokenizer, transformer: Transformer, *, token: Triple, width: int):
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.token, self.width = token, width

    def forward(
        self, patches: Float[Tensor, "b n c v"], grid: Triple, visible: Int[Tensor, "b k"] | None = None
    ) -> Float[Tensor, "b k_or_n d"]:
        positions = sine_cosine_positions(grid, self.width, patches.device)
        if visible is not None:
            patches, positions = take(patches, visible), positions[visible]
        return self.transformer(self.tokenizer(patches) + positions)

    def encode(
        self, volume: Float[Tensor, "b c z y x"], taps: Sequence[int], present: list[list[int]] | None = None
    ) -> Encoded:
        """Encode all tokens of a volume, and keep what the tapped blocks (counted from 1) give on the way.

        All channels are stacked in the tokens, so `present` plays no part here.
        """
        volume, grid = padded(volume, self.token), grid_of(volume, self.token)
        positions = sine_cosine_positions(grid, self.width, volume.device)
        tokens = self.tokenizer(patchify(volume, self.token)) + positions
        return Encoded(*self.transformer.with_hidden(tokens, taps), volume, grid)
