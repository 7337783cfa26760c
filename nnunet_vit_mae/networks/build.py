"""From settings to networks: the only place where numbers of a preset meet a constructor."""

from __future__ import annotations

from importlib import import_module

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, DynamicTokenizer, ModalityVectors
from nnunet_vit_mae.networks.adaptive_autoencoder import AdaptiveMaskedAutoencoder
from nnunet_vit_mae.networks.autoencoder import MaskedAutoencoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.networks.token_decoder import build_token_decoder
from nnunet_vit_mae.networks.tokenizer import Tokenizer
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.presets import SIZES, Network, Pretraining

Autoencoder = MaskedAutoencoder | AdaptiveMaskedAutoencoder


def build_autoencoder(network: Network, channels: int, protocol: Pretraining) -> Autoencoder:
    """Build the network of pre-training."""
    encoder = _encoder(network, channels, drop_path=0.0)
    outputs = 1 if network.adaptive else channels
    cross = protocol.decoder == "cross"
    decoder = build_token_decoder(network, outputs_per_voxel=outputs, heads=protocol.decoder_heads, cross=cross)
    if isinstance(encoder, AdaptiveEncoder):
        return AdaptiveMaskedAutoencoder(encoder, decoder, contrasts=channels)
    return MaskedAutoencoder(encoder, decoder)


def build_segmenter(network: Network, channels: int, classes: int, *, drop_path: float) -> Segmenter:
    """Build the network of fine-tuning. A decoder is the module of its name, whose `build` makes it from settings."""
    encoder = _encoder(network, channels, drop_path=drop_path)
    decoder = import_module(f"nnunet_vit_mae.networks.decoders.{network.decoder}")
    return Segmenter(encoder, decoder.build(network, channels, classes), taps=network.tapped_blocks)


def _encoder(network: Network, channels: int, *, drop_path: float) -> Encoder | AdaptiveEncoder:
    size, token = SIZES[network.size], network.token
    transformer = Transformer(size.width, size.depth, size.heads, drop_path=drop_path)
    if network.adaptive:
        tokenizer = DynamicTokenizer(ModalityVectors(channels, network.modality_vectors), token, size.width)
        return AdaptiveEncoder(tokenizer, transformer, token=token, width=size.width)
    return Encoder(Tokenizer(channels, token, size.width), transformer, token=token, width=size.width)
