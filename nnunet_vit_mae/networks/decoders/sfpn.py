"""The SFPN U-Net decoder (ViTiac, section 2.3): a simple feature pyramid with a U-Net decoder.

The pyramid follows ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527): every level is made from the last map of
the encoder alone. The paper gives no widths: here they are those of the `upscale` decoder.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.decoders.expanding_path import ExpandingPath, SkipPath
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import Triple
from nnunet_vit_mae.networks.upsampling import as_map, doublings, narrowest_width, stage_widths
from nnunet_vit_mae.presets import SIZES, Network


def build(network: Network, channels: int, classes: int) -> SFPNDecoder:
    """Build the decoder from settings."""
    width = SIZES[network.size].width
    return SFPNDecoder(width, token=network.token, classes=classes, kind=network.upsampling)


class SFPNDecoder(nn.Module):
    """A pyramid level for each stage, from the one above the token grid to voxels, and a U-Net decoder over them."""

    def __init__(self, in_width: int, *, token: Triple, classes: int, kind: str):
        super().__init__()
        factors = doublings(token) or [(1, 1, 1)]
        widths = stage_widths(narrowest_width(in_width), len(factors))
        self.pyramid = nn.ModuleList(
            SkipPath(in_width, width, factors[: i + 1], kind=kind) for i, width in enumerate(widths)
        )
        self.expand = ExpandingPath(in_width, widths, factors, classes=classes, kind=kind)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        last = as_map(encoded.tokens, encoded.grid)
        return self.expand(last, [path(last) for path in self.pyramid])

    @property
    def stages(self) -> nn.ModuleList:
        """Steps from tokens to voxels, coarse to fine."""
        return self.expand.stages
