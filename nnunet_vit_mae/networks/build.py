"""From settings to networks: the only place where numbers of a preset meet a constructor."""

from __future__ import annotations

import math

from torch import nn

from nnunet_vit_mae.networks.decoders.mae import MAEDecoder, TokenDecoder
from nnunet_vit_mae.networks.decoders.upscale import UpscaleDecoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.mae import MaskedAutoencoder
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.networks.tokenizer import Tokenizer
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.presets import SIZES, Network


def build_autoencoder(network: Network, channels: int, *, mask_ratio: float) -> MaskedAutoencoder:
    """The network of pre-training."""
    encoder = _encoder(network, channels, drop_path=0.0)
    return MaskedAutoencoder(encoder, _token_decoder(network, outputs_per_voxel=channels), mask_ratio=mask_ratio)


def build_segmenter(network: Network, channels: int, classes: int, *, drop_path: float) -> Segmenter:
    """The network of fine-tuning."""
    return Segmenter(_encoder(network, channels, drop_path=drop_path), _DECODERS[network.decoder](network, classes))


def _encoder(network: Network, channels: int, *, drop_path: float) -> Encoder:
    size = SIZES[network.size]
    transformer = Transformer(size.width, size.depth, size.heads, drop_path=drop_path)
    return Encoder(Tokenizer(channels, network.token, size.width), transformer, token=network.token, width=size.width)


def _token_decoder(network: Network, *, outputs_per_voxel: int) -> TokenDecoder:
    size = SIZES[network.size]
    transformer = Transformer(size.decoder_width, size.decoder_depth, size.decoder_heads)
    outputs = outputs_per_voxel * math.prod(network.token)
    return TokenDecoder(size.width, transformer, width=size.decoder_width, outputs=outputs)


def _mae(network: Network, classes: int) -> nn.Module:
    return MAEDecoder(_token_decoder(network, outputs_per_voxel=classes), token=network.token, classes=classes)


def _upscale(network: Network, classes: int) -> nn.Module:
    return UpscaleDecoder(SIZES[network.size].width, token=network.token, classes=classes)


_DECODERS = {"mae": _mae, "upscale": _upscale}
