"""Folders of the installed package that other programs need."""

from importlib.resources import files
from pathlib import Path


def trainers_folder() -> Path:
    """Return the folder for nnU-Net's variable `nnUNet_extTrainer`; it re-exports our trainers."""
    return Path(str(files("nnunet_vit_mae.trainers")))
