"""Names of files and folders of nnU-Net and of ours, in a dataset's results. Nothing here is read, and nnU-Net is not
imported.
"""

from __future__ import annotations

from pathlib import Path

FINAL, LATEST, BEST, CALIBRATED = (f"checkpoint_{name}.pth" for name in ("final", "latest", "best", "calibrated"))
VALIDATION = "validation"  # in a fold's folder: what nnUNetv2_train predicts at its end, or with --val
CHECKPOINT_NOTE = "checkpoint.json"  # there: with which checkpoint; stock trainers leave none
PLANS = "plans.json"  # in a model's folder
FINGERPRINT = "dataset_fingerprint.json"  # there and with the preprocessed images
CARD = "card.json"  # there too, if mae3d_import has written it: the labelled cases of that model are at another site
IMAGE_NOTES = ".images"  # beside files that are made from images: from which each was made


def dataset_id(name: str) -> str:
    """Return the three digits in a name such as `Dataset501_Name`."""
    return name.removeprefix("Dataset").split("_")[0]


def encoder_file(results: Path, plans_name: str, configuration: str, fold: str) -> Path:
    """Return where `mae3d_pretrain` writes the encoder of a fold (or of `all`) in a dataset's results folder."""
    return results / f"mae3d_pretrain__{plans_name}__{configuration}" / f"fold_{fold}" / "encoder.safetensors"


def model_folder(results: Path, trainer: str, plans_name: str, configuration: str) -> Path:
    """Return where nnU-Net keeps a model in a dataset's results folder, whether it exists or not."""
    return results / f"{trainer}__{plans_name}__{configuration}"
