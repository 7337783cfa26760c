"""Write a trained model into an archive from which another site predicts with nnU-Net, without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD, UNCERTAINTY
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.nnunet.calibrated import read_calibration_of
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.nnunet.shared_models import (
    DESCRIBING,
    CheckpointEntries,
    ModelCard,
    refuse_other_weights,
    rest_member,
    weights_content,
    weights_member,
)
from nnunet_vit_mae.nnunet.training_range import (
    TRAINING_VOLUMES,
    Fingerprint,
    fingerprint_file,
    read_training_volumes,
)
from nnunet_vit_mae.nnunet.untrained import expected_tensors
from nnunet_vit_mae.storage.archives import json_content, write_archive
from nnunet_vit_mae.storage.entries import checked_entries, read_entries
from nnunet_vit_mae.storage.files import without_paths
from nnunet_vit_mae.storage.layout import CALIBRATED, CARD, FINGERPRINT, PLANS
from nnunet_vit_mae.storage.pickles import read_trained

RENAME = "train the model with a name of letters, digits and underscores"


def export_model(models: Sequence[Model], file: Path, *, case_names: bool) -> list[str]:
    """Write a model into an archive.

    Args:
        models: The model, once for each of its checkpoints.
        file: The archive to write, which must not exist.
        case_names: Keep the names of the calibration cases; otherwise these are numbered.

    Returns:
        What the archive lacks, one sentence each.

    Raises:
        UserError: If the file exists, or if a file of the model is damaged or does not fit its plans.
    """
    if file.exists():
        raise UserError(f"{file} already exists: give a new file with -o, or remove it.")
    texts, notes = _texts(models, case_names=case_names)
    members = [(name, json_content(without_paths(content))) for name, content in texts.items()]
    write_archive(chain(members, *map(_checkpoint_members, models)), file)
    return notes


def _texts(models: Sequence[Model], *, case_names: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the members that are JSON, and what is missing."""
    model, notes = models[0], []
    plan = model.plan
    description = {key: value for key, value in plan.dataset_json.items() if key in DESCRIBING}
    texts = {CARD: _card(models), PLANS: plan.plans.plans, DESCRIPTION: description}
    if fingerprint_file(model).is_file():
        advice = "run nnUNetv2_extract_fingerprint again"
        texts[FINGERPRINT] = {"spacings": read_entries(Fingerprint, fingerprint_file(model), advice).spacings}
    else:
        notes.append(f"There is no {FINGERPRINT}: mae3d_quantify will not work with this archive.")
    if volumes := read_training_volumes(model):
        texts[TRAINING_VOLUMES] = volumes
    else:
        notes.append(
            "The volumes of the training cases are not known here, so that mae3d_quantify will not know them either."
        )
    for calibrated in (each for each in models if each.checkpoint == CALIBRATED):
        content = dict(read_calibration_of(calibrated).content)
        texts[CALIBRATION_RECORD] = content if case_names else _numbered(content)
    return texts, notes


def _card(models: Sequence[Model]) -> dict[str, Any]:
    model = models[0]
    plan = model.plan
    card = {
        "what": "A trained model for nnU-Net v2, written by mae3d_export; mae3d_import installs it.",
        "dataset": plan.dataset.name,
        "plans": plan.plans_name,
        "configuration": plan.name,
        "trainer": model.trainer,
        "folds": list(model.folds),
        "checkpoints": [each.checkpoint for each in models],
        "channel_names": plan.channel_names,
        "labels": list(classes_of(plan).names),
        "licence": plan.licence,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "packages": package_versions(),
    }
    checked_entries(ModelCard, card, str(model.folder), RENAME)
    return card


def _numbered(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a calibration record with numbers in place of the names of its cases."""

    def rows_of(section: Mapping[str, Any]) -> list[dict[str, Any]]:
        advice = "calibrate the model again"
        return checked_entries(list[dict[str, Any]], section.get("cases", []), CALIBRATION_RECORD, advice)

    rows = rows_of(record)
    numbers = {name: f"case_{number}" for number, name in enumerate(dict.fromkeys(row.get("case") for row in rows), 1)}
    numbered = {**record, "cases": [{**row, "case": numbers[row.get("case")]} for row in rows]}
    if isinstance(section := record.get(UNCERTAINTY), dict):
        # a case that the threshold was not fitted to has no number, and no name either
        cases = [{**row, "case": numbers.get(row.get("case"), "case")} for row in rows_of(section)]
        numbered[UNCERTAINTY] = {**section, "cases": cases}
    return numbered


def _checkpoint_members(model: Model) -> Iterator[tuple[str, bytes]]:
    """Yield the rest of each checkpoint and its weights, after a check of both."""
    expected = expected_tensors(model.plan, model.trainer, str(model.folder))
    for fold, file in zip(model.folds, model.files, strict=True):
        checkpoint = read_trained(file)
        weights, axes = checkpoint["network_weights"], checkpoint.get("inference_allowed_mirroring_axes")
        refuse_other_weights(weights, expected, str(file))
        content, shared = weights_content(weights)
        rest = {
            "trainer_name": model.trainer,
            "configuration": model.plan.name,
            "fold": fold,
            "inference_allowed_mirroring_axes": None if axes is None else [int(axis) for axis in axes],
            "shared": shared,
        }
        checked_entries(CheckpointEntries, rest, str(file), "train the model again")
        if checkpoint.get("trainer_name") != model.trainer:
            raise UserError(f"{file} was trained by {checkpoint.get('trainer_name')}: check -tr.")
        yield rest_member(fold, file.name), json_content(rest)
        yield weights_member(fold, file.name), content
