"""What networks are built from: settings, and what the plans say of the data. Shared parts are made here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from nnunet_vit_mae.networks.positions import Positions, PositionTable
from nnunet_vit_mae.networks.token_decoder import TokenDecoder
from nnunet_vit_mae.networks.tokenizer import ConvolutionalTokenizer, Tokenizer, map_widths
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.networks.upsampling import narrowest_width
from nnunet_vit_mae.presets import SIZES, Size
from nnunet_vit_mae.settings import Network, Triple

POSITION_MM = 8.0  # length that counts as one token where positions are in mm
ONE_MM = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """A network to build.

    Args:
        network: The settings.
        channels: Channels of the volumes.
        classes: Outputs per voxel of a segmentation.
        spacing: mm along z y x; only positions in mm depend on it.
        unet: Makes nnU-Net's own U-Net, which the decoder `unet` is built around.
    """

    network: Network
    channels: int
    classes: int = 1
    spacing: tuple[float, ...] = ONE_MM
    unet: Callable[[], nn.Module] | None = None

    @property
    def size(self) -> Size:
        """Widths, depths and heads."""
        return SIZES[self.network.size]

    @property
    def token(self) -> Triple:
        """Voxels of a token along z y x."""
        return self.network.token

    @property
    def narrowest(self) -> int:
        """Features at full resolution in convolutional decoders."""
        return self.network.decoder_width or narrowest_width(self.size.width)

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Features of the maps that the tokenizer makes on the way, fine to coarse."""
        if self.network.tokenizer != "convolutional":
            return ()
        return map_widths(self.token, narrowest_width(self.size.width))

    @property
    def positions(self) -> Positions:
        """How tokens are told apart."""
        network = self.network
        step = (1.0, 1.0, 1.0)
        if network.position_unit == "mm":
            z, y, x = (side * mm / POSITION_MM for side, mm in zip(network.token, self.spacing, strict=True))
            step = (z, y, x)
        return Positions(network.positions, step, network.rotary_base)

    def tokenizer(self) -> Tokenizer | ConvolutionalTokenizer:
        """Build the tokenizer of a network that stacks its channels."""
        if self.network.tokenizer == "convolutional":
            narrowest = narrowest_width(self.size.width)
            return ConvolutionalTokenizer(self.channels, self.token, self.size.width, narrowest=narrowest)
        return Tokenizer(self.channels, self.token, self.size.width)

    def transformer(self, *, drop_path: float) -> Transformer:
        """Build the transformer of the encoder."""
        size = self.size
        return Transformer(
            size.width,
            size.depth,
            size.heads,
            drop_path=drop_path,
            blocks=self.network.blocks,
            norm_eps=self.network.norm_eps,
        )

    def position_table(self) -> PositionTable | None:
        """Build the learned positions of the encoder, if it has any."""
        if not self.network.learned_positions:
            return None
        z, y, x = self.network.learned_positions
        return PositionTable((z, y, x), self.size.width)

    def token_decoder(self, *, outputs_per_voxel: int, heads: int = 0, cross: bool = False) -> TokenDecoder:
        """Build the light decoder of the size; `heads` replaces its number of attention heads."""
        size = self.size
        transformer = Transformer(
            size.decoder_width, size.decoder_depth, heads or size.decoder_heads, blocks=self.network.blocks
        )
        outputs = outputs_per_voxel * math.prod(self.token)
        return TokenDecoder(size.width, transformer, outputs=outputs, cross=cross, positions=self.positions)
