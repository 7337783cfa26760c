"""From the token grid towards voxels: what all convolutional decoders share (ViTiac, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.settings import Triple


def narrowest_width(encoder_width: int) -> int:
    """Return the features at full resolution: a sixteenth of the encoder's width, in steps of eight."""
    return max(8, 8 * round(encoder_width / 128))


def as_map(tokens: Float[Tensor, "b n d"], grid: Triple) -> Float[Tensor, "b d z y x"]:
    """Put tokens at their places in the grid."""
    z, y, x = grid
    return rearrange(tokens, "b (z y x) d -> b d z y x", z=z, y=y, x=x)


def upsampling(kind: str, in_width: int, out_width: int, factor: Triple) -> nn.Module:
    """Build a layer (b in z y x) -> (b out z' y' x') that enlarges a map by a factor of 1 or 2 along each axis.

    `nearest`: nearest-neighbour interpolation and a 3x3x3 convolution, which treats all voxels alike. `transposed`: the
    usual transposed convolution with kernel and stride equal to the factor, where neighbours come from different
    weights: that is the checkerboard of figure 6.
    """
    if kind == "transposed":
        return nn.ConvTranspose3d(in_width, out_width, kernel_size=factor, stride=factor)
    return nn.Sequential(Repeat(factor), nn.Conv3d(in_width, out_width, kernel_size=3, padding=1))


class Repeat(nn.Module):
    """Repeat each value of a map in its own precision: on a GPU autocast would write all of them in fp32 first."""

    def __init__(self, factor: Triple):
        super().__init__()
        self.factor = tuple(map(float, factor))

    def forward(self, features: Float[Tensor, "b d z y x"]) -> Float[Tensor, "b d zz yy xx"]:
        with torch.autocast(features.device.type, enabled=False):
            return functional.interpolate(features, scale_factor=self.factor, mode="nearest")


def stem_joins(stem_widths: Sequence[int], widths: Sequence[int]) -> nn.ModuleList:
    """Return a linear map for each stage (coarse to fine) from the tokenizer's map of that resolution (fine to coarse).

    Without such maps there are none.
    """
    return nn.ModuleList(
        nn.Conv3d(features, width, kernel_size=1)
        for features, width in zip(reversed(stem_widths), widths, strict=bool(stem_widths))
    )
