"""Volumes to tokens and back (ViTiac, section 2.2: "cubes as tokens"), for any token size along each axis."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.presets import token_grid

Triple = tuple[int, int, int]


def grid_of(volume: Float[Tensor, "b c z y x"], token: Triple) -> Triple:
    """Tokens along z y x that cover the volume; the last one of an axis may reach beyond it."""
    z, y, x = token_grid(volume.shape[2:], token)
    return z, y, x


def padded(volume: Float[Tensor, "b c z y x"], token: Triple) -> Float[Tensor, "b c zz yy xx"]:
    """The volume with zeros at the far end of each axis, up to whole tokens."""
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
    """The inverse of `patchify`, padding included."""
    (z, y, x), (tz, ty, tx) = grid, token
    pattern = "b (z y x) c (tz ty tx) -> b c (z tz) (y ty) (x tx)"
    return rearrange(patches, pattern, z=z, y=y, x=x, tz=tz, ty=ty, tx=tx)


def voxels_inside(volume: Float[Tensor, "b c z y x"], token: Triple) -> Float[Tensor, "1 n 1 v"]:
    """One where a voxel of a token lies inside the volume, zero in the padding."""
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
