"""Spacings and volumes of the labelled cases of a model's dataset, with which `mae3d_quantify` compares new ones.

Volumes are those of all labelled cases but the test cases of `mae3d_split --test`, whose labels nothing may be fitted
to. Both are kept in the model's folder, so that a model works where its dataset is not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, FiniteFloat

from nnunet_vit_mae.calibration.cases import Classes
from nnunet_vit_mae.datasets.split.files import read_split_record
from nnunet_vit_mae.errors import UserError, WriteError, reading
from nnunet_vit_mae.imaging.channels import cases_in
from nnunet_vit_mae.imaging.description import REORIENTING
from nnunet_vit_mae.imaging.labels import read_segmentation
from nnunet_vit_mae.imaging.volumes import Geometry, read_geometry, without_warnings_of_itk
from nnunet_vit_mae.nnunet.models import Model, is_imported
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.entries import Length, checked_entries, read_entries
from nnunet_vit_mae.storage.files import read_json, short_hash, write_json
from nnunet_vit_mae.storage.layout import CARD, FINGERPRINT

logger = logging.getLogger(__name__)

TRAINING_VOLUMES = "training_volumes.json"  # in the model's folder, so that the labels are read only once
TOLERANCE = 1.01  # of a spacing, because headers are rounded

Spacing = Annotated[list[Length], Field(min_length=3, max_length=3)]
Volumes = Annotated[list[Annotated[FiniteFloat, Field(ge=0)]], Field(min_length=1)]


@dataclass(frozen=True)
class Fingerprint:
    """What is read of nnU-Net's fingerprint of a dataset: the spacing of each case in mm."""

    spacings: Annotated[list[Spacing], Field(min_length=1)]


@dataclass(frozen=True)
class _StoredVolumes:
    """The content of `training_volumes.json`. Archives and earlier versions have the volumes alone."""

    volumes: dict[str, Volumes]  # mm3 of each case, by label
    cases: str | None = None  # hash of the label files


@dataclass(frozen=True)
class TrainingRange:
    """Spacings and volumes of the labelled cases of a model's dataset."""

    spacings: np.ndarray  # mm, cases x 3, each row ascending: the last value is the slice thickness
    volumes: Mapping[str, np.ndarray]  # mm3 of each case, by label; empty where they are not known
    axes: Collection[str] = ()  # such as LPS, of all cases; empty where they do not matter, or labels are not here


def read_training_range(model: Model) -> TrainingRange:
    """Return the spacings of the labelled cases, and the volumes of those that are not held out for testing.

    Without the volumes, which nnU-Net's own archives lack, the log says what is left out. Raises `UserError` if the
    spacings are missing, and as `read_training_volumes` does.
    """
    spacings = read_entries(Fingerprint, fingerprint_file(model), "run nnUNetv2_extract_fingerprint again").spacings
    files = _labelled_files(model)
    volumes = _volumes_known(model, files)
    if not volumes:
        reason = "An archive of mae3d_export holds them."
        if _has_ignored_voxels(model):
            reason = "Their labels leave voxels out (ignore), which may belong to any volume."
        logger.warning(
            "The volumes of the training cases are not known here: volumes are not compared with them, and there are "
            "no risk groups without --cutoffs. %s",
            reason,
        )
    arrays = {label: np.array(values, float) for label, values in volumes.items()}
    reoriented = model.plan.plans.plans["image_reader_writer"].endswith(REORIENTING)
    axes = () if reoriented else _axes_of(files.values())
    return TrainingRange(np.sort(np.array(spacings, float), axis=1), arrays, axes)


def fingerprint_file(model: Model) -> Path:
    """Return the fingerprint of the labelled cases: in the model's folder, or with the preprocessed ones."""
    file = model.folder / FINGERPRINT
    return file if file.is_file() else model.plan.dataset.preprocessed / FINGERPRINT


def read_training_volumes(model: Model) -> dict[str, list[float]]:
    """Return the volume of each label in each labelled case in mm3.

    There are none if neither they nor labels are here, or with an ignore label, whose voxels may belong to any volume.

    They are kept in the model's folder, and read from the labels again when these have changed, or when other cases are
    labelled or held out for testing; each time, if that folder cannot be written to, as a colleague's may be. An
    imported model keeps those that it came with, until one is trained in its place.

    Raises `UserError` for a file of another model, for a `split.json` that cannot be used, and for a label image that
    cannot be read.
    """
    return _volumes_known(model, _labelled_files(model))


