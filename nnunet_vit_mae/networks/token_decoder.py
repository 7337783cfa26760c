"""The light transformer decoder of masked autoencoding (ViTiac, section 2.2)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.presets import SIZES, Network


class TokenDecoder(nn.Module):
    """Encoded tokens (and blanks for hidden ones) in, one vector per token out.

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


def build_token_decoder(
    network: Network, *, outputs_per_voxel: int, heads: int = 0, cross: bool = False
) -> TokenDecoder:
    """Build the decoder that belongs to a size of encoder; `heads` replaces its number of attention heads."""
    size = SIZES[network.size]
    transformer = Transformer(size.decoder_width, size.decoder_depth, heads or size.decoder_heads)
    outputs = outputs_per_voxel * math.prod(network.token)
    return TokenDecoder(size.width, transformer, width=size.decoder_width, outputs=outputs, cross=cross)
