"""Pre-trained encoders as safetensors files, each with a card in its header that says where it comes from.

safetensors holds tensors and text only: reading one runs no code, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, FiniteFloat
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.hub import local_file
from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder
from nnunet_vit_mae.networks.blueprint import ONE_MM
from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.weight_differences import compare_weights, not_finite
from nnunet_vit_mae.presets import ENCODER_SETTINGS
from nnunet_vit_mae.settings import Network, Settings, Triple
from nnunet_vit_mae.storage.entries import Length, entries_as
from nnunet_vit_mae.storage.files import short_hash, write_file

CARD_KEY = "mae3d_card"
HASH = r"[0-9a-f]{16}"  # of a case's name
TOKENIZER = "tokenizer."  # how the names of its tensors begin
OPTIONAL = {"network", "source", "notes", "transpose_forward"}  # entries that cards of earlier versions lack


def _known_for_all_axes(sides: list) -> list:
    if len(sides) not in (0, 3):
        raise ValueError("a list of three numbers (z y x), or an empty one")
    return sides


def _order_of_axes(order: list[int]) -> list[int]:
    if sorted(order) not in ([], [0, 1, 2]):
        raise ValueError("an order of the axes 0, 1 and 2, or an empty list")
    return order


Voxels = Annotated[int, Field(gt=0, le=10**6)]  # along an axis
Count = Annotated[int, Field(ge=0)]
AllAxes = AfterValidator(_known_for_all_axes)


class PretrainedEncoder(nn.Module):
    """An encoder that is called with volumes; `card` says which channels, axes, spacing and normalisation they need.

    Shapes: volume (b c z y x) of any size -> tokens (b n d), and their grid (z y x), whose product is n. Tokens are in
    the order of the grid, z slowest.

    Channels are those of `card.channel_names`. An adaptive encoder takes a channel of exact zeros for a contrast that
    is missing, and gives at each place the maximum over the contrasts that are present (AMAE, section 2.3).
    """

    def __init__(self, encoder: Encoder | AdaptiveEncoder, card: Card):
        super().__init__()
        self.encoder, self.card = encoder, card

    def forward(self, volume: Tensor) -> tuple[Tensor, Triple]:
        names = self.card.channel_names
        if volume.ndim != 5 or volume.shape[1] != len(names):
            raise ValueError(
                f"The volume has the shape {tuple(volume.shape)}, but must be (b c z y x) with {len(names)} channels: "
                f"{', '.join(names)}."
            )
        encoded = self.encoder.encode(volume, taps=())
        return encoded.tokens, encoded.grid


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is needed to use an encoder, and to say in a paper where it comes from."""

    size: str
    token: list[Voxels]  # z y x
    adaptive: bool
    modality_vectors: str  # of an adaptive encoder
    channel_names: Annotated[list[str], Field(min_length=1)]
    dataset: str
    plans: str
    configuration: str
    fold: str
    patch_size: Annotated[list[Voxels], AllAxes]  # z y x; empty where it is not known
    spacing: Annotated[list[Length], AllAxes]  # z y x in mm; empty where it is not known
    normalization: Annotated[list[str], Field(min_length=1)]  # of each channel
    data_fingerprint: str
    cases_seen: list[str]  # hashes of the names tell whether a case was seen; shared cards have numbers
    epochs: Count
    steps: Count
    loss: FiniteFloat
    pretraining: dict[str, Any]  # the protocol, as in the plans
    seed: int
    data_licence: str
    packages: dict[str, str]
    network: dict[str, Any] = field(default_factory=dict)  # settings that belong to the weights
    source: str = ""  # of an encoder that was converted: the kind of checkpoint
    notes: list[str] = field(default_factory=list)  # what the conversion adapted or left out
    # nnU-Net's order of the axes of a file (z y x), which become those of a volume; empty where it is not known
    transpose_forward: Annotated[list[int], AfterValidator(_order_of_axes)] = field(default_factory=list)

    @property
    def origin(self) -> str:
        """Return in words where the weights come from."""
        if self.source:
            return f"converted from {self.source}"
        return f"pre-trained on {len(self.cases_seen)} cases of {self.dataset}"

    @property
    def settings(self) -> Network:
        """Return the settings of the encoder's network; raises `UserError` if there is no such network."""
        unknown = sorted(set(self.network) - set(ENCODER_SETTINGS))
        if unknown:
            raise UserError(f"its card has network settings that no encoder has ({', '.join(unknown)})")
        own = {name: getattr(self, name) for name in ("size", "token", "adaptive", "modality_vectors")}
        return Settings.from_dict({"network": self.network | own}).network

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Read a card; raises `UserError` when it is not one of ours."""
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"its card is not valid JSON ({error})") from None
        names = {entry.name for entry in dataclasses.fields(cls)}
        if isinstance(entries, dict):
            names -= OPTIONAL - set(entries)
        if not isinstance(entries, dict) or set(entries) != names:
            difference = ", ".join(sorted(names ^ set(entries if isinstance(entries, dict) else ())))
            raise UserError(f"its card was written by another version of this package (differs in: {difference})")
        try:
            card = entries_as(cls, entries)
        except ValueError as error:
            raise UserError(f"in its card {error}") from None
        card.settings  # noqa: B018 (raises if there is no such network)
        return card

    def to_json(self) -> str:
        """Return the card as it stands in the header."""
        return json.dumps(dataclasses.asdict(self))

    def seen(self, case_names: Iterable[str]) -> list[str] | None:
        """Return those of the cases that pre-training has seen; None if the card does not tell."""
        known = set(self.cases_seen)
        if not known or not all(re.fullmatch(HASH, case) for case in known):
            return None
        return [name for name in case_names if hashed_name(name) in known]


def has_tokenizer(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether an encoder has its tokenizer, which a conversion may leave out."""
    return any(name.startswith(TOKENIZER) for name in tensors)


