"""Install a model from an archive of `mae3d_export`: all of it is checked before anything is written."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_vit_mae.calibration.record import (
    CALIBRATION_RECORD,
    UNCERTAINTY,
    CalibrationEntries,
    shifts_of,
)
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.description import DESCRIPTION, describe
from nnunet_vit_mae.nnunet.checked_plans import check_plans
from nnunet_vit_mae.nnunet.folders import Dataset
from nnunet_vit_mae.nnunet.plans import Plan, classes_of, refuse_cascade
from nnunet_vit_mae.nnunet.shared_models import (
    MEMBERS,
    CheckpointEntries,
    ModelCard,
    read_weights,
    refuse_other_weights,
    rest_member,
    weights_member,
)
from nnunet_vit_mae.nnunet.training_range import TRAINING_VOLUMES, Fingerprint, Volumes
from nnunet_vit_mae.nnunet.untrained import expected_tensors
from nnunet_vit_mae.storage.archives import Archive, open_archive
from nnunet_vit_mae.storage.entries import checked_entries
from nnunet_vit_mae.storage.files import file_hash, inside, locked, replacing, set_aside, write_json
from nnunet_vit_mae.storage.layout import CALIBRATED, CARD, FINGERPRINT, PLANS

ADVICE = "export the model again"


@dataclass(frozen=True)
class InstalledModel:
    """A model that was installed: its card, its folder, and where an earlier one was moved to."""

    card: ModelCard
    folder: Path
    moved: Path | None


@dataclass(frozen=True)
class _CheckedModel:
    """The content of an archive that was found to be a model, except for the values of its weights."""

    card: ModelCard
    plan: Plan
    texts: dict[str, Any]  # by file name
    expected: dict[str, Tensor]  # without values


def import_model(file: Path, results: Path, *, overwrite: bool) -> InstalledModel:
    """Rebuild the folder of a model from which nnU-Net predicts.

    Args:
        file: The archive.
        results: nnU-Net's folder of results; the folder of the model is below it.
        overwrite: Move a model of the same name aside; otherwise it is an error.

    Returns:
        What was installed.

    Raises:
        UserError: If the archive is not one of a model, if any of it is damaged or does not fit the rest, or if there
            is such a model. Nothing has been written then.
    """
    with open_archive(file, MEMBERS) as archive:
        model = _checked(archive)
        card = model.card
        for fold, checkpoint in _checkpoints(card):
            _read_checkpoint(archive, model, fold, checkpoint)
        name = f"{card.trainer}__{card.plans}__{card.configuration}"
        folder = inside(results, card.dataset, name, source=file)
        if folder.exists() and not overwrite:
            raise UserError(
                f"{folder} already exists: add --overwrite to move it aside, or choose other results with -o."
            )
        with locked(folder):
            for unfinished in folder.parent.glob(f".[0-9]*.{name}"):  # of a process that was killed
                shutil.rmtree(unfinished)
            temporary = folder.with_name(f".{os.getpid()}.{name}")
            try:
                _write(archive, model, temporary)
                return InstalledModel(card, folder, _put_in_place(temporary, folder))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, folder: Path) -> Path | None:
    """Rename the new folder; an earlier one is moved aside, and back if that fails."""
    moved = set_aside(folder) if folder.exists() else None
    try:
        temporary.rename(folder)
    except OSError:
        if moved:
            moved.rename(folder)
        raise
    return moved


def _checkpoints(card: ModelCard) -> list[tuple[str, str]]:
    return [(fold, checkpoint) for fold in card.folds for checkpoint in card.checkpoints]


def _checked(archive: Archive) -> _CheckedModel:
    file = archive.file
    card = checked_entries(ModelCard, archive.read_json(CARD), f"{CARD} in {file}", ADVICE)
    texts = {name: archive.read_json(name) for name in archive.names if "/" not in name}
    wanted = {CARD, PLANS, DESCRIPTION}
    for fold, checkpoint in _checkpoints(card):
        wanted |= {weights_member(fold, checkpoint), rest_member(fold, checkpoint)}
    if CALIBRATED in card.checkpoints:
        wanted.add(CALIBRATION_RECORD)
    optional = {FINGERPRINT, TRAINING_VOLUMES}
    if missing := sorted(wanted - archive.names):
        raise UserError(f"{file} has no {missing[0]}: {ADVICE}.")
    if surplus := sorted(archive.names - wanted - optional):
        raise UserError(f"{file} has {surplus[0]}, which {CARD} does not list: {ADVICE}.")
    plan = _plan(card, texts, file)
    _check_records(card, plan, texts, file)
    return _CheckedModel(card, plan, texts, expected_tensors(plan, card.trainer, str(file)))


def _plan(card: ModelCard, texts: dict[str, Any], file: Path) -> Plan:
    description = describe(texts[DESCRIPTION], f"{DESCRIPTION} in {file}")
    check_plans(texts[PLANS], card.configuration, description, source=f"{PLANS} in {file}")
    if texts[PLANS]["plans_name"] != card.plans:
        raise UserError(f"{file} has plans {texts[PLANS]['plans_name']}, but a card of {card.plans}: {ADVICE}.")
    nowhere = Path(card.dataset)
    plan = Plan(
        Dataset(card.dataset, nowhere, nowhere, nowhere),
        PlansManager(texts[PLANS]),
        card.configuration,
        texts[DESCRIPTION],
    )
    refuse_cascade(plan.configuration)
    return plan


def _check_records(card: ModelCard, plan: Plan, texts: dict[str, Any], file: Path) -> None:
    """Check the files that `mae3d_quantify` reads; each has an entry for each label."""
    labels = {*classes_of(plan).names}
    by_label = {}
    if FINGERPRINT in texts:
        checked_entries(Fingerprint, texts[FINGERPRINT], f"{FINGERPRINT} in {file}", ADVICE)
    if TRAINING_VOLUMES in texts:
        source = f"{TRAINING_VOLUMES} in {file}"
        by_label[TRAINING_VOLUMES] = checked_entries(dict[str, Volumes], texts[TRAINING_VOLUMES], source, ADVICE)
    if CALIBRATED in card.checkpoints:
        source, content = f"{CALIBRATION_RECORD} in {file}", texts[CALIBRATION_RECORD]
        by_label[CALIBRATION_RECORD] = checked_entries(CalibrationEntries, content, source, ADVICE).thresholds
        if UNCERTAINTY in content:
            shifts_of(content, sorted(labels), source, ADVICE)
    for name, entries in by_label.items():
        if {*entries} != labels:
            raise UserError(
                f"{name} in {file} has other labels than the model ({', '.join(sorted(labels))}): {ADVICE}."
            )


def _read_checkpoint(archive: Archive, model: _CheckedModel, fold: str, checkpoint: str) -> dict[str, Any]:
    """Return a checkpoint as nnU-Net reads it, after a check of all that it holds."""
    name = rest_member(fold, checkpoint)
    rest = checked_entries(CheckpointEntries, archive.read_json(name), f"{name} in {archive.file}", ADVICE)
    if (rest.trainer_name, rest.configuration, rest.fold) != (model.card.trainer, model.card.configuration, fold):
        raise UserError(f"{name} in {archive.file} belongs to another model than {CARD}: {ADVICE}.")
    name = weights_member(fold, checkpoint)
    source = f"{name} in {archive.file}"
    weights = read_weights(archive.read(name), rest.shared, source)
    refuse_other_weights(weights, model.expected, source)
    axes = rest.inference_allowed_mirroring_axes
    return {
        "network_weights": weights,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "trainer_name": rest.trainer_name,
        "inference_allowed_mirroring_axes": None if axes is None else tuple(axes),
        "init_args": {
            "plans": model.texts[PLANS],
            "configuration": rest.configuration,
            "fold": fold if fold == "all" else int(fold),
            "dataset_json": model.texts[DESCRIPTION],
        },
    }


def _write(archive: Archive, model: _CheckedModel, folder: Path) -> None:
    hashes = {}
    for fold, checkpoint in _checkpoints(model.card):
        file = folder / f"fold_{fold}" / checkpoint
        with replacing(file) as temporary, temporary.open("wb") as stream:
            torch.save(_read_checkpoint(archive, model, fold, checkpoint), stream)
        hashes[f"fold_{fold}/{checkpoint}"] = file_hash(file)
    texts = {**model.texts, CARD: model.texts[CARD] | {"sha256": hashes}}  # by which a later training is noticed
    if record := texts.get(CALIBRATION_RECORD):
        texts[CALIBRATION_RECORD] = record | {  # pickle's bytes are new ones
            "checkpoints": {place: digest for place, digest in hashes.items() if place.endswith(f"/{CALIBRATED}")},
            "made_from": {place: hashes[place] for place in record.get("made_from", {}) if place in hashes},
        }
    for name, content in texts.items():
        write_json(content, folder / name)
