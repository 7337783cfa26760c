"""nnU-Net's own U-Net with the ViT in it: a CNN-ViT hybrid in one network (ViTiac names ensembles as future work).

The U-Net is the one that nnU-Net planned. What the ViT makes of the volume joins it at the stage of the token's stride,
through a projection that starts at zero. So at the first step the network is nnU-Net's, and pre-training can only add.
"""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.upsampling import as_map
from nnunet_vit_mae.settings import Triple


def build(blueprint: Blueprint) -> UNetDecoder:
    """Build the decoder around the U-Net of the plans.

    Raises:
        ValueError: If the blueprint has no U-Net.
    """
    if blueprint.unet is None:
        raise ValueError("expected a blueprint with nnU-Net's U-Net, which the decoder unet is built around")
    return UNetDecoder(blueprint.unet(), blueprint.size.width, token=blueprint.token)


class UNetDecoder(nn.Module):
    """A whole U-Net over the volume; the ViT's last map joins the features of one of its stages.

    Args:
        unet: A U-Net with `encoder` and `decoder`, as dynamic-network-architectures builds them.
        in_width: Width of the ViT.
        token: Voxels of a token (z y x).
    """

    def __init__(self, unet: nn.Module, in_width: int, *, token: Triple):
        super().__init__()
        self.unet: Any = unet
        self.stage = matching_stage(unet, token)
        self.stride = strides(unet)[self.stage]
        self.projection = nn.Conv3d(in_width, self.unet.encoder.output_channels[self.stage], kernel_size=1, bias=False)
        nn.init.zeros_(self.projection.weight)

    def forward(self, encoded: Encoded) -> Float[Tensor, "b classes z y x"] | list[Tensor]:
        """Return logits; with deep supervision those of all resolutions, fine to coarse."""
        padded = encoded.volume.shape[2:]
        z, y, x = encoded.shape
        features = self.unet.encoder(encoded.volume[:, :, :z, :y, :x])  # its norms would see padding
        joined = self.projection(as_map(encoded.tokens, encoded.grid))
        covered = [math.ceil(side / stride) for side, stride in zip(padded, self.stride, strict=True)]
        if list(joined.shape[2:]) != covered:  # no stage has the token's stride along all axes
            joined = functional.interpolate(joined, covered, mode="trilinear")
        z, y, x = features[self.stage].shape[2:]
        features[self.stage] = features[self.stage] + joined[:, :, :z, :y, :x]
        return self.unet.decoder(features)

    @property
    def deep_supervision(self) -> bool:
        """Whether logits of all resolutions are returned; nnU-Net's trainer switches it."""
        return self.unet.decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        self.unet.decoder.deep_supervision = enabled

    @property
    def stages(self) -> nn.ModuleList:
        """Steps from the bottleneck to voxels, coarse to fine."""
        return self.unet.decoder.stages

    @property
    def heads(self) -> list[nn.Module]:
        """Last layers, one for each resolution."""
        return list(self.unet.decoder.seg_layers)


def matching_stage(unet: Any, token: Triple) -> int:
    """Return the stage of a U-Net's encoder whose features are spaced most like tokens."""
    distances = [
        sum(abs(math.log2(own / side)) for own, side in zip(stride, token, strict=True)) for stride in strides(unet)
    ]
    return distances.index(min(distances))


def strides(unet: Any) -> list[list[int]]:
    """Return the stride of each stage of a U-Net's encoder with respect to voxels (z y x)."""
    stages = [[1, 1, 1]]
    for step in unet.encoder.strides:
        stages.append([side * factor for side, factor in zip(stages[-1], _triple(step), strict=True)])
    return stages[1:]


def _triple(stride: Any) -> list[int]:
    return [int(side) for side in stride] if hasattr(stride, "__len__") else [int(stride)] * 3
