"""What `mae3d_export` puts into an archive and `mae3d_import` checks: names, the card, and weights without pickle.

The weights of a fold are a safetensors file, and what else nnU-Net's predictor needs of its checkpoint is JSON.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD
from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.networks.weight_differences import compare_weights, not_finite
from nnunet_vit_mae.nnunet.training_range import TRAINING_VOLUMES
from nnunet_vit_mae.storage.layout import CARD, FINGERPRINT, PLANS

TEXTS = (CARD, PLANS, DESCRIPTION, FINGERPRINT, TRAINING_VOLUMES, CALIBRATION_RECORD)
WEIGHTS = r"fold_(all|[0-9]{1,3})/checkpoint_[A-Za-z0-9_]{1,40}\.(safetensors|json)"
MEMBERS = re.compile("|".join([*map(re.escape, TEXTS), WEIGHTS]))
LARGEST_HEADER = 2**24  # bytes of the names and shapes of one network

# entries of a dataset.json that say nothing about single cases, as its lists of files do
DESCRIBING = {
    *("name", "description", "reference", "licence", "license", "release", "channel_names", "modality", "labels"),
    *("regions_class_order", "numTraining", "file_ending", "overwrite_image_reader_writer"),
}


def _matching(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return text

    return AfterValidator(check)


Name = Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", "a name of letters, digits and underscores")]
DATASET = r"Dataset[0-9]{3,9}_[A-Za-z0-9_.+-]{1,80}"
DatasetName = Annotated[str, _matching(DATASET, "a name such as Dataset501_Name")]
Fold = Annotated[str, _matching(r"all|[0-9]{1,3}", "the number of a fold, or all")]
CheckpointName = Annotated[str, _matching(r"checkpoint_[A-Za-z0-9_]{1,40}\.pth", "a name such as checkpoint_final.pth")]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model is and where it comes from."""

    what: str
    dataset: DatasetName
    plans: Name
    configuration: Name
    trainer: Name
    folds: Annotated[list[Fold], Field(min_length=1)]
    checkpoints: Annotated[list[CheckpointName], Field(min_length=1)]
    channel_names: list[str]
    labels: list[str]
    licence: str
    date: str
    packages: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class CheckpointEntries:
    """What nnU-Net's predictor needs of a checkpoint besides weights."""

    trainer_name: Name
    configuration: Name
    fold: Fold
    inference_allowed_mirroring_axes: Annotated[list[Annotated[int, Field(ge=0, le=2)]], Field(max_length=3)] | None
    shared: dict[str, str]  # tensors that are others under a second name


def weights_member(fold: str, checkpoint: str) -> str:
    """Return the name of the member with the weights of a checkpoint; the rest of it is beside, in JSON."""
    return f"fold_{fold}/{checkpoint.removesuffix('.pth')}.safetensors"


def rest_member(fold: str, checkpoint: str) -> str:
    """Return the name of the member with the rest of a checkpoint."""
    return f"fold_{fold}/{checkpoint.removesuffix('.pth')}.json"


def weights_content(weights: Mapping[str, Tensor]) -> tuple[bytes, dict[str, str]]:
    """Return weights as safetensors, and the names of tensors that are others under a second name.

    nnU-Net's U-Net lists its encoder twice, and safetensors keeps each value once.
    """
    first: dict[tuple, str] = {}
    own, shared = {}, {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            own[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return save(own), shared


def read_weights(content: bytes, shared: Mapping[str, str], source: str) -> dict[str, Tensor]:
    """Read what `weights_content` returned. Raises `UserError`, which calls the file `source`, if it is damaged."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(LARGEST_HEADER, len(content) - 8):
        raise UserError(f"{source} is damaged, because its header is longer than itself: export the model again.")
    try:
        weights = load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{source} is damaged ({error}): export the model again.") from None
    for name, other in shared.items():
        if name in weights or other not in weights:
            raise UserError(f"{source} lacks the tensor {other[:80]!r}: export the model again.")
    return weights | {name: weights[other] for name, other in shared.items()}


def refuse_other_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Raise `UserError` unless weights have the names, shapes and types of a network, and finite values."""
    differing = [name for names in compare_weights(weights, expected) for name in names]
    if differing:
        name = differing[0]
        raise UserError(
            f"{source} does not fit its plans: {name[:80]} is {_described(weights.get(name))}, but "
            f"{_described(expected.get(name))} in the network; train or export the model again."
        )
    if bad := not_finite(weights):
        raise UserError(f"{source} has NaN or infinite values in {abbreviated(bad)}: train the model again.")


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
