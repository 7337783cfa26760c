"""The UNETR decoder (Hatamizadeh et al. 2022, https://arxiv.org/abs/2103.10504; ViTiac, section 2.3)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveStem, ModalityVectors
from nnunet_vit_mae.networks.decoders.expanding_path import ExpandingPath, ResidualBlock, SkipPath
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.tokenizer import Triple
from nnunet_vit_mae.networks.upsampling import as_map, doublings, stage_widths
from nnunet_vit_mae.presets import SIZES, Network

NARROWEST = 16  # the feature size of the public code, whatever the encoder's width


def build(network: Network, channels: int, classes: int) -> UNETRDecoder:
    """Build the decoder from settings; an adaptive one looks at each contrast of the volume by itself."""
    stem: nn.Module = ResidualBlock(channels, NARROWEST)
    if network.adaptive:
        vectors = ModalityVectors(channels, network.modality_vectors)
        stem = AdaptiveStem(ResidualBlock(1, NARROWEST), vectors, width=NARROWEST)
    width = SIZES[network.size].width
    return UNETRDecoder(stem, width, token=network.token, classes=classes, kind=network.upsampling)


class UNETRDecoder(nn.Module):
    """A U-Net decoder whose skips are the volume (finest) and hidden states of the encoder (the later, the coarser).

    The original's four stages are made for tokens of 16 voxels; here there are as many as the longest side of a token
    needs, and a tapped block for each one but the last. Where nothing is to be doubled, one stage joins the volume.

    `stem` makes the finest skip: the volume (b c z y x) in, `NARROWEST` features (b f z y x) out.
    """

    def __init__(self, stem: nn.Module, in_width: int, *, token: Triple, classes: int, kind: str):
        super().__init__()
        factors = doublings(token) or [(1, 1, 1)]
        widths = stage_widths(NARROWEST, len(factors))
        self.stem = stem
        self.skips = nn.ModuleList(
            SkipPath(in_width, width, factors[: i + 1], kind=kind) for i, width in enumerate(widths[:-1])
        )
        self.expand = ExpandingPath(in_width, widths, factors, classes=classes, kind=kind)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"]:
        hidden = [as_map(tokens, encoded.grid) for tokens in reversed(encoded.hidden)]
        skips = [path(state) for path, state in zip(self.skips, hidden, strict=True)]
        present = () if encoded.present is None else (encoded.present,)
        finest = self.stem(encoded.volume, *present)
        return self.expand(as_map(encoded.tokens, encoded.grid), [*skips, finest])

    @property
    def stages(self) -> nn.ModuleList:
        """Steps from tokens to voxels, coarse to fine."""
        return self.expand.stages
