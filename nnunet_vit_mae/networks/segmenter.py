"""The fine-tuned network: encoder and segmentation decoder (ViTiac, section 2.3)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.networks.tokenizer import grid_of, patchify


class Segmenter(nn.Module):
    """Volume (b c z y x) in, logits (b classes z y x) out, for any volume: tokens reach beyond it and are cut off.

    The network sets its own precision, because nnU-Net's trainer and predictor would run it in fp16, which small tokens
    overflow.
    """

    def __init__(self, encoder: Encoder, decoder: nn.Module):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, volume: Float[Tensor, "b c z y x"]) -> Float[Tensor, "b classes z y x"]:
        z, y, x = volume.shape[2:]
        with autocast(volume.device):
            grid = grid_of(volume, self.encoder.token)
            tokens = self.encoder(patchify(volume, self.encoder.token), grid)
            logits = self.decoder(tokens, grid)[:, :, :z, :y, :x]
        return logits.to(torch.float32)
