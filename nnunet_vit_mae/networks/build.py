"""From settings to networks: the only place where numbers of a preset meet a constructor."""

from __future__ import annotations

import math

from torch import nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, AdaptiveStem, DynamicTokenizer, ModalityVectors
from nnunet_vit_mae.networks.adaptive_autoencoder import AdaptiveMaskedAutoencoder
from nnunet_vit_mae.networks.autoencoder import MaskedAutoencoder
from nnunet_vit_mae.networks.decoders.mae import MAEDecoder, TokenDecoder
from nnunet_vit_mae.networks.decoders.sfpn import SFPNDecoder
from nnunet_vit_mae.networks.decoders.unet import ResidualBlock
from nnunet_vit_mae.networks.decoders.unetr import NARROWEST, UNETRDecoder
from nnunet_vit_mae.networks.decoders.upscale import UpscaleDecoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.networks.tokenizer import Tokenizer
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.presets import SIZES, Network, Pretraining

Autoencoder = MaskedAutoencoder | AdaptiveMaskedAutoencoder


def build_autoencoder(network: Network, channels: int, protocol: Pretraining) -> Autoencoder:
    """The network of pre-training."""
    encoder = _encoder(network, channels, drop_path=0.0)
    heads, cross = protocol.decoder_heads, protocol.decoder == "cross"
    outputs = 1 if network.adaptive else channels
    decoder = _token_decoder(network, outputs_per_voxel=outputs, heads=heads, cross=cross)
    masking = Masking(
        mask_ratio=protocol.mask_ratio, rebuilt_share=protocol.rebuilt_share, skip_background=protocol.skip_background
    )
    if isinstance(encoder, AdaptiveEncoder):
        return AdaptiveMaskedAutoencoder(encoder, decoder, masking, contrasts=channels)
    return MaskedAutoencoder(encoder, decoder, masking)


def build_segmenter(network: Network, channels: int, classes: int, *, drop_path: float) -> Segmenter:
    """The network of fine-tuning."""
    encoder = _encoder(network, channels, drop_path=drop_path)
    return Segmenter(encoder, _DECODERS[network.decoder](network, channels, classes), taps=network.tapped_blocks)


def _encoder(network: Network, channels: int, *, drop_path: float) -> Encoder | AdaptiveEncoder:
    size, token = SIZES[network.size], network.token
    transformer = Transformer(size.width, size.depth, size.heads, drop_path=drop_path)
    if network.adaptive:
        tokenizer = DynamicTokenizer(ModalityVectors(channels, network.modality_vectors), token, size.width)
        return AdaptiveEncoder(tokenizer, transformer, token=token, width=size.width)
    return Encoder(Tokenizer(channels, token, size.width), transformer, token=token, width=size.width)


def _token_decoder(network: Network, *, outputs_per_voxel: int, heads: int = 0, cross: bool = False) -> TokenDecoder:
    size = SIZES[network.size]
    transformer = Transformer(size.decoder_width, size.decoder_depth, heads or size.decoder_heads)
    outputs = outputs_per_voxel * math.prod(network.token)
    return TokenDecoder(size.width, transformer, width=size.decoder_width, outputs=outputs, cross=cross)


def _unetr(network: Network, channels: int, classes: int) -> nn.Module:
    width = SIZES[network.size].width
    stem: nn.Module = ResidualBlock(channels, NARROWEST)
    if network.adaptive:
        vectors = ModalityVectors(channels, network.modality_vectors)
        stem = AdaptiveStem(ResidualBlock(1, NARROWEST), vectors, width=NARROWEST)
    return UNETRDecoder(stem, width, token=network.token, classes=classes, kind=network.upsampling)


def _sfpn(network: Network, channels: int, classes: int) -> nn.Module:
    width = SIZES[network.size].width
    return SFPNDecoder(width, token=network.token, classes=classes, kind=network.upsampling)


def _upscale(network: Network, channels: int, classes: int) -> nn.Module:
    width = SIZES[network.size].width
    return UpscaleDecoder(width, token=network.token, classes=classes, kind=network.upsampling)


def _mae(network: Network, channels: int, classes: int) -> nn.Module:
    return MAEDecoder(_token_decoder(network, outputs_per_voxel=classes), token=network.token, classes=classes)


_DECODERS = {"unetr": _unetr, "sfpn": _sfpn, "upscale": _upscale, "mae": _mae}
