"""Pre-trained encoders as safetensors files, each with a card in its header that says where it comes from.

safetensors holds tensors and text only: reading one runs no code, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import replacing

CARD_KEY = "mae3d_card"
OPTIONAL = {"network", "source", "notes"}  # entries that cards of earlier versions lack
PACKAGES = ("nnunet-vit-mae", "nnunetv2", "torch")


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is needed to use an encoder, and to say in a paper where it comes from."""

    size: str
    token: list[int]  # z y x
    adaptive: bool
    modality_vectors: str  # of an adaptive encoder
    channel_names: list[str]
    dataset: str
    plans: str
    configuration: str
    fold: str
    patch_size: list[int]  # voxels, z y x
    spacing: list[float]  # mm, z y x
    normalization: list[str]
    data_fingerprint: str
    cases_seen: list[str]  # hashes of the names: enough to tell whether a case was seen
    epochs: int
    steps: int
    loss: float
    pretraining: dict[str, Any]  # the protocol, as in the plans
    seed: int
    data_licence: str
    packages: dict[str, str]
    network: dict[str, Any] = field(default_factory=dict)  # settings that belong to the weights
    source: str = ""  # of an encoder that was converted: the kind of checkpoint
    notes: list[str] = field(default_factory=list)  # what the conversion adapted or left out

    @property
    def origin(self) -> str:
        """Return in words where the weights come from."""
        if self.source:
            return f"converted from {self.source}"
        return f"pre-trained on {len(self.cases_seen)} cases of {self.dataset}"

    @classmethod
    def from_json(cls, text: str) -> Card:
        """Read a card; raises `UserError` when it is not one of ours."""
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"its card is not valid JSON ({error})") from None
        names = {entry.name for entry in dataclasses.fields(cls)}
        if isinstance(entries, dict):
            names -= OPTIONAL - set(entries)
        if not isinstance(entries, dict) or set(entries) != names:
            difference = ", ".join(sorted(names ^ set(entries if isinstance(entries, dict) else ())))
            raise UserError(f"its card was written by another version of this package (differs in: {difference})")
        return cls(**entries)

    def to_json(self) -> str:
        """Return the card as it stands in the header."""
        return json.dumps(dataclasses.asdict(self))

    def seen(self, case_names: Iterable[str]) -> list[str]:
        """Return those of the cases that pre-training has seen."""
        known = set(self.cases_seen)
        return [name for name in case_names if hashed_name(name) in known]


def hashed_name(case_name: str) -> str:
    """Return the hash of a case's name that a card holds."""
    return hashlib.sha256(case_name.encode()).hexdigest()[:16]


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the installed versions of packages, by default of those that decide what a checkpoint means."""
    return {package: version(package) for package in packages}


def save_encoder(encoder: nn.Module, card: Card, file: Path) -> None:
    """Write an encoder's state dict and its card; the file is whole or not there."""
    with replacing(file) as temporary:
        temporary.write_bytes(encoder_content(encoder.state_dict(), card))


def encoder_content(tensors: Mapping[str, Tensor], card: Card) -> bytes:
    """Return the content of an encoder's file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={CARD_KEY: card.to_json()})


def load_encoder(file: Path) -> tuple[dict[str, Tensor], Card]:
    """Read an encoder and its card. Raises `UserError` when the file is missing, damaged or not an encoder of ours."""
    if not file.is_file():
        raise UserError(f"The encoder {file} is missing.")
    try:
        with safe_open(file, framework="pt") as content:
            metadata = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"The encoder {file} is damaged or not a safetensors file ({error}).") from None
    if CARD_KEY not in metadata:
        raise UserError(f"The encoder {file} has no card: it was not written by mae3d_pretrain.")
    try:
        return tensors, Card.from_json(metadata[CARD_KEY])
    except UserError as error:
        raise UserError(f"The encoder {file} cannot be used: {error}.") from None


def file_hash(file: Path) -> str:
    """Return the SHA-256 of a file, as plans record it."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
