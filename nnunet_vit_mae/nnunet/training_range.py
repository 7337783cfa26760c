"""Spacings and volumes of the cases that a model was trained on, with which `mae3d_quantify` compares new ones.

They are kept in the model's folder, so that a model works where its dataset is not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from nnunet_vit_mae.calibration.cases import Classes
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.labels import read_mask
from nnunet_vit_mae.imaging.volumes import Geometry, read_geometry, without_warnings_of_itk
from nnunet_vit_mae.nnunet.folds import reference_segmentations
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import write_json

logger = logging.getLogger(__name__)

FINGERPRINT = "dataset_fingerprint.json"  # nnU-Net's, which it copies into the model's folder
TRAINING_VOLUMES = "training_volumes.json"  # there too, so that the labels are read only once
TOLERANCE = 1.01  # of a spacing, because headers are rounded

Spacing = Annotated[list[Annotated[FiniteFloat, Field(gt=0)]], Field(min_length=3, max_length=3)]
Volumes = Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(min_length=1)]


@dataclass(frozen=True)
class Fingerprint:
    """What is read of nnU-Net's fingerprint of a dataset: the spacing of each case in mm."""

    spacings: Annotated[list[Spacing], Field(min_length=1)]


@dataclass(frozen=True)
class TrainingRange:
    """Spacings and volumes of the cases that the model was trained on."""

    spacings: np.ndarray  # mm, cases x 3, each row ascending: the last value is the slice thickness
    volumes: Mapping[str, np.ndarray]  # mm3 of each case, by label; empty where they are not known


def read_training_range(model: Model) -> TrainingRange:
    """Return spacings and volumes of the training cases.

    Without the volumes, which nnU-Net's own archives lack, the log says what is left out. Raises `UserError` if the
    spacings are missing, or for files of another model.
    """
    spacings = read_entries(Fingerprint, fingerprint_file(model), "run nnUNetv2_extract_fingerprint again").spacings
    volumes = read_training_volumes(model)
    if not volumes:
        logger.warning(
            "The volumes of the training cases are not known here: volumes are not compared with them, and there are "
            "no risk groups without --cutoffs. An archive of mae3d_export holds them."
        )
    arrays = {label: np.array(values, float) for label, values in volumes.items()}
    return TrainingRange(np.sort(np.array(spacings, float), axis=1), arrays)


def fingerprint_file(model: Model) -> Path:
    """Return the fingerprint of the training cases: in the model's folder, or with the preprocessed ones."""
    file = model.folder / FINGERPRINT
    return file if file.is_file() else model.plan.dataset.preprocessed / FINGERPRINT


def read_training_volumes(model: Model) -> dict[str, list[float]]:
    """Return the volume of each label in each training case in mm3, or nothing where neither they nor labels are.

    Raises `UserError` for a file of another model.
    """
    file, names = model.folder / TRAINING_VOLUMES, classes_of(model.plan).names
    if not file.is_file():
        if not model.plan.dataset.references.is_dir():
            return {}
        write_json(_training_volumes(model), file)
    volumes = read_entries(dict[str, Volumes], file, "remove it, and it is written again")
    if {*volumes} != {*names}:
        raise UserError(f"{file} has other labels than the model ({', '.join(names)}): remove it, and try again.")
    return volumes


def volumes_in(file: Path, classes: Classes) -> dict[str, float]:
    """Return the volume of each label of a segmentation in mm3."""
    with without_warnings_of_itk():
        mask, geometry = read_mask(file), read_geometry(file)
    voxel = float(np.prod(geometry.spacing))
    return {
        label: float(np.isin(mask, values).sum() * voxel)
        for label, values in zip(classes.names, classes.values, strict=True)
    }


def warnings_of(geometry: Geometry, volumes: Mapping[str, float], training: TrainingRange) -> dict[str, list[str]]:
    """Return, for each label, in what a case differs from the training cases."""
    common = _spacing_warnings(geometry, training)
    return {label: common + _volume_warnings(volume, training.volumes.get(label)) for label, volume in volumes.items()}


def _spacing_warnings(geometry: Geometry, training: TrainingRange) -> list[str]:
    *in_plane, thickness = sorted(geometry.spacing)
    warnings = []
    if _outside(thickness, training.spacings[:, -1]):
        warnings.append(f"slice thickness {thickness:.3g} mm, trained on {_range(training.spacings[:, -1])} mm")
    for axis, spacing in enumerate(in_plane):
        if spacing != thickness and _outside(spacing, training.spacings[:, axis]):
            warnings.append(f"spacing {spacing:.3g} mm, trained on {_range(training.spacings[:, axis])} mm")
            break
    return warnings


def _volume_warnings(volume: float, training: np.ndarray | None) -> list[str]:
    if volume == 0:
        return ["nothing found"]
    if training is not None and (volume > training.max() or volume < training.min()):
        return [f"volume outside the {_range(training)} mm3 of the training cases"]
    return []


def _training_volumes(model: Model) -> dict[str, list[float]]:
    classes, files = classes_of(model.plan), reference_segmentations(model.plan).values()
    files = with_progress(files, unit="case", desc="reading training labels")
    by_case = [volumes_in(file, classes) for file in files]
    return {label: [volumes[label] for volumes in by_case] for label in classes.names}


def _outside(value: float, training: np.ndarray) -> bool:
    return value > training.max() * TOLERANCE or value < training.min() / TOLERANCE


def _range(values: np.ndarray) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"
