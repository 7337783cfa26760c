"""How the models of a study learned: the loss of each pre-training, and loss and Dice of each fine-tuning by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nnunet_vit_mae.pretraining.saved_state import STATE
from nnunet_vit_mae.settings import Settings
from nnunet_vit_mae.storage.files import read_json
from nnunet_vit_mae.storage.pickles import read_trained
from nnunet_vit_mae.study.design import StudyDesign


@dataclass(frozen=True)
class PretrainingCurve:
    """The loss of an encoder by epoch; in the first `plain` epochs it is another one, and the two do not compare."""

    encoder: str
    losses: np.ndarray
    plain: int


@dataclass(frozen=True)
class TrainingCurve:
    """Loss on training crops and Dice on validation crops by epoch, of one arm, number of labels and seed."""

    arm: str
    few: int
    seed: int
    losses: np.ndarray
    dice: np.ndarray  # mean over classes, smoothed, as nnU-Net logs it


def pretraining_curves(study: StudyDesign) -> list[PretrainingCurve]:
    """Return the curve of each encoder that has been pre-trained."""
    curves = []
    for name in study.encoders:
        folder = study.encoder_file(name).parent
        if study.encoder_file(name).is_file() and (folder / STATE).is_file():
            losses = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)["losses"]
            protocol = Settings.from_dict({"pretraining": read_json(folder / "config.json")["pretraining"]}).pretraining
            curves.append(PretrainingCurve(name, np.array(losses), protocol.plain_epochs))
    return curves


def training_curves(study: StudyDesign) -> list[TrainingCurve]:
    """Return the curve of each model that has been trained."""
    runs = [(arm, few, seed) for arm in study.trained for few in study.few for seed in range(study.seeds)]
    return [
        TrainingCurve(arm, few, seed, *_logged(file))
        for arm, few, seed in runs
        if (file := study.checkpoint(arm, few, seed)).is_file()
    ]


def _logged(checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return loss and Dice of each epoch from a checkpoint of nnU-Net, which holds numpy scalars."""
    log = read_trained(checkpoint, mmap=True)["logging"]
    return np.array(log["train_losses"], float), np.array(log["ema_fg_dice"], float)
