"""The SFPN U-Net decoder (ViTiac, section 2.3): a simple feature pyramid with a U-Net decoder.

The pyramid follows ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527): every level is made from the last map of
the encoder alone. The paper gives no widths: here they follow the encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.decoders.expanding_path import ExpandingPath, SkipPath
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import Triple, doublings
from nnunet_vit_mae.networks.upsampling import as_map, stage_widths


def build(blueprint: Blueprint) -> SFPNDecoder:
    """Build the decoder."""
    widths = stage_widths(blueprint.narrowest, len(doublings(blueprint.token)) or 1)
    return SFPNDecoder(
        blueprint.size.width,
        widths,
        token=blueprint.token,
        classes=blueprint.classes,
        kind=blueprint.network.upsampling,
        stem_widths=blueprint.stem_widths,
    )


class SFPNDecoder(nn.Module):
    """A pyramid level for each stage, from the one above the token grid to voxels, and a U-Net decoder over them."""

    def __init__(
        self,
        in_width: int,
        widths: Sequence[int],
        *,
        token: Triple,
        classes: int,
        kind: str,
        stem_widths: Sequence[int] = (),
    ):
        super().__init__()
        factors = doublings(token) or [(1, 1, 1)]
        self.pyramid = nn.ModuleList(
            SkipPath(in_width, width, factors[: i + 1], kind=kind) for i, width in enumerate(widths)
        )
        self.expand = ExpandingPath(in_width, widths, factors, classes=classes, kind=kind, stem_widths=stem_widths)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        last = as_map(encoded.tokens, encoded.grid)
        return self.expand(last, [path(last) for path in self.pyramid], encoded.stem)

    @property
    def stages(self) -> nn.ModuleList:
        """Steps from tokens to voxels, coarse to fine."""
        return self.expand.stages
