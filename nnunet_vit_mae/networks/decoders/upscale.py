"""The upscale decoder (ViTiac, sections 2.3 and 2.4): from the token grid to voxels by repeated doubling.

Nearest-neighbour upsampling and a 3x3x3 convolution, which leaves no checkerboard; InstanceNorm and LeakyReLU as in
nnU-Net, since the paper names neither.
"""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.tokenizer import Triple


class UpscaleDecoder(nn.Module):
    """As many doublings as the longest side of a token needs, and a linear layer to the classes.

    The last stage has a sixteenth of the encoder's width (in steps of eight channels), each one before it twice that.
    """

    def __init__(self, in_width: int, *, token: Triple, classes: int):
        super().__init__()
        factors = doublings(token)
        narrowest = max(8, 8 * round(in_width / 128))
        widths = [in_width, *(narrowest << i for i in reversed(range(len(factors))))]
        self.stages = nn.Sequential(*(_stage(widths[i], widths[i + 1], factor) for i, factor in enumerate(factors)))
        self.head = nn.Conv3d(widths[-1], classes, kernel_size=1)

    def forward(self, tokens: Float[Tensor, "b n d"], grid: Triple) -> Float[Tensor, "b classes z y x"]:
        z, y, x = grid
        features = rearrange(tokens, "b (z y x) d -> b d z y x", z=z, y=y, x=x)
        return self.head(self.stages(features))


def doublings(token: Triple) -> list[Triple]:
    """The factor of each stage, coarse to fine; a short side is doubled first, the longest ones go on to the end."""
    steps = [side.bit_length() - 1 for side in token]
    z, y, x = ([2] * n + [1] * (max(steps) - n) for n in steps)
    return list(zip(z, y, x, strict=True))


def _stage(in_width: int, out_width: int, factor: Triple) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=factor, mode="nearest"),
        nn.Conv3d(in_width, out_width, kernel_size=3, padding=1),
        nn.InstanceNorm3d(out_width, affine=True),
        nn.LeakyReLU(0.01, inplace=True),
    )
