"""The pre-training decoder as a segmentation decoder (ViTiac, section 2.3)."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.token_decoder import TokenDecoder, build_token_decoder
from nnunet_vit_mae.networks.tokenizer import Triple, unpatchify
from nnunet_vit_mae.presets import Network


def build(network: Network, channels: int, classes: int) -> MAEDecoder:
    """Build the decoder from settings."""
    decoder = build_token_decoder(network, outputs_per_voxel=classes)
    return MAEDecoder(decoder, token=network.token, classes=classes)


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
