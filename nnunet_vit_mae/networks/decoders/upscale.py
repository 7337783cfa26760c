"""The upscale decoder (ViTiac, section 2.3): from the encoder's last map to voxels by repeated doubling."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import doublings, stage_widths
from nnunet_vit_mae.networks.upsampling import as_map, stem_joins, upsampling
from nnunet_vit_mae.settings import Triple


def build(blueprint: Blueprint) -> UpscaleDecoder:
    """Build the decoder."""
    factors = doublings(blueprint.token) or [(1, 1, 1)] * len(blueprint.stem_widths)
    return UpscaleDecoder(
        blueprint.size.width,
        stage_widths(blueprint.narrowest, len(factors)),
        factors=factors,
        classes=blueprint.classes,
        kind=blueprint.network.upsampling,
        convolutions=blueprint.network.upscale_convolutions,
        stem_widths=blueprint.stem_widths,
    )


class UpscaleDecoder(nn.Module):
    """As many doublings as the longest side of a token needs, and a linear layer to the classes.

    The paper's stages have one convolution, which is the upsampling's own; further `convolutions` of 3x3x3 follow it.
    The maps of a convolutional tokenizer are added to the stages of their resolution: where nothing is to be doubled,
    it has one map, and there is one stage for it.
    """

    def __init__(
        self,
        in_width: int,
        widths: Sequence[int],
        *,
        factors: Sequence[Triple],
        classes: int,
        kind: str,
        convolutions: int = 1,
        stem_widths: Sequence[int] = (),
    ):
        super().__init__()
        inputs = [in_width, *widths]
        self.stages = nn.ModuleList(
            nn.Sequential(
                upsampling(kind, inputs[i], width, factor),
                *_norm_and_activation(width),
                *(layer for _ in range(convolutions - 1) for layer in _convolution(width)),
            )
            for i, (width, factor) in enumerate(zip(widths, factors, strict=True))
        )
        self.joins = stem_joins(stem_widths, widths)
        self.head = nn.Conv3d(inputs[-1], classes, kernel_size=1)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        features = as_map(encoded.tokens, encoded.grid)
        for number, stage in enumerate(self.stages):
            features = stage(features)
            if self.joins:
                features = features + self.joins[number](encoded.stem[-1 - number])
        return self.head(features)

    @property
    def heads(self) -> list[nn.Conv3d]:
        """Last layers."""
        return [self.head]


def _convolution(width: int) -> list[nn.Module]:
    return [nn.Conv3d(width, width, kernel_size=3, padding=1), *_norm_and_activation(width)]


def _norm_and_activation(width: int) -> list[nn.Module]:
    """Build InstanceNorm and LeakyReLU as in nnU-Net, for the paper names neither."""
    return [nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU(0.01, inplace=True)]
