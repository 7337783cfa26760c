"""From settings to networks."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from torch import nn

from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, DynamicTokenizer, ModalityVectors
from nnunet_vit_mae.networks.adaptive_autoencoder import AdaptiveMaskedAutoencoder
from nnunet_vit_mae.networks.autoencoder import MaskedAutoencoder
from nnunet_vit_mae.networks.blueprint import ONE_MM, Blueprint
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.settings import Network, Pretraining

Autoencoder = MaskedAutoencoder | AdaptiveMaskedAutoencoder


def build_autoencoder(
    network: Network, channels: int, protocol: Pretraining, *, spacing: tuple[float, ...] = ONE_MM
) -> Autoencoder:
    """Build the network of pre-training for volumes with this number of channels and a spacing (z y x, mm)."""
    blueprint = Blueprint(network=network, channels=channels, spacing=spacing)
    encoder = _encoder(blueprint, drop_path=0.0)
    outputs = 1 if network.adaptive else channels
    cross = protocol.decoder == "cross"
    decoder = blueprint.token_decoder(outputs_per_voxel=outputs, heads=protocol.decoder_heads, cross=cross)
    if isinstance(encoder, AdaptiveEncoder):
        return AdaptiveMaskedAutoencoder(encoder, decoder, contrasts=channels)
    return MaskedAutoencoder(encoder, decoder)


def build_segmenter(
    network: Network,
    channels: int,
    classes: int,
    *,
    drop_path: float = 0.0,
    spacing: tuple[float, ...] = ONE_MM,
    unet: Callable[[], nn.Module] | None = None,
) -> Segmenter:
    """Build the network of fine-tuning. A decoder is the module of its name, whose `build` takes the blueprint.

    Args:
        network: The settings.
        channels: Channels of the volumes.
        classes: Outputs per voxel.
        drop_path: Of the last block of the encoder.
        spacing: mm along z y x.
        unet: Makes nnU-Net's own U-Net, which only the decoder `unet` needs.

    Example:
        >>> import torch
        >>> segmenter = build_segmenter(Network(size="XS", token=(2, 4, 8)), channels=2, classes=3)
        >>> segmenter(torch.zeros(1, 2, 10, 20, 30)).shape
        torch.Size([1, 3, 10, 20, 30])
    """
    blueprint = Blueprint(network=network, channels=channels, classes=classes, spacing=spacing, unet=unet)
    decoder = import_module(f"nnunet_vit_mae.networks.decoders.{network.decoder}").build(blueprint)
    return Segmenter(_encoder(blueprint, drop_path=drop_path), decoder, taps=network.tapped_blocks)


def build_encoder(network: Network, channels: int, *, spacing: tuple[float, ...] = ONE_MM) -> Encoder | AdaptiveEncoder:
    """Build the encoder alone."""
    return _encoder(Blueprint(network=network, channels=channels, spacing=spacing), drop_path=0.0)


def _encoder(blueprint: Blueprint, *, drop_path: float) -> Encoder | AdaptiveEncoder:
    parts = {"token": blueprint.token, "positions": blueprint.positions}
    transformer = blueprint.transformer(drop_path=drop_path)
    if blueprint.network.adaptive:
        vectors = ModalityVectors(blueprint.channels, blueprint.network.modality_vectors)
        return AdaptiveEncoder(DynamicTokenizer(vectors, blueprint.token, blueprint.size.width), transformer, **parts)
    table, registers = blueprint.position_table(), blueprint.network.register_tokens
    return Encoder(blueprint.tokenizer(), transformer, position_table=table, register_tokens=registers, **parts)
