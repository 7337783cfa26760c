"""Volumes to tokens and back (ViTiac, section 2.2: "cubes as tokens"), for any token size along each axis."""

from __future__ import annotations

import math

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.settings import Triple, token_grid


def grid_of(volume: Float[Tensor, "b c z y x"], token: Triple) -> Triple:
    """Return the number of tokens along z y x that cover a volume; the last one of an axis may reach beyond it."""
    z, y, x = token_grid(volume.shape[2:], token)
    return z, y, x


def padded(volume: Float[Tensor, "b c z y x"], token: Triple) -> Float[Tensor, "b c zz yy xx"]:
    """Append zeros at the far end of each axis, up to whole tokens."""
    missing = [-voxels % side for side, voxels in zip(token, volume.shape[2:], strict=True)]
    if not any(missing):
        return volume
    return functional.pad(volume, (0, missing[2], 0, missing[1], 0, missing[0]))


def patchify(volume: Float[Tensor, "b c z y x"], token: Triple) -> Float[Tensor, "b n c v"]:
    """Cut a volume, padded to whole tokens, into tokens in the order z y x."""
    pattern = "b c (z tz) (y ty) (x tx) -> b (z y x) c (tz ty tx)"
    tz, ty, tx = token
    return rearrange(padded(volume, token), pattern, tz=tz, ty=ty, tx=tx)


def unpatchify(patches: Float[Tensor, "b n c v"], grid: Triple, token: Triple) -> Float[Tensor, "b c z y x"]:
    """Put tokens back into a volume: the inverse of `patchify`, padding included."""
    (z, y, x), (tz, ty, tx) = grid, token
    pattern = "b (z y x) c (tz ty tx) -> b c (z tz) (y ty) (x tx)"
    return rearrange(patches, pattern, z=z, y=y, x=x, tz=tz, ty=ty, tx=tx)


def voxels_inside(volume: Float[Tensor, "b c z y x"], token: Triple) -> Float[Tensor, "1 n 1 v"]:
    """Return 1 where a voxel of a token lies inside the volume, and 0 in the padding."""
    return patchify(torch.ones_like(volume[:1, :1]), token)


def moments(
    patches: Float[Tensor, "b n c v"], inside: Float[Tensor, "#b n 1 v"]
) -> tuple[Float[Tensor, "b n c 1"], Float[Tensor, "b n c 1"]]:
    """Return mean and (unbiased) variance of each token and channel over the voxels that are `inside`, 0 if none is."""
    count = inside.sum(dim=-1, keepdim=True)
    mean = (patches * inside).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    return mean, ((patches - mean).square() * inside).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)


class Tokenizer(nn.Module):
    """Embed tokens by one linear layer. It takes cut patches, so that only the visible ones cost anything."""

    def __init__(self, channels: int, token: Triple, width: int):
        super().__init__()
        self.projection = nn.Linear(channels * math.prod(token), width)

    def forward(self, patches: Float[Tensor, "b k c v"]) -> Float[Tensor, "b k d"]:
        return self.projection(patches.flatten(2))

    def with_maps(self, patches: Float[Tensor, "b n c v"], grid: Triple) -> tuple[Float[Tensor, "b n d"], list[Tensor]]:
        """Embed all tokens of a grid; there are no maps on the way."""
        return self(patches), []


class ConvolutionalTokenizer(nn.Module):
    """Embed tokens by a residual convolutional stem that works inside each token's cube (after PrimusV2's).

    Convolutions never see a neighbouring cube. So only visible tokens are computed in pre-training, nothing of a hidden
    one leaks into them, and fine-tuning meets the same features. The maps before each halving are fine skips for
    decoders.

    Args:
        channels: Channels of the volume.
        token: Voxels of a token (z y x).
        width: Length of a token's embedding.
        narrowest: Features at full resolution; each halving doubles them.
    """

    def __init__(self, channels: int, token: Triple, width: int, *, narrowest: int):
        super().__init__()
        self.token = token
        factors, widths = stage_factors(token)[::-1], map_widths(token, narrowest)  # fine to coarse
        self.entry = nn.Conv3d(channels, narrowest, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(CubeBlock(features) for features in widths)
        outputs = [*widths[1:], width]
        self.halvings = nn.ModuleList(
            nn.Conv3d(features, output, kernel_size=factor, stride=factor)
            for features, output, factor in zip(widths, outputs, factors, strict=True)
        )

    def forward(self, patches: Float[Tensor, "b k c v"]) -> Float[Tensor, "b k d"]:
        return self._embed(patches)[0]

    def with_maps(self, patches: Float[Tensor, "b n c v"], grid: Triple) -> tuple[Float[Tensor, "b n d"], list[Tensor]]:
        """Embed all tokens of a grid; the maps (b f z y x) at each resolution on the way are put together again."""
        tokens, cubes = self._embed(patches)
        z, y, x = grid
        pattern = "(b z y x) f tz ty tx -> b f (z tz) (y ty) (x tx)"
        return tokens, [rearrange(cube, pattern, z=z, y=y, x=x) for cube in cubes]

    def _embed(self, patches: Float[Tensor, "b k c v"]) -> tuple[Float[Tensor, "b k d"], list[Tensor]]:
        tz, ty, tx = self.token
        features = self.entry(rearrange(patches, "b k c (z y x) -> (b k) c z y x", z=tz, y=ty, x=tx))
        cubes = []
        for block, halving in zip(self.blocks, self.halvings, strict=True):
            features = block(features)
            cubes.append(features)
            features = halving(features)
        return rearrange(features, "(b k) d 1 1 1 -> b k d", b=len(patches)), cubes


class CubeBlock(nn.Module):
    """Two convolutions beside a residual. The norm is over the features of a voxel, so that brightness is not lost."""

    def __init__(self, features: int):
        super().__init__()
        self.norm = LayerNormNd(features)
        self.first = nn.Conv3d(features, features, kernel_size=3, padding=1)
        self.second = nn.Conv3d(features, features, kernel_size=3, padding=1)

    def forward(self, cubes: Float[Tensor, "bk f z y x"]) -> Float[Tensor, "bk f z y x"]:
        return cubes + self.second(functional.gelu(self.first(self.norm(cubes))))


def doublings(token: Triple) -> list[Triple]:
    """Return the factors from token to voxels, coarse to fine; short sides are doubled first, the longest to the end.

    >>> doublings((2, 8, 8))
    [(2, 2, 2), (1, 2, 2), (1, 2, 2)]
    """
    steps = [side.bit_length() - 1 for side in token]
    z, y, x = ([2] * n + [1] * (max(steps) - n) for n in steps)
    return list(zip(z, y, x, strict=True))


def stage_factors(token: Triple) -> list[Triple]:
    """Return the doublings of a token, or the one stage of a token of a single voxel, which doubles nothing."""
    return doublings(token) or [(1, 1, 1)]


def stage_widths(narrowest: int, stages: int) -> list[int]:
    """Return the features of each stage, coarse to fine: the last has the fewest, each one before it twice as many."""
    return [narrowest << level for level in reversed(range(stages))]


def map_widths(token: Triple, narrowest: int) -> tuple[int, ...]:
    """Return the features of each map that a `ConvolutionalTokenizer` makes on the way, fine to coarse.

    >>> map_widths((2, 8, 8), 24)
    (24, 48, 96)
    """
    return tuple(reversed(stage_widths(narrowest, len(stage_factors(token)))))
