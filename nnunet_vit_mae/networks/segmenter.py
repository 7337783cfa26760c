"""The fine-tuned network: encoder and segmentation decoder (ViTiac, section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.precision import autocast, in_fp32


class Segmenter(nn.Module):
    """Volume (b c z y x) in, logits (b classes z y x) out, for any volume: tokens reach beyond it and are cut off.

    The network sets its own precision, because nnU-Net's trainer and predictor would run it in fp16, which small tokens
    overflow.
    """

    def __init__(self, encoder: Encoder | AdaptiveEncoder, decoder: nn.Module, *, taps: Sequence[int] = ()):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.taps = tuple(taps)

    def forward(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b classes z y x"] | list[Tensor]:
        """Return logits in fp32; with deep supervision (decoder `unet`) those of all resolutions, fine to coarse."""
        with autocast(volume.device):
            logits = self.logits(volume)
        return in_fp32(logits)

    def logits(
        self, volume: Float[Tensor, "b c z y x"], present: list[list[int]] | None = None
    ) -> Float[Tensor, "b classes z y x"] | list[Tensor]:
        """Return logits in whatever precision the surroundings ask for; `present` as in `AdaptiveEncoder.encode`."""
        logits = self.decoder(self.encoder.encode(volume, self.taps, present))
        if isinstance(logits, list):  # those of `unet`, which end with the volume
            return logits
        z, y, x = volume.shape[2:]
        return logits[:, :, :z, :y, :x]


def prior_logits(classes: int, foreground: float, *, regions: bool) -> list[float]:
    """Return the logits of outputs that hold a share of the voxels for foreground.

    Training starts from them, as focal loss does (Lin et al. 2017, section 3.3). From random biases the first hundreds
    of steps of AdamW go into making every voxel background, and a class may not come back from there.

    Args:
        classes: Outputs of the network.
        foreground: Between 0 and 1. Classes have equal parts of it.
        regions: Each output has a probability of its own; otherwise the first one is the background.

    >>> torch.tensor(prior_logits(3, 0.02, regions=False)).softmax(dim=0)
    tensor([0.9800, 0.0100, 0.0100])
    >>> torch.tensor(prior_logits(2, 0.02, regions=True)).sigmoid()
    tensor([0.0200, 0.0200])
    """
    if regions:
        return [math.log(foreground / (1 - foreground))] * classes
    return [math.log(1 - foreground), *[math.log(foreground / (classes - 1))] * (classes - 1)]


@torch.no_grad()
def start_from(heads: Iterable[nn.Module], logits: Sequence[float]) -> None:
    """Set the biases of last layers to a logit for each class, of which they have one output, or one for each voxel."""
    for head in heads:
        bias = head.get_parameter("bias")
        own = torch.tensor(logits, dtype=bias.dtype, device=bias.device)
        bias.copy_(own.repeat_interleave(len(bias) // len(own)))
