"""From a checkpoint of another project to an encoder of ours with its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.foreign import monai_vit, primus, timm_vit
from nnunet_vit_mae.foreign.checkpoints import read_checkpoint, weights_in
from nnunet_vit_mae.foreign.parts import ConvertedEncoder
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.storage.files import file_hash
from nnunet_vit_mae.weights import Card, check_encoder


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a conversion needs to know of the data that the encoder will see.

    Args:
        patch_size: Voxels along z y x.
        spacing: mm along z y x.
        token: Voxels of a token (z y x), where a checkpoint does not tell: the first for a two-dimensional ViT (None:
            about a cube in mm), all for a linear tokenizer of MONAI (None: a cube).
        token_order: In which a checkpoint of nnssl flattens its tokens, `yzx` or `zyx`; None: that of its trainer.
    """

    patch_size: Sequence[int]
    spacing: Sequence[float]
    token: Sequence[int] | None = None
    token_order: str | None = None


def convert_checkpoint(file: Path, target: Target) -> tuple[dict[str, Tensor], Card]:
    """Return the weights of our encoder and its card.

    Raises:
        UserError: The file is none of nnssl, timm or MONAI, or holds a network that ours cannot express.
    """
    try:
        conversion = _converted(file, target)
        card = Card.from_json(_card(file, conversion).to_json())
        check_encoder(conversion.tensors, card)
    except UserError as error:
        if str(file) in str(error):
            raise
        raise UserError(f"The checkpoint {file} cannot be used: {error}.") from None
    return {name: tensor.contiguous() for name, tensor in conversion.tensors.items()}, card


def _converted(file: Path, target: Target) -> ConvertedEncoder:
    checkpoint = read_checkpoint(file)
    try:
        return _convert(checkpoint, target)
    except UserError:
        raise
    except Exception as error:  # names told what network it is, but shapes and the plan may be anything
        reason = reader_reason(error)
        raise UserError(f"its weights or its plan have another form than those of its project ({reason})") from error


def _convert(checkpoint: dict[str, Any], target: Target) -> ConvertedEncoder:
    if primus.PLAN in checkpoint:
        return primus.convert_primus(checkpoint, order=target.token_order)
    if target.token_order is not None:
        raise UserError("an order of tokens is only asked for with checkpoints of nnssl")
    weights = weights_in(checkpoint)
    if monai_vit.POSITIONS in weights:
        return monai_vit.convert_monai_vit(checkpoint, token=target.token)
    if timm_vit.KERNEL in weights:
        return timm_vit.convert_timm_vit(
            checkpoint,
            patch_size=target.patch_size,
            spacing=target.spacing,
            token_depth=target.token[0] if target.token else None,
        )
    raise UserError(
        "it cannot be converted: only nnssl's checkpoints (with an nnssl_adaptation_plan), timm's ViTs, and MONAI's "
        "ViT and MaskedAutoEncoderViT can"
    )


def _card(file: Path, conversion: ConvertedEncoder) -> Card:
    return Card(
        size=conversion.size,
        token=conversion.token,
        adaptive=False,
        modality_vectors="one_hot",
        channel_names=conversion.channel_names,
        dataset=conversion.dataset,
        plans="",
        configuration="",
        fold="",
        patch_size=conversion.patch_size,
        spacing=conversion.spacing,
        normalization=conversion.normalization,
        data_fingerprint="",
        cases_seen=[],
        epochs=0,
        steps=0,
        loss=0.0,
        pretraining={},
        seed=-1,
        data_licence=conversion.licence,
        packages=package_versions(),
        network=conversion.network,
        source=f"{conversion.kind}, {file.name} (SHA-256 {file_hash(file)})",
        notes=conversion.notes,
    )
