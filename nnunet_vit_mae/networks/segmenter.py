"""The fine-tuned network: encoder and segmentation decoder (ViTiac, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.precision import autocast


class Segmenter(nn.Module):
    """Volume (b c z y x) in, logits (b classes z y x) out, for any volume: tokens reach beyond it and are cut off.

    The network sets its own precision, because nnU-Net's trainer and predictor would run it in fp16, which small tokens
    overflow.
    """

    def __init__(self, encoder: Encoder | AdaptiveEncoder, decoder: nn.Module, *, taps: Sequence[int] = ()):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.taps = tuple(taps)

    def forward(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b classes z y x"]:
        with autocast(volume.device):
            logits = self.logits(volume)
        return logits.to(torch.float32)

    def logits(
        self, volume: Float[Tensor, "b c z y x"], present: list[list[int]] | None = None
    ) -> Float[Tensor, "b classes z y x"]:
        """Return logits in whatever precision the surroundings ask for; `present` as in `AdaptiveEncoder.encode`."""
        z, y, x = volume.shape[2:]
        return self.decoder(self.encoder.encode(volume, self.taps, present))[:, :, :z, :y, :x]
