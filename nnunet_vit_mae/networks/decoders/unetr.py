"""The UNETR decoder (Hatamizadeh et al. 2022, https://arxiv.org/abs/2103.10504; ViTiac, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveStem, ModalityVectors
from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.decoders.expanding_path import ExpandingPath, ResidualBlock, SkipPath
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import stage_factors, stage_widths
from nnunet_vit_mae.networks.upsampling import as_map
from nnunet_vit_mae.settings import Triple


def build(blueprint: Blueprint) -> UNETRDecoder:
    """Build the decoder; an adaptive one looks at each contrast of the volume by itself."""
    network, channels = blueprint.network, blueprint.channels
    factors = stage_factors(blueprint.token)
    widths = stage_widths(blueprint.narrowest, len(factors))
    stem: nn.Module = ResidualBlock(channels, widths[-1])
    if network.adaptive:
        vectors = ModalityVectors(channels, network.modality_vectors)
        stem = AdaptiveStem(ResidualBlock(1, widths[-1]), vectors, width=widths[-1])
    return UNETRDecoder(
        stem,
        blueprint.size.width,
        widths,
        factors=factors,
        taps=len(network.tapped_blocks),
        classes=blueprint.classes,
        kind=network.upsampling,
        stem_widths=blueprint.stem_widths,
    )


class UNETRDecoder(nn.Module):
    """A U-Net decoder whose skips are the volume (finest) and hidden states of the encoder (the later, the coarser).

    The original's four stages are made for tokens of 16 voxels, and each skip has a hidden state. Here there are as
    many stages as the longest side of a token needs. Smaller tokens have fewer skips than hidden states: then the
    coarser skips have several. Where nothing is to be doubled, one stage joins the volume.

    `stem` makes the finest skip: the volume (b c z y x) in, the last of `widths` features (b f z y x) out.
    """

    def __init__(
        self,
        stem: nn.Module,
        in_width: int,
        widths: Sequence[int],
        *,
        factors: Sequence[Triple],
        taps: int,
        classes: int,
        kind: str,
        stem_widths: Sequence[int],
    ):
        super().__init__()
        self.stem = stem
        self.shares = shares(taps, len(widths) - 1)
        self.skips = nn.ModuleList(
            SkipPath(share * in_width, width, factors[: i + 1], kind=kind)
            for i, (share, width) in enumerate(zip(self.shares, widths[:-1], strict=True))
        )
        self.expand = ExpandingPath(in_width, widths, factors, classes=classes, kind=kind, stem_widths=stem_widths)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        hidden = [as_map(tokens, encoded.grid) for tokens in reversed(encoded.hidden)]
        skips = []
        for path, share in zip(self.skips, self.shares, strict=True):
            states, hidden = hidden[:share], hidden[share:]
            skips.append(path(torch.cat(states, dim=1)))
        present = () if encoded.present is None else (encoded.present,)
        skips.append(self.stem(encoded.volume, *present))
        return self.expand(as_map(encoded.tokens, encoded.grid), skips, encoded.stem)

    @property
    def stages(self) -> nn.ModuleList:
        """Steps from tokens to voxels, coarse to fine."""
        return self.expand.stages

    @property
    def heads(self) -> list[nn.Conv3d]:
        """Last layers."""
        return [self.expand.head]


def shares(taps: int, skips: int) -> list[int]:
    """Return how many hidden states each skip has, coarse to fine; the coarser ones have one more where needed.

    >>> shares(3, 2)
    [2, 1]
    """
    return [taps // skips + (number < taps % skips) for number in range(skips)]
