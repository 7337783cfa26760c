"""A table of volumes for routine use: a folder of scans in, a row for each case and label out.

The segmentations are kept beside the table, so that a stopped run goes on where it was; a note of the model lies with
them, so that no table mixes two models. A scan that cannot be read gets a row that says so and stops nothing else.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.evaluation.cases import read_mask
from nnunet_vit_mae.evaluation.clinical import find_cutoffs, group_names, group_of
from nnunet_vit_mae.files import link, read_json, replacing, write_json
from nnunet_vit_mae.imaging.volumes import Geometry, read_geometry, without_warnings_of_itk
from nnunet_vit_mae.nnunet.calibration import CALIBRATED, CALIBRATION_RECORD
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.nnunet.prediction import PredictionCase, find_prediction_cases, predict
from nnunet_vit_mae.thresholds import Classes
from nnunet_vit_mae.weights import file_hash

TRAINING = "training_volumes.json"  # in the model's folder, so that labels are read once
NOTE = "model.json"
TOLERANCE = 1.01  # of a spacing: headers are rounded


@dataclass(frozen=True)
class TrainingRange:
    """What the model was trained on."""

    spacings: np.ndarray  # cases 3, each ascending: the last one is the slice thickness
    volumes: Mapping[str, np.ndarray]  # mm3 of each case, by label


@dataclass(frozen=True)
class Part:
    """The cases that one of several processes predicts, as nnU-Net shares them out."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise UserError(
                f"-part_id {self.number} is not among the parts 0 to {self.of - 1} of -num_parts {self.of}."
            )

    def table(self, table: Path) -> Path:
        """Where the part's own rows go."""
        return table if self.of == 1 else table.with_name(f"{table.stem}_part{self.number}of{self.of}{table.suffix}")


def quantify(
    model: Model, images: Path, table: Path, part: Part, *, cutoffs: Sequence[float] | None, device: str
) -> list[Path]:
    """Predict a folder, or a part of it, and write the table; whoever ends last of several joins their tables.

    Segmentations go to `TABLE_segmentations` beside the table. Raises `UserError` for a folder without images, for
    segmentations of another model there, and when the prediction fails.
    """
    if table.is_dir() or table.suffix != ".csv":
        raise UserError(f"-o {table} is no file that ends in .csv: name the table to write.")
    seen, work = read_training_range(model), table.with_name(f"{table.stem}_segmentations")
    cases = find_prediction_cases(model.plan, images)[part.number :: part.of]
    identity = model_hash(model)
    _refuse_other_model(work, identity)
    checked = {case.name: _check(case) for case in tqdm(cases, unit="case", desc="checking")}
    readable = [case for case in cases if isinstance(checked[case.name], Geometry)]
    _predict(model, readable, work, part, device)
    rows = []
    for case in tqdm(cases, unit="case", desc="measuring"):
        rows += _rows(model, case.name, checked[case.name], work, seen, cutoffs)
    found = pd.DataFrame(rows).assign(model=identity)
    written = [part.table(table)]
    with replacing(written[0]) as temporary:
        found.to_csv(temporary, index=False, lineterminator="\n")
    parts = [Part(number, part.of).table(table) for number in range(part.of)]
    if part.of > 1 and all(file.is_file() for file in parts):
        joined = pd.concat([pd.read_csv(file, dtype=str, keep_default_na=False) for file in parts])
        with replacing(table) as temporary:
            joined.sort_values("case", kind="stable").to_csv(temporary, index=False, lineterminator="\n")
        written.append(table)
    return written


def best_checkpoint(folder: Path, folds: Sequence[str]) -> str:
    """The calibrated checkpoint where all folds have one, else the last one."""
    calibrated = all((folder / f"fold_{fold}" / CALIBRATED).is_file() for fold in folds)
    return CALIBRATED if calibrated else "checkpoint_final.pth"


def model_hash(model: Model) -> str:
    """Twelve digits that change whenever a checkpoint does."""
    return hashlib.sha256("".join(file_hash(file) for file in model.files).encode()).hexdigest()[:12]


def thresholds_of(model: Model) -> dict[str, float]:
    """By label: what `mae3d_calibrate` found, or nnU-Net's own 0.5."""
    if model.checkpoint == CALIBRATED:
        return read_json(model.folder / CALIBRATION_RECORD)["thresholds"]
    return dict.fromkeys(classes_of(model.plan).names, 0.5)


def read_training_range(model: Model) -> TrainingRange:
    """Spacings and volumes of the training cases; raises `UserError` when their records are missing."""
    fingerprint = read_json(model.plan.dataset.preprocessed / "dataset_fingerprint.json")
    file = model.folder / TRAINING
    if not file.is_file():
        write_json(_training_volumes(model), file)
    volumes = {label: np.array(values, float) for label, values in read_json(file).items()}
    return TrainingRange(np.sort(np.array(fingerprint["spacings"], float), axis=1), volumes)


