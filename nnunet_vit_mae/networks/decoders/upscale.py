"""The upscale decoder (ViTiac, section 2.3): from the encoder's last map to voxels by repeated doubling."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import Triple
from nnunet_vit_mae.networks.upsampling import (
    as_map,
    doublings,
    narrowest_width,
    norm_and_activation,
    stage_widths,
    upsampling,
)
from nnunet_vit_mae.presets import SIZES, Network


def build(network: Network, channels: int, classes: int) -> UpscaleDecoder:
    """Build the decoder from settings."""
    width = SIZES[network.size].width
    return UpscaleDecoder(width, token=network.token, classes=classes, kind=network.upsampling)


class UpscaleDecoder(nn.Module):
    """As many doublings as the longest side of a token needs, and a linear layer to the classes."""

    def __init__(self, in_width: int, *, token: Triple, classes: int, kind: str):
        super().__init__()
        factors = doublings(token)
        widths = [in_width, *stage_widths(narrowest_width(in_width), len(factors))]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(upsampling(kind, widths[i], widths[i + 1], factor), *norm_and_activation(widths[i + 1]))
                for i, factor in enumerate(factors)
            )
        )
        self.head = nn.Conv3d(widths[-1], classes, kernel_size=1)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        return self.head(self.stages(as_map(encoded.tokens, encoded.grid)))
