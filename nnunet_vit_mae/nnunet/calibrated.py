"""Calibrated checkpoints: how they are made from trained ones, and where the record of their calibration is.

nnU-Net averages logits over mirrored inputs, windows and folds, resamples their mean and applies the softmax (or the
sigmoids) last. A temperature and a shift of every member's logits are therefore those of the mean, and both fit into
the last layer: its weight and bias are divided by the temperature, then its bias is shifted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD, CalibrationRecord, read_calibration
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.storage.files import file_hash, inside, replacing
from nnunet_vit_mae.storage.layout import CALIBRATED
from nnunet_vit_mae.storage.pickles import read_trained

# of our decoders, of nnU-Net's U-Nets, of those inside our decoder unet, and of nnU-Net's Primus
HEAD = re.compile(
    r"(?:decoder\.(?:(?:.+\.)?head|(?:unet\.decoder\.)?seg_layers\.\d+)|up_projection\.decode\.\d+)\.(weight|bias)"
)


def refuse_calibrated(checkpoint: str) -> None:
    """Raise `UserError` for a checkpoint that already has a threshold."""
    if checkpoint == CALIBRATED:
        raise UserError(f"-chk {CALIBRATED} already has a threshold: calibrate the checkpoint that it was made from.")


def calibrated_head(
    weights: Mapping[str, Tensor], shifts: Sequence[float], temperature: float = 1.0
) -> dict[str, Tensor]:
    """Return the weights of a network whose logits z become z / temperature + shift.

    Args:
        weights: The weights of the network.
        shifts: One for each output channel. The bias of a head may have several consecutive numbers for each channel:
            that of the `mae` decoder has one for each voxel of a token.
        temperature: Above 1, it makes the probabilities less certain (Guo et al., 2017,
            https://arxiv.org/abs/1706.04599).

    Returns:
        All weights; only those of the head differ.

    Raises:
        UserError: If the head of the network is not found.
    """
    heads = {name: found[1] for name in weights if (found := HEAD.fullmatch(name))}
    if "bias" not in heads.values():
        raise UserError(
            "mae3d_calibrate does not know the last layer of this network: calibrate a model of this package, a U-Net "
            "with decoder.seg_layers, or a Primus."
        )
    changed = dict(weights)
    for name, part in heads.items():
        changed[name] = weights[name] / temperature
        if part == "bias":
            change = torch.tensor(shifts, dtype=weights[name].dtype, device=weights[name].device)
            changed[name] = changed[name] + change.repeat_interleave(len(weights[name]) // len(shifts))
    return changed


def write_calibrated(file: Path, shifts: Sequence[float], temperature: float = 1.0) -> Path:
    """Write `checkpoint_calibrated.pth` beside a checkpoint, without the state that only training needs."""
    checkpoint = read_trained(file)
    checkpoint["network_weights"] = calibrated_head(checkpoint["network_weights"], shifts, temperature)
    checkpoint["optimizer_state"] = checkpoint["grad_scaler_state"] = None
    with replacing(file.with_name(CALIBRATED)) as temporary, temporary.open("wb") as stream:
        torch.save(checkpoint, stream)
    return file.with_name(CALIBRATED)


def record_folder(model: Model) -> Path:
    """Return the folder for the record of a calibration: a single fold's own, or the model's for several folds.

    So folds that are calibrated one after another keep their records.
    """
    return model.files[0].parent if len(model.folds) == 1 else model.folder


def read_calibration_of(model: Model) -> CalibrationRecord:
    """Return the record of the calibration that made the calibrated checkpoints of a model.

    The hashes in a record say which checkpoints it made: a fold that was calibrated together with others has its
    record in the model's folder.

    Raises:
        UserError: If there is no such record, if the folds were calibrated one by one and share none, or if they were
            trained again since.
    """
    hashes = {file.relative_to(model.folder).as_posix(): file_hash(file) for file in model.files}
    for folder in dict.fromkeys((record_folder(model), model.folder)):
        if (folder / CALIBRATION_RECORD).is_file():
            record = read_calibration(folder)
            if hashes.items() <= record.content.get("checkpoints", {}).items():
                _refuse_outdated(model, record)
                return record
    raise UserError(
        f"There is no {CALIBRATION_RECORD} in {record_folder(model)} that belongs to {' and '.join(hashes)}: run "
        f"mae3d_calibrate with -f {' '.join(model.folds)}, or name another checkpoint with -chk."
    )


def _refuse_outdated(model: Model, record: CalibrationRecord) -> None:
    """Raise `UserError` if a checkpoint that was calibrated has changed; records of earlier versions do not tell."""
    for place, known in record.content.get("made_from", {}).items():
        file = inside(model.folder, *place.split("/"), source=record.folder / CALIBRATION_RECORD)
        if file.parent.name in {f"fold_{fold}" for fold in model.folds} and file.is_file() and file_hash(file) != known:
            raise UserError(
                f"{file} is not the checkpoint that {CALIBRATED} was made from: run mae3d_calibrate with "
                f"-f {' '.join(model.folds)} again, or name a checkpoint with -chk."
            )