def warnings_of(geometry: Geometry, volumes: Mapping[str, float], seen: TrainingRange) -> dict[str, list[str]]:
    """What a reader should look at, by label."""
    *fine, thickness = sorted(geometry.spacing)
    common = []
    if _outside(thickness, seen.spacings[:, -1]):
        common.append(f"slice thickness {thickness:.3g} mm, trained on {_range(seen.spacings[:, -1])} mm")
    for axis, spacing in enumerate(fine):
        if spacing != thickness and _outside(spacing, seen.spacings[:, axis]):
            common.append(f"spacing {spacing:.3g} mm, trained on {_range(seen.spacings[:, axis])} mm")
            break
    found = {}
    for label, volume in volumes.items():
        own = list(common)
        if volume == 0:
            own.append("nothing found")
        elif volume > seen.volumes[label].max() or volume < seen.volumes[label].min():
            own.append(f"volume outside the {_range(seen.volumes[label])} mm3 of the training cases")
        found[label] = own
    return found


def _training_volumes(model: Model) -> dict[str, list[float]]:
    plan, classes = model.plan, classes_of(model.plan)
    folder, ending = plan.dataset.preprocessed / "gt_segmentations", plan.dataset_json["file_ending"]
    files = sorted(folder.glob(f"*{ending}"))
    if not files:
        raise UserError(f"There are no reference segmentations in {folder}: run nnUNetv2_preprocess first.")
    found = [_volumes(file, classes) for file in tqdm(files, unit="case", desc="training labels")]
    return {label: [volumes[label] for volumes in found] for label in classes.names}


def _volumes(file: Path, classes: Classes) -> dict[str, float]:
    """Volume of each label in mm3."""
    with without_warnings_of_itk():
        mask, geometry = read_mask(file), read_geometry(file)
    voxel = float(np.prod(geometry.spacing))
    return {
        label: float(np.isin(mask, values).sum() * voxel)
        for label, values in zip(classes.names, classes.values, strict=True)
    }


def _refuse_other_model(work: Path, identity: str) -> None:
    note = work / NOTE
    if note.is_file() and read_json(note)["model"] != identity:
        raise UserError(f"{work} has segmentations of another model: give another -o, or remove that folder.")
    if not note.is_file():
        if work.exists() and any(work.iterdir()):
            raise UserError(f"{work} is in use: give another -o, or remove that folder.")
        write_json({"model": identity}, note)


def _check(case: PredictionCase) -> Geometry | str:
    """The geometry of a case, or why it cannot be predicted."""
    found = []
    for image in case.images:
        try:
            with without_warnings_of_itk():
                found.append(read_geometry(image))
        except Exception as error:  # noqa: BLE001 (each reader has errors of its own; the reason goes into the table)
            return f"{image.name} cannot be read ({reader_reason(error)})"
        if difference := found[0].difference(found[-1]):
            return f"{image.name} and {case.images[0].name} differ in {difference}"
    return found[0]


def _predict(model: Model, cases: Sequence[PredictionCase], work: Path, part: Part, device: str) -> None:
    files = [work / f"{case.name}{model.plan.dataset_json['file_ending']}" for case in cases]
    if all(file.is_file() for file in files):
        return
    images = work / f"images_part{part.number}"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    for case in cases:
        for image in case.images:
            link(image, images / image.name)
    command = [*model.command(images, work, device), "--continue_prediction"]
    predict(command, files, work / f"log_part{part.number}.txt")
    shutil.rmtree(images)


def _rows(
    model: Model, case: str, checked: Geometry | str, work: Path, seen: TrainingRange, cutoffs: Sequence[float] | None
) -> list[dict[str, Any]]:
    classes, thresholds = classes_of(model.plan), thresholds_of(model)
    if isinstance(checked, str):
        return [{"case": case, "label": label, "warnings": checked} for label in classes.names]
    volumes = _volumes(work / f"{case}{model.plan.dataset_json['file_ending']}", classes)
    warnings = warnings_of(checked, volumes, seen)
    return [
        {
            "case": case,
            "label": label,
            "volume_mm3": round(volume, 3),
            "risk_group": _group(volume, seen.volumes[label], cutoffs),
            "threshold": round(thresholds[label], 6),
            "slice_thickness_mm": round(max(checked.spacing), 4),
            "warnings": "; ".join(warnings[label]),
        }
        for label, volume in volumes.items()
    ]


def _group(volume: float, training: np.ndarray, given: Sequence[float] | None) -> str:
    cutoffs = tuple(given) if given else find_cutoffs(training, None)[0]
    if not cutoffs:
        return ""
    return group_names(cutoffs, bool(given))[int(group_of(np.array(volume), cutoffs))]


def _outside(value: float, seen: np.ndarray) -> bool:
    return value > seen.max() * TOLERANCE or value < seen.min() / TOLERANCE


def _range(values: np.ndarray) -> str:
    return f"{values.min():.4g} to {values.max():.4g}"
