"""The SFPN U-Net decoder (ViTiac, section 2.3): a simple feature pyramid with a U-Net decoder.

The pyramid follows ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527): every level, the coarsest one at half the
resolution of the tokens, is made from the last map of the encoder alone. ViTiac gives no widths: here they follow the
encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence

from einops.layers.torch import Rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.decoders.expanding_path import ExpandingPath, Stage
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import stage_factors, stage_widths
from nnunet_vit_mae.networks.upsampling import as_map, upsampling
from nnunet_vit_mae.settings import Triple

DOUBLED = (2, 2, 2)  # from the coarsest level to the tokens
WIDEST = 320  # features of the two coarsest levels, as in nnU-Net's U-Nets


def build(blueprint: Blueprint) -> SFPNDecoder:
    """Build the decoder."""
    return SFPNDecoder(
        blueprint.size.width,
        blueprint.narrowest,
        factors=stage_factors(blueprint.token),
        classes=blueprint.classes,
        kind=blueprint.network.upsampling,
        stem_widths=blueprint.stem_widths,
    )


class SFPNDecoder(nn.Module):
    """A pyramid from half the resolution of the tokens to voxels, and a U-Net decoder that climbs it.

    `pyramid` has the levels coarse to fine. Their widths double towards the coarsest; the last two doublings end at the
    encoder's width, or at 320.
    """

    def __init__(
        self,
        in_width: int,
        narrowest: int,
        *,
        factors: Sequence[Triple],
        classes: int,
        kind: str,
        stem_widths: Sequence[int],
    ):
        super().__init__()
        all_widths = stage_widths(narrowest, 2 + len(factors))
        coarsest, of_tokens = (min(width, in_width, WIDEST) for width in all_widths[:2])
        widths = all_widths[2:]
        climbs = [list(zip(factors[:level], widths[:level], strict=True)) for level in range(1, 1 + len(factors))]
        pooled = nn.MaxPool3d(2, ceil_mode=True)
        self.pyramid = nn.ModuleList(
            [
                nn.Sequential(pooled, *_level(in_width, coarsest)),
                nn.Sequential(*_level(in_width, of_tokens)),
                *(
                    nn.Sequential(*_climb(in_width, steps, kind), *_level(steps[-1][1], steps[-1][1]))
                    for steps in climbs
                ),
            ]
        )
        # a norm over places means nothing where they are few
        self.to_tokens = Stage(coarsest, of_tokens, DOUBLED, kind=kind, norm=norm_over_channels)
        self.expand = ExpandingPath(of_tokens, widths, factors, classes=classes, kind=kind, stem_widths=stem_widths)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        last = as_map(encoded.tokens, encoded.grid)
        coarsest, of_tokens, *finer = (level(last) for level in self.pyramid)
        return self.expand(self.to_tokens(coarsest, of_tokens), finer, encoded.stem)

    @property
    def stages(self) -> nn.ModuleList:
        """Steps from tokens to voxels, coarse to fine."""
        return self.expand.stages

    @property
    def heads(self) -> list[nn.Conv3d]:
        """Last layers."""
        return [self.expand.head]


def norm_over_channels(width: int) -> nn.Module:
    """Build a layer norm of each place of a map, as in ViTDet."""
    return nn.Sequential(
        Rearrange("b d z y x -> b z y x d"), nn.LayerNorm(width, eps=1e-6), Rearrange("b z y x d -> b d z y x")
    )


def _climb(in_width: int, steps: Sequence[tuple[Triple, int]], kind: str) -> list[nn.Module]:
    """Return a doubling for each step (its factor and width), with norm and activation between them."""
    layers: list[nn.Module] = []
    for number, (factor, width) in enumerate(steps):
        if number:
            layers += [norm_over_channels(in_width), nn.GELU()]
        layers.append(upsampling(kind, in_width, width, factor))
        in_width = width
    return layers


def _level(in_width: int, width: int) -> list[nn.Module]:
    """Return what each level of ViTDet ends with."""
    return [
        nn.Conv3d(in_width, width, kernel_size=1, bias=False),
        norm_over_channels(width),
        nn.Conv3d(width, width, kernel_size=3, padding=1, bias=False),
        norm_over_channels(width),
    ]
