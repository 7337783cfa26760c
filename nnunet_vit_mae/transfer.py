"""An encoder in a place it was not pre-trained for: what fits, what is adapted and said, what is refused.

Positions belong to no checkpoint (learned ones of encoders from elsewhere are interpolated), so patch size, spacing
and the order of the axes may differ. Size, token and what else belongs to the weights must be equal. Channels are
matched by name. Between an adaptive network (AMAE) and one that stacks its channels the tokenizer stays behind (AMAE,
section 2.3, second approach).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.presets import canonical_contrast
from nnunet_vit_mae.weights import Card, axis_names, has_tokenizer, without_tokenizer

CHANNEL_KERNELS = ("tokenizer.projection.weight", "tokenizer.entry.weight")  # linear, convolutional
NAMES_AND_SHAPES = {"blocks", "tokenizer", "learned_positions", "register_tokens"}  # of weights depend on these
STANDARDISED = {"CTNormalization", "ZScoreNormalization"}  # both give about mean 0 and deviation 1


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The network and the data that an encoder is to be used with; entries as in its card."""

    size: str
    token: list[int]
    adaptive: bool
    modality_vectors: str
    channel_names: list[str]
    normalization: list[str]
    patch_size: list[int]
    spacing: list[float]
    transpose_forward: list[int]
    network: dict[str, Any] = field(default_factory=dict)


def adapt_encoder(
    tensors: Mapping[str, Tensor], card: Card, destination: Destination
) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors for the destination, and a sentence for everything that differs there.

    Parts that only the destination has keep their weights.
    Raises `UserError`, with all reasons, when the encoder cannot be used there.
    """
    keeps_tokenizer = card.adaptive == destination.adaptive and has_tokenizer(tensors)
    if refused := _reasons_against(card, destination, keeps_tokenizer=keeps_tokenizer):
        raise UserError("; ".join(refused))
    notes = _differences(card, destination, learned_positions="position_table.values" in tensors)
    adapted = dict(tensors)
    if card.adaptive != destination.adaptive:
        adapted = without_tokenizer(tensors)
        way = "takes one contrast at a time" if card.adaptive else "stacks all contrasts"
        notes.append(f"Tokenizer: the pre-trained one {way}, this network does not, so it starts with a new one.")
    elif keeps_tokenizer and card.channel_names != destination.channel_names:
        match = _match_modality_vectors if card.adaptive else _match_channels
        changed, note = match(tensors, card.channel_names, destination.channel_names)
        adapted |= changed
        notes.append(
            f"Tokenizer: made for {', '.join(card.channel_names)}, "
            f"used for {', '.join(destination.channel_names)}{note}."
        )
    return adapted, notes


def _reasons_against(card: Card, destination: Destination, *, keeps_tokenizer: bool) -> list[str]:
    """Return why an encoder cannot be used there, one clause each."""
    # cards of earlier versions leave out the defaults
    compared = (card.network.keys() | NAMES_AND_SHAPES) - (set() if keeps_tokenizer else {"tokenizer"})
    refused = [
        f"{name} {getattr(card, name)} there, {getattr(destination, name)} here"
        for name in ("size", "token")
        if getattr(card, name) != getattr(destination, name)
    ]
    refused += [
        f"{name} {value} there, {destination.network[name]} here"
        for name, value in card.settings.encoder_settings.items()
        if name in compared and destination.network.get(name, value) != value
    ]
    there, here = set(card.normalization), set(destination.normalization)
    if there != here and not there | here <= STANDARDISED:
        refused.append(f"intensities normalised by {', '.join(sorted(there))} there, {', '.join(sorted(here))} here")
    if card.adaptive and destination.adaptive and card.modality_vectors != destination.modality_vectors:
        refused.append(f"modality vectors {card.modality_vectors} there, {destination.modality_vectors} here")
    return refused


def _differences(card: Card, destination: Destination, *, learned_positions: bool) -> list[str]:
    """Return a sentence for each difference in the data that the weights can bear."""
    notes = [
        f"{name} {getattr(card, key)} there, {getattr(destination, key)} here{consequence}."
        for key, name, consequence in (
            ("patch_size", "Patch", f": positions are {'interpolated to' if learned_positions else 'rebuilt for'} it"),
            ("spacing", "Spacing (mm)", ": a token has another length"),
        )
        if getattr(card, key) not in ([], getattr(destination, key))
    ]
    if card.transpose_forward not in ([], destination.transpose_forward):
        axes = [axis_names(order) for order in (card.transpose_forward, destination.transpose_forward)]
        notes.append(f"Axes of the files {axes[0]} there, {axes[1]} here: the encoder sees them from another side.")
    there, here = set(card.normalization), set(destination.normalization)
    if there != here:
        notes.append(f"Intensities were normalised by {', '.join(sorted(there))}, here by {', '.join(sorted(here))}.")
    return notes


def _match_channels(
    tensors: Mapping[str, Tensor], there: Sequence[str], here: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """Return a stacking tokenizer's weight (width, channels x voxels) for other channels.

    With new channels the whole is scaled by old / new number, so that a token's embedding stays about as large.
    """
    name = next(name for name in CHANNEL_KERNELS if name in tensors)
    weight = tensors[name]
    by_channel = rearrange(weight.flatten(1), "width (c voxels) -> c width voxels", c=len(there))
    kernels, new, note = _by_name(by_channel, there, here)
    if new and len(there) != len(here):
        kernels = kernels * (len(there) / len(here))
        note += f", all scaled by {len(there)}/{len(here)}"
    matched = rearrange(kernels, "c width voxels -> width (c voxels)").contiguous()
    return {name: matched.reshape(len(weight), -1, *weight.shape[2:])}, note


def _match_modality_vectors(
    tensors: Mapping[str, Tensor], there: Sequence[str], here: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """Return an adaptive tokenizer's learned vectors, or the columns of one-hot vectors, for other contrasts."""
    if "tokenizer.vectors.table" in tensors:
        table, _, note = _by_name(tensors["tokenizer.vectors.table"], there, here)
        return {"tokenizer.vectors.table": table}, note
    columns, _, note = _by_name(tensors["tokenizer.factors.weight"].T, there, here)
    return {"tokenizer.factors.weight": columns.T.contiguous()}, note


def _by_name(entries: Tensor, there: Sequence[str], here: Sequence[str]) -> tuple[Tensor, list[str], str]:
    """Return entries (first axis: contrasts) for other contrasts, which of them are new, and both as text.

    An entry of the same name (see `presets.canonical_contrast`) is kept; a new one is the mean over all.
    """
    slots = {key: number for number, key in enumerate(_keys(there))}
    matches = [slots.get(key) for key in _keys(here)]
    mean = entries.mean(dim=0)
    chosen = torch.stack([mean if slot is None else entries[slot] for slot in matches])
    known = [name for name, slot in zip(here, matches, strict=True) if slot is not None]
    new = [name for name, slot in zip(here, matches, strict=True) if slot is None]
    note = f"; {', '.join(known)} by name" if known else ""
    if new:
        note += f"; {', '.join(new)} from the mean over its channels"
    return chosen, new, note


def _keys(names: Sequence[str]) -> list[tuple[str, int]]:
    """What channels are matched by: the name, and which of those that share it."""
    called = [canonical_contrast(name) for name in names]
    return [(name, called[:number].count(name)) for number, name in enumerate(called)]