def without_tokenizer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the other tensors of an encoder."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(TOKENIZER)}


def axis_names(order: Sequence[int]) -> str:
    """Return the axes of a file, z y x, in nnU-Net's order for its volumes.

    >>> axis_names([1, 0, 2])
    'y z x'
    """
    return " ".join("zyx"[axis] for axis in order)


def hashed_name(case_name: str) -> str:
    """Return the hash of a case's name that a card holds."""
    return short_hash(case_name, 16)


def save_encoder(encoder: nn.Module, card: Card, file: Path) -> None:
    """Write an encoder's state dict and its card; the file is whole or not there.

    Raises `UserError` for an encoder that `read_encoder` would not take.
    """
    write_file(encoder_content(encoder.state_dict(), card), file)


def is_saved(encoder: nn.Module, file: Path) -> bool:
    """Return whether a file is an encoder with these weights."""
    try:
        saved, _ = read_encoder(file)
    except UserError:  # missing or damaged
        return False
    weights = encoder.state_dict()
    return {*saved} == {*weights} and all(torch.equal(saved[name], weights[name].cpu()) for name in saved)


def encoder_content(tensors: Mapping[str, Tensor], card: Card) -> bytes:
    """Return the content of an encoder's file; raises `UserError` for one that cannot be used."""
    check_encoder(tensors, card)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={CARD_KEY: card.to_json()})


def read_encoder(file: Path) -> tuple[dict[str, Tensor], Card]:
    """Read an encoder and its card; whoever gets them may use them without a look at either.

    Raises:
        UserError: The file is missing, damaged or not an encoder of ours, or `check_encoder` refuses it.
    """
    if not file.is_file():
        raise UserError(f"The encoder {file} is missing: check its path.")
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"The encoder {file} is damaged or not a safetensors file ({error}).") from None
    if CARD_KEY not in metadata:
        raise UserError(f"The encoder {file} has no card: it was not written by mae3d_pretrain.")
    try:
        card = Card.from_json(metadata[CARD_KEY])
        check_encoder(tensors, card)
    except UserError as error:
        raise UserError(f"The encoder {file} cannot be used: {str(error).rstrip('.')}.") from None
    return tensors, card


def load_encoder(file: Path | str) -> PretrainedEncoder:
    """Load an encoder for its features, in eval mode.

    Args:
        file: A file of `mae3d_pretrain`, or `hf:owner/name@revision` on the Hugging Face hub.

    Raises:
        UserError: If the file is missing, damaged or not an encoder of ours, if it is a converted encoder without a
            tokenizer, which cannot take volumes, and if the hub cannot be reached.

    Example:
        >>> encoder = load_encoder("encoder.safetensors")
        >>> encoder.card.channel_names, encoder.card.token
        (['T1', 'FLAIR'], [2, 4, 8])
        >>> with torch.inference_mode():
        ...     tokens, grid = encoder(torch.randn(5, 2, 8, 12, 16))
        >>> tokens.shape, grid
        (torch.Size([5, 24, 96]), (4, 3, 2))
        >>> tokens.mean(dim=1).shape  # features of each volume, for a classifier
        torch.Size([5, 96])
    """
    tensors, card = read_encoder(local_file(file))
    if not has_tokenizer(tensors):
        raise UserError(f"The encoder {file} has no tokenizer ({card.origin}): fine-tune it with mae3d_plan --encoder.")
    spacing = tuple(card.spacing) or ONE_MM  # of a converted encoder it may not be known
    encoder = build_encoder(card.settings, len(card.channel_names), spacing=spacing)
    encoder.load_state_dict(tensors)
    return PretrainedEncoder(encoder, card).eval()


def check_encoder(tensors: Mapping[str, Tensor], card: Card) -> None:
    """Raise `UserError` unless the tensors are the weights of the encoder that the card describes.

    Names and shapes are those of the network, and all values are finite numbers. A conversion may leave out the
    tokenizer, as a whole.
    """
    with torch.device("meta"):
        encoder = build_encoder(card.settings, len(card.channel_names))
    expected = encoder.state_dict()
    if not has_tokenizer(tensors):
        expected = without_tokenizer(expected)
    found = compare_weights(tensors, expected)
    for reason, names in {
        "it lacks": found.missing,
        f"an encoder of size {card.size} has no": found.unknown,
        f"its card (size {card.size}, token {card.token}) calls for other shapes of": found.reshaped,
        "it has no floating-point numbers in": [
            name for name, tensor in tensors.items() if not tensor.is_floating_point()
        ],
    }.items():
        if names:
            raise UserError(f"{reason} {abbreviated(sorted(names))}")
    if damaged := not_finite(tensors):
        raise UserError(f"it has NaN or Inf in {abbreviated(sorted(damaged))}")
