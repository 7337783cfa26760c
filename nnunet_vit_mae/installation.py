"""What other programs need of the installed package."""

import os
from importlib.resources import files
from pathlib import Path

EXT_TRAINER = "nnUNet_extTrainer"  # nnU-Net's variable for folders of trainers


def trainers_folder() -> Path:
    """Return the folder for nnU-Net's variable `EXT_TRAINER`; it re-exports our trainers."""
    return Path(str(files("nnunet_vit_mae.trainers")))


def nnunet_environment() -> dict[str, str]:
    """Return the environment of this process, extended so that nnU-Net finds our trainers."""
    folders = [*filter(None, os.environ.get(EXT_TRAINER, "").split(os.pathsep)), str(trainers_folder())]
    return dict(os.environ) | {EXT_TRAINER: os.pathsep.join(dict.fromkeys(folders))}
