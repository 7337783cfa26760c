"""Where the installed package keeps what others look for."""

from importlib.resources import files
from pathlib import Path


def trainers_folder() -> Path:
    """The folder that nnU-Net's `nnUNet_extTrainer` has to name; it holds re-exports of our trainers."""
    return Path(str(files("nnunet_vit_mae.trainers")))
