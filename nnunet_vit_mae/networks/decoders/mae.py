"""The pre-training decoder as a segmentation decoder (ViTiac, section 2.3)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.token_decoder import TokenDecoder
from nnunet_vit_mae.networks.tokenizer import unpatchify
from nnunet_vit_mae.settings import Triple


def build(blueprint: Blueprint) -> MAEDecoder:
    """Build the decoder."""
    decoder = blueprint.token_decoder(outputs_per_voxel=blueprint.classes)
    return MAEDecoder(decoder, token=blueprint.token, classes=blueprint.classes)


class MAEDecoder(nn.Module):
    """The pre-training decoder for segmentation: no mask token, and a last layer with an output per voxel and class."""

    stages = ()  # there are no steps between tokens and voxels

    def __init__(self, decoder: TokenDecoder, *, token: Triple, classes: int):
        super().__init__()
        self.decoder = decoder
        self.token, self.classes = token, classes

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        logits = self.decoder(encoded.tokens, self.decoder.places(encoded.grid, encoded.tokens.device))
        return unpatchify(rearrange(logits, "b n (c v) -> b n c v", c=self.classes), encoded.grid, self.token)

    @property
    def heads(self) -> list[nn.Linear]:
        """Last layers."""
        return [self.decoder.head]