def _volumes_known(model: Model, files: Mapping[str, Path]) -> dict[str, list[float]]:
    if _has_ignored_voxels(model):
        return {}
    file = model.folder / TRAINING_VOLUMES
    stored = _read_stored(file, classes_of(model.plan).names)
    if files and (stored is None or not _belongs_to(stored, files, came_with_model=(model.folder / CARD).is_file())):
        stored = _StoredVolumes(_volumes_of(files, classes_of(model.plan)), _hash_of(files))
        try:
            write_json(asdict(stored), file)
        except WriteError as error:
            logger.info("The volumes of the training cases will be read from the labels again: %s", error)
    return {} if stored is None else stored.volumes


def _has_ignored_voxels(model: Model) -> bool:
    return classes_of(model.plan).ignore is not None


def volumes_in(file: Path, classes: Classes) -> dict[str, float]:
    """Return the volume of each label of a segmentation in mm3."""
    with without_warnings_of_itk():
        mask, geometry = read_segmentation(file)
    voxel = float(np.prod(geometry.spacing))
    return {
        label: float(np.isin(mask, values).sum() * voxel)
        for label, values in zip(classes.names, classes.values, strict=True)
    }


def warnings_of(geometry: Geometry, volumes: Mapping[str, float], training: TrainingRange) -> dict[str, list[str]]:
    """Return, for each label, in what a case differs from the labelled cases."""
    common = _spacing_warnings(geometry, training)
    if training.axes and geometry.axes not in training.axes:
        trained = " and ".join(sorted(training.axes))
        common.append(f"axes {geometry.axes}, trained on {trained}: nnU-Net does not reorient images")
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


def _read_stored(file: Path, labels: Iterable[str]) -> _StoredVolumes | None:
    """Return what an earlier call or an archive left, if anything."""
    if not file.is_file():
        return None
    content, advice = read_json(file), "remove it, and it is written again"
    if isinstance(content, dict) and isinstance(content.get("volumes"), dict):  # not a label, which has a list
        stored = checked_entries(_StoredVolumes, content, str(file), advice)
    else:
        stored = _StoredVolumes(checked_entries(dict[str, Volumes], content, str(file), advice))
    if {*stored.volumes} != {*labels}:
        raise UserError(f"{file} has other labels than the model ({', '.join(labels)}): remove it, and try again.")
    return stored


def _labelled_files(model: Model) -> dict[str, Path]:
    """Return the reference segmentations by case, without the test cases; none where they are those of others."""
    if is_imported(model):
        return {}
    dataset = model.plan.dataset
    held_out = read_split_record(dataset.preprocessed).test
    files = cases_in(dataset.references, model.plan.file_ending)
    return {case: file for case, file in files.items() if case not in held_out}


def _belongs_to(stored: _StoredVolumes, files: Mapping[str, Path], *, came_with_model: bool) -> bool:
    """Return whether volumes are of these cases; without the names of the cases, their number has to do."""
    if stored.cases is None:
        return not came_with_model and all(len(volumes) == len(files) for volumes in stored.volumes.values())
    return stored.cases == _hash_of(files)


def _hash_of(files: Mapping[str, Path]) -> str:
    lines = sorted(f"{case} {file.stat().st_size} {file.stat().st_mtime_ns}" for case, file in files.items())
    return short_hash("\n".join(lines), 12)


def _volumes_of(files: Mapping[str, Path], classes: Classes) -> dict[str, list[float]]:
    labels = with_progress(files.values(), unit="case", desc="reading training labels")
    by_case = [volumes_in(file, classes) for file in labels]
    return {label: [volumes[label] for volumes in by_case] for label in classes.names}


def _axes_of(files: Iterable[Path]) -> set[str]:
    axes = set()
    for file in files:
        with reading(file), without_warnings_of_itk():
            axes.add(read_geometry(file).axes)
    return axes


def _outside(value: float, training: np.ndarray) -> bool:
    return value > training.max() * TOLERANCE or value < training.min() / TOLERANCE


def _range(values: np.ndarray) -> str:
    ends = f"{values.min():.4g}", f"{values.max():.4g}"
    return " to ".join(dict.fromkeys(ends))
