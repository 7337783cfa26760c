"""The expanding half of a U-Net (Ronneberger et al. 2015), which the `unetr` and `sfpn` decoders share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.networks.upsampling import stem_joins, upsampling
from nnunet_vit_mae.settings import Triple

Norm = Callable[[int], nn.Module]  # of a number of features
INSTANCE_NORM: Norm = partial(nn.InstanceNorm3d, affine=True)


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions beside a shortcut, as in UNETR's public code."""

    def __init__(self, in_width: int, width: int, *, norm: Norm = INSTANCE_NORM):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv3d(in_width, width, kernel_size=3, padding=1, bias=False),
            norm(width),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(width, width, kernel_size=3, padding=1, bias=False),
            norm(width),
        )
        self.shortcut = nn.Identity()
        if in_width != width:
            projection = nn.Conv3d(in_width, width, kernel_size=1, bias=False)
            self.shortcut = nn.Sequential(projection, norm(width))

    def forward(self, features: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b d z y x"]:
        return functional.leaky_relu(self.convolutions(features) + self.shortcut(features), 0.01)


class SkipPath(nn.Sequential):
    """From a map of the encoder to a finer skip: an upsampling per factor, and a residual block from the second on."""

    def __init__(self, in_width: int, width: int, factors: Sequence[Triple], *, kind: str):
        layers: list[nn.Module] = [upsampling(kind, in_width, width, factors[0])]
        for factor in factors[1:]:
            layers += [upsampling(kind, width, width, factor), ResidualBlock(width, width)]
        super().__init__(*layers)


class Stage(nn.Module):
    """One step up: upsample, join with the skip of that resolution, which may end a place earlier, and convolve."""

    def __init__(self, in_width: int, width: int, factor: Triple, *, kind: str, norm: Norm = INSTANCE_NORM):
        super().__init__()
        self.up = upsampling(kind, in_width, width, factor)
        self.block = ResidualBlock(2 * width, width, norm=norm)

    def forward(
        self, features: Float[Tensor, "b c z y x"], skip: Float[Tensor, "b d zz yy xx"]
    ) -> Float[Tensor, "b d zz yy xx"]:
        z, y, x = skip.shape[2:]
        return self.block(torch.cat([self.up(features)[:, :, :z, :y, :x], skip], dim=1))


class ExpandingPath(nn.Module):
    """Stages from the coarsest map to voxels, and a linear layer to the classes; a skip per stage, coarse to fine.

    The maps of a convolutional tokenizer (fine to coarse) are added to the skips of their resolution.
    """

    def __init__(
        self,
        in_width: int,
        widths: Sequence[int],
        factors: Sequence[Triple],
        *,
        classes: int,
        kind: str,
        stem_widths: Sequence[int],
    ):
        super().__init__()
        inputs = [in_width, *widths]
        self.joins = stem_joins(stem_widths, widths)
        self.stages = nn.ModuleList(Stage(inputs[i], widths[i], factor, kind=kind) for i, factor in enumerate(factors))
        self.head = nn.Conv3d(widths[-1], classes, kernel_size=1)

    def forward(
        self, features: Float[Tensor, "b d z y x"], skips: Sequence[Tensor], stem: Sequence[Tensor] = ()
    ) -> Float[Tensor, "b classes zz yy xx"]:
        for number, (stage, skip) in enumerate(zip(self.stages, skips, strict=True)):
            joined = skip + self.joins[number](stem[-1 - number]) if self.joins else skip
            features = stage(features, joined)
        return self.head(features)
