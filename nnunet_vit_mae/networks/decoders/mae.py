"""The light transformer decoder of masked autoencoding, and the segmentation decoder made of it (ViTiac, 2.2, 2.3)."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import Triple, unpatchify
from nnunet_vit_mae.networks.transformer import Transformer


class TokenDecoder(nn.Module):
    """Encoded tokens (and blanks for those that were hidden) to one vector per token.

    All tokens attend to one another, as in the original; with `cross`, blanks attend to the encoded tokens alone
    (CrossMAE, Fu et al. 2024, https://arxiv.org/abs/2401.14391), so that each is predicted whatever the others are.
    """

    def __init__(self, in_width: int, transformer: Transformer, *, width: int, outputs: int, cross: bool = False):
        super().__init__()
        self.width, self.cross = width, cross
        self.embed = nn.Linear(in_width, width)
        self.transformer = transformer
        self.head = nn.Linear(width, outputs)

    def forward(
        self,
        encoded: Float[Tensor, "b k d"],
        positions: Float[Tensor, "*b n e"],
        blanks: Float[Tensor, "b m e"] | None = None,
    ) -> Float[Tensor, "b m_or_n outputs"]:
        """Decode the tokens in the order given, blanks last; with blanks, only theirs are returned (n = k + m)."""
        tokens = self.embed(encoded)
        if blanks is None:
            return self.head(self.transformer(tokens + positions))
        if self.cross:
            of_tokens, of_blanks = positions.split([tokens.shape[1], blanks.shape[1]], dim=1)
            return self.head(self.transformer(blanks + of_blanks, tokens + of_tokens))
        tokens = torch.cat([tokens, blanks.to(tokens.dtype)], dim=1) + positions
        return self.head(self.transformer(tokens)[:, encoded.shape[1] :])


class MAEDecoder(nn.Module):
    """The pre-training decoder for segmentation: no mask token, and a last layer with an output per voxel and class."""

    stages = ()  # there are no steps between tokens and voxels

    def __init__(self, decoder: TokenDecoder, *, token: Triple, classes: int):
        super().__init__()
        self.decoder = decoder
        self.token, self.classes = token, classes

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        positions = sine_cosine_positions(encoded.grid, self.decoder.width, encoded.tokens.device)
        logits = self.decoder(encoded.tokens, positions)
        return unpatchify(rearrange(logits, "b n (c v) -> b n c v", c=self.classes), encoded.grid, self.token)
