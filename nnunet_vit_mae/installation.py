"""What other programs need of the installed package, and the versions of packages."""

import os
from collections.abc import Iterable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

EXT_TRAINER = "nnUNet_extTrainer"  # nnU-Net's variable for folders of trainers
PACKAGES = ("nnunet-vit-mae", "nnunetv2", "torch")  # they decide what a checkpoint means


def trainers_folder() -> Path:
    """Return the folder for nnU-Net's variable `EXT_TRAINER`; it re-exports our trainers."""
    return Path(str(files("nnunet_vit_mae.trainers")))


def nnunet_environment() -> dict[str, str]:
    """Return the environment of this process, extended so that nnU-Net finds our trainers."""
    folders = [*filter(None, os.environ.get(EXT_TRAINER, "").split(os.pathsep)), str(trainers_folder())]
    return dict(os.environ) | {EXT_TRAINER: os.pathsep.join(dict.fromkeys(folders))}


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the installed versions of packages, by default of those that decide what a checkpoint means."""
    return {package: version(package) for package in packages}
