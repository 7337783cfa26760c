"""The ViT encoder: what pre-training learns and fine-tuning starts from. Its state dict is what we save and load."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_vit_mae.networks.masking import take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import Tokenizer, Triple
from nnunet_vit_mae.networks.transformer import Transformer


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
