"""Trained models in nnU-Net's results folder, from any trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nnunet_vit_mae.errors import UserError, abbreviated, did_you_mean
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.networks.weight_differences import not_finite
from nnunet_vit_mae.nnunet.checked_plans import read_plans
from nnunet_vit_mae.nnunet.folders import Dataset, find_dataset
from nnunet_vit_mae.nnunet.plans import Plan, refuse_cascade
from nnunet_vit_mae.settings import BLOCK
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import file_hash, short_hash
from nnunet_vit_mae.storage.layout import CALIBRATED, CARD, FINAL, PLANS, model_folder
from nnunet_vit_mae.storage.pickles import read_trained

DECIDING = (  # entries of plans that decide a prediction, besides the configuration
    *("foreground_intensity_properties_per_channel", "image_reader_writer", "label_manager"),
    *("transpose_forward", "transpose_backward"),
)


@dataclass(frozen=True)
class Model:
    """A model made by `nnUNetv2_train`, with the plans that it was trained with."""

    plan: Plan
    trainer: str
    folds: tuple[str, ...]  # nnU-Net averages the predictions of several folds
    checkpoint: str

    @property
    def folder(self) -> Path:
        """The model's folder in nnU-Net's results."""
        return model_folder(self.plan.dataset.results, self.trainer, self.plan.plans_name, self.plan.name)

    @property
    def files(self) -> list[Path]:
        """The checkpoint of each fold."""
        return [self.folder / f"fold_{fold}" / self.checkpoint for fold in self.folds]

    @property
    def flags(self) -> list[str]:
        """The flags that name the model on a command line, without folds and checkpoint."""
        plan = self.plan
        return ["-d", plan.dataset.name, "-c", plan.name, "-p", plan.plans_name, "-tr", self.trainer]

    def command(self, images: Path, output: Path, device: str) -> list[str]:
        """Return the command that predicts a folder with this model."""
        chosen = ["-f", *self.folds, "-chk", self.checkpoint, "-device", device]
        return ["nnUNetv2_predict", "-i", str(images), "-o", str(output), *self.flags, *chosen]


@dataclass(frozen=True)
class _InstalledCard:
    """What is read of the card that `mae3d_import` leaves; earlier versions left no hashes."""

    sha256: dict[str, str] = field(default_factory=dict)  # of the checkpoints, by their places in the model's folder


def is_imported(model: Model) -> bool:
    """Return whether a model was installed by `mae3d_import`, and not trained here since."""
    if not (model.folder / CARD).is_file():
        return False
    hashes = read_entries(_InstalledCard, model.folder / CARD, "import the model again").sha256

    def is_as_installed(fold: str) -> bool:
        place = f"fold_{fold}/{model.checkpoint}"
        if model.checkpoint == CALIBRATED and f"fold_{fold}/{FINAL}" in hashes:
            place = f"fold_{fold}/{FINAL}"  # it may have been calibrated here
        file = model.folder / place
        return place in hashes and file.is_file() and file_hash(file) == hashes[place]

    return not hashes or any(map(is_as_installed, model.folds))


def refuse_damaged_weights(model: Model) -> None:
    """Raise `UserError` for a checkpoint that is damaged or holds NaN, which would segment without a complaint."""
    for file in model.files:
        if bad := not_finite(read_trained(file, mmap=True)["network_weights"]):
            raise UserError(f"{file} has NaN or Inf in {abbreviated(bad)}: train again, or name another checkpoint.")


def model_hash(model: Model) -> str:
    """Return twelve hexadecimal digits that change with what decides a prediction: weights, mirroring and plans.

    They are the same for a model and an import of it, whose checkpoints are other files with the same weights.
    """
    return short_hash("".join([_deciding_plans(model), *map(_deciding_content, model.files)]), 12)


def _deciding_plans(model: Model) -> str:
    """Return what preprocessing, network and labels follow from, without what only a training needs."""
    plan = model.plan
    configuration = dict(plan.configuration.configuration)
    configuration |= {BLOCK: configuration.get(BLOCK, {}).get("network"), "batch_size": None, "batch_dice": None}
    deciding = {
        "trainer": model.trainer,
        "configuration": configuration,
        "plans": {name: plan.plans.plans.get(name) for name in DECIDING},
        "channels": plan.channel_names,
        "labels": [*plan.dataset_json["labels"].items()],  # their order decides that of regions
        "regions_class_order": plan.dataset_json.get("regions_class_order"),
    }
    return json.dumps(deciding, sort_keys=True)


def _deciding_content(file: Path) -> str:
    """Return a hash of the weights in a checkpoint and of the axes that nnU-Net mirrors along."""
    checkpoint, digest = read_trained(file, mmap=True), hashlib.sha256()
    for name, weight in sorted(checkpoint["network_weights"].items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)} ".encode())
        digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
    axes = checkpoint.get("inference_allowed_mirroring_axes")
    digest.update(str(None if axes is None else [int(axis) for axis in axes]).encode())
    return digest.hexdigest()


def best_checkpoint(folder: Path, folds: Sequence[str]) -> str:
    """Return the calibrated checkpoint if all folds have one, otherwise the final one."""
    calibrated = all((folder / f"fold_{fold}" / CALIBRATED).is_file() for fold in folds)
    return CALIBRATED if calibrated else FINAL


def find_model(
    dataset: Dataset | str,
    plans_name: str = "nnUNetPlans",
    configuration: str = "3d_fullres",
    *,
    trainer: str = "nnUNetTrainerViTMAE",
    folds: Sequence[str] = ("0",),
    checkpoint: str | None = None,
) -> Model:
    """Find a trained model in nnU-Net's results folder.

    Args:
        dataset: Number or name, as `-d` takes it.
        plans_name: Name of the plans.
        configuration: nnU-Net's configuration.
        trainer: Name of the trainer, ours or another.
        folds: Trained folds, whose predictions nnU-Net averages.
        checkpoint: File name; None: the calibrated one if all folds have one, otherwise the final one.

    Raises:
        UserError: If a checkpoint is missing, a fold is named twice, or for the second stage of a cascade.
    """
    dataset = find_dataset(dataset) if isinstance(dataset, str) else dataset
    for flag, name in {"-tr": trainer, "-p": plans_name, "-c": configuration, "-chk": checkpoint}.items():
        if name is None:
            continue
        if not name or set(name) & set("/\\\0"):
            raise UserError(f"{flag} {name} is not the name of one: give a name without a folder.")
    if unknown := [fold for fold in folds if fold != "all" and not (fold.isascii() and fold.isdigit())]:
        raise UserError(f"-f {unknown[0]} is neither 'all' nor the number of a fold.")
    if twice := [fold for fold in folds if folds.count(fold) > 1]:
        raise UserError(f"-f names the fold {twice[0]} twice: name each fold once.")
    folder = model_folder(dataset.results, trainer, plans_name, configuration)
    checkpoint = best_checkpoint(folder, folds) if checkpoint is None else checkpoint
    for fold in folds:
        file = folder / f"fold_{fold}" / checkpoint
        if not file.is_file():
            others = [other.name for other in dataset.results.glob("*__*__*")] if not folder.is_dir() else []
            raise UserError(
                f"There is no checkpoint {file}{did_you_mean(folder.name, others)}: "
                f"run nnUNetv2_train {dataset.id} {configuration} {fold} "
                f"-p {plans_name} -tr {trainer} first, or name another file of that folder with -chk."
            )
    description = read_description(folder / DESCRIPTION)
    plans = read_plans(folder / PLANS, plans_name, configuration, description)
    plan = Plan(dataset, plans, configuration, dict(description.content))
    refuse_cascade(plan.configuration)
    return Model(plan, trainer, tuple(folds), checkpoint)
