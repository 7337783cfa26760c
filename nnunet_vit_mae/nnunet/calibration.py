"""Thresholds for a trained model of nnU-Net, put into its own checkpoints (ViTiac, section 3.1).

A shift of the bias in front of the softmax (or sigmoids) is a threshold on the probability, and it stays one through
all that nnU-Net does afterwards: mirroring, blending of windows, averaging of folds, linear resampling. So a calibrated
model is an ordinary checkpoint, and nnU-Net's own command predicts with it.
"""

from __future__ import annotations

import csv
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.evaluation.calibration_figures import agreement_figure, curve_figure
from nnunet_vit_mae.evaluation.calibration_record import CALIBRATION_RECORD
from nnunet_vit_mae.files import link, replacing, write_json
from nnunet_vit_mae.nnunet.folds import split_of, training_names
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.prediction import find_prediction_cases, find_reference, predict
from nnunet_vit_mae.plots import save_figure
from nnunet_vit_mae.thresholds import Calibration, CalibrationCase, CaseVolumes, Classes, ThresholdCurve, fit_thresholds
from nnunet_vit_mae.weights import file_hash, package_versions

CALIBRATED = "checkpoint_calibrated.pth"
FOLDER = "calibration"  # in the model's folder: probabilities of cases that nnU-Net has kept none of
HEAD = re.compile(r"decoder\.(?:(?:.+\.)?head|seg_layers\.\d+)\.bias")  # ours, and those of nnU-Net's U-Nets
RECORDED_PACKAGES = ("nnunet-vit-mae", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class Predicted:
    """A case with nnU-Net's probabilities (`.npz`) and its reference segmentation."""

    name: str
    fold: str | None  # whose validation case it is; None for a set of its own
    probabilities: Path
    reference: Path


def validation_cases(model: Model, device: str) -> list[Predicted]:
    """The validation cases of the model's folds; those without probabilities are predicted first.

    Raises `UserError` for fold `all`, which has none, and when files are missing.
    """
    if "all" in model.folds:
        raise UserError(
            "-f all was trained on every labelled case: give cases that it has not seen with -i and -l, "
            "or add --allow_training_cases."
        )
    return [case for fold in model.folds for case in _validation_cases_of(model, fold, device)]


def training_cases(model: Model, device: str) -> list[Predicted]:
    """All labelled cases, predicted by a model that was trained on them: what `--allow_training_cases` asks for."""
    raw = model.plan.dataset.raw
    return separate_cases(model, raw / "imagesTr", raw / "labelsTr", device, allow_training_cases=True)


def separate_cases(
    model: Model, images: Path, references: Path, device: str, *, allow_training_cases: bool
) -> list[Predicted]:
    """The cases of a development set, predicted by all folds together.

    Raises `UserError` for cases that the model was trained on, and when files are missing.
    """
    plan = model.plan
    names = [case.name for case in find_prediction_cases(plan, images)]
    labels = {name: find_reference(plan, name, references) for name in names}
    labelled = _labelled(plan)
    known = {name for fold in model.folds for name in training_names(plan, fold, labelled)}
    if (seen := sorted(known & set(names))) and not allow_training_cases:
        raise UserError(
            f"The model was trained on {len(seen)} of the {len(names)} cases ({', '.join(seen[:3])}...): its "
            "probabilities there say nothing about new scans; leave them out, or add --allow_training_cases."
        )
    predictions = _predict(model, images, names, FOLDER, device)
    return [Predicted(name, None, predictions / f"{name}.npz", labels[name]) for name in names]


def fit(model: Model, cases: Sequence[Predicted], objective: str) -> Calibration:
    """The shifts with the smallest loss on these cases. Raises `UserError` for files that cannot be read."""
    classes, bar = classes_of(model.plan), tqdm(unit="case", desc="reading")
    with bar:
        return fit_thresholds([_to_calibrate(model.plan, case, classes, bar) for case in cases], classes, objective)


def write(model: Model, cases: Sequence[Predicted], found: Calibration, objective: str) -> list[Path]:
    """Write a calibrated checkpoint for each fold, the record, the curve as table and picture, and Bland-Altman plots.

    Raises `UserError` when the head of the network cannot be found.
    """
    classes, folder = classes_of(model.plan), model.folder
    shifts = found.shifts if classes.regions else (0.0, *found.shifts)
    checkpoints = [shift_checkpoint(file, shifts) for file in model.files]
    curves = dict(zip(classes.names, found.curves, strict=True))
    figures = {folder / "calibration_curve.png": curve_figure(curves, found.thresholds)}
    for label in classes.names:
        ending = f"_{label}" if len(classes.names) > 1 else ""
        figures[folder / f"calibration_bland_altman{ending}.png"] = agreement_figure(found.volumes, label)
    for file, figure in figures.items():
        save_figure(figure, file)
    _write_curves(curves, folder / "calibration_curve.csv")
    record = _record(model, cases, found, objective) | {"checkpoints": {str(f): file_hash(f) for f in checkpoints}}
    write_json(record, folder / CALIBRATION_RECORD)
    return [*checkpoints, folder / CALIBRATION_RECORD, folder / "calibration_curve.csv", *figures]


def threshold_table(found: Calibration) -> str:
    """Threshold and means before and after, by class, as text."""
    lines = [f"{'class':20}  {'threshold':>9}  {'mm3 before':>12}  {'after':>12}  {'Dice before':>11}  {'after':>6}"]
    labels = list(dict.fromkeys(row.label for row in found.volumes))
    for label, threshold in zip(labels, found.thresholds, strict=True):
        before, after = (_means(found.volumes, label, when) for when in ("before", "after"))
        volumes = [f"{means['absolute_difference_mm3']:12.1f}" for means in (before, after)]
        dice = f"{before['dice']:11.3f}  {after['dice']:6.3f}"
        lines.append(f"{label:20}  {threshold:9.4g}  {'  '.join(volumes)}  {dice}")
    lines.append("mm3: mean absolute volume difference. Both are of the cases that the threshold was fitted to.")
    return "\n".join(lines)


def refuse_calibrated(checkpoint: str) -> None:
    """Raise `UserError` for a checkpoint that has a threshold already."""
    if checkpoint == CALIBRATED:
        raise UserError(f"-chk {CALIBRATED} has a threshold already: calibrate the checkpoint that it was made from.")


def shift_head(weights: Mapping[str, Tensor], shifts: Sequence[float]) -> dict[str, Tensor]:
    """Weights of a network whose logits are shifted, one number for each output channel.

    The bias of a head may have several numbers for each channel, one after the other, as the `mae` decoder's has one
    for each voxel of a token. Raises `UserError` for networks whose head is not found.
    """
    heads = [name for name in weights if HEAD.fullmatch(name)]
    if not heads:
        raise UserError(
            "The network's last layer is none that mae3d_calibrate knows (ours, and U-Nets with decoder.seg_layers): "
            "calibrate a model of another trainer."
        )
    shifted = dict(weights)
    for name in heads:
        bias = weights[name]
        change = torch.tensor(shifts, dtype=bias.dtype, device=bias.device)
        shifted[name] = bias + change.repeat_interleave(len(bias) // len(shifts))
    return shifted


def shift_checkpoint(file: Path, shifts: Sequence[float]) -> Path:
    """Write `checkpoint_calibrated.pth` beside a checkpoint; what only training needs is left out of it."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)  # nnU-Net's own file, read as nnU-Net does
    checkpoint["network_weights"] = shift_head(checkpoint["network_weights"], shifts)
    checkpoint["optimizer_state"] = checkpoint["grad_scaler_state"] = None
    with replacing(file.with_name(CALIBRATED)) as temporary:
        torch.save(checkpoint, temporary)
    return file.with_name(CALIBRATED)


def _validation_cases_of(model: Model, fold: str, device: str) -> list[Predicted]:
    plan, kept = model.plan, model.folder / f"fold_{fold}" / "validation"
    references = plan.dataset.preprocessed / "gt_segmentations"
    names = split_of(plan, fold, _labelled(plan))["val"]
    labels = {name: find_reference(plan, name, references) for name in names}
    checkpoint = model.folder / f"fold_{fold}" / model.checkpoint
    if model.checkpoint != "checkpoint_final.pth" or not _complete(kept, names, checkpoint):
        one = Model(plan, model.trainer, (fold,), model.checkpoint)
        kept = _predict(one, plan.dataset.raw / "imagesTr", names, f"{FOLDER}_fold_{fold}", device)
    return [Predicted(name, fold, kept / f"{name}.npz", labels[name]) for name in names]


def _complete(folder: Path, names: Sequence[str], checkpoint: Path) -> bool:
    """Whether probabilities of all cases are there, and of this checkpoint, as far as dates tell."""
    files = [folder / f"{name}.npz" for name in names]
    return all(file.is_file() and file.stat().st_mtime >= checkpoint.stat().st_mtime for file in files)


def _predict(model: Model, images: Path, names: Sequence[str], folder: str, device: str) -> Path:
    """Predict cases with probabilities, or go on where an earlier call was stopped."""
    work, ending = model.folder / folder, model.plan.dataset_json["file_ending"]
    predictions, newest = work / "predictions", max(file.stat().st_mtime for file in model.files)
    for file in [*predictions.glob("*.npz"), *predictions.glob(f"*{ending}")]:
        name = file.name.removesuffix(".npz").removesuffix(ending)
        if name not in names or file.stat().st_mtime < newest:
            file.unlink()  # of another set of cases, or of a checkpoint that is no more
    if all((predictions / f"{name}{end}").is_file() for name in names for end in (".npz", ending)):
        return predictions
    shutil.rmtree(work / "images", ignore_errors=True)
    (work / "images").mkdir(parents=True)
    for case in find_prediction_cases(model.plan, images):
        for image in case.images if case.name in names else ():
            link(image, work / "images" / image.name)
    command = [*model.command(work / "images", predictions, device), "--save_probabilities", "--continue_prediction"]
    predict(command, [predictions / f"{name}{ending}" for name in names], work / "log.txt")
    return predictions


def _labelled(plan: Plan) -> list[str]:
    ending = plan.dataset_json["file_ending"]
    folder = plan.dataset.preprocessed / "gt_segmentations"
    names = sorted(file.name.removesuffix(ending) for file in folder.glob(f"*{ending}"))
    if not names:
        raise UserError(f"There are no reference segmentations in {folder}: run nnUNetv2_preprocess first.")
    return names


def _to_calibrate(plan: Plan, case: Predicted, classes: Classes, bar: tqdm) -> CalibrationCase:
    _, spacing = _read_reference(plan, case.reference)
    channels = len(classes.names) + (not classes.regions)

    def read() -> tuple[np.ndarray, np.ndarray]:
        labels, _ = _read_reference(plan, case.reference)
        try:
            with np.load(case.probabilities) as stored:
                probabilities = stored["probabilities"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{case.probabilities} cannot be read ({error}): remove it and try again.") from None
        if probabilities.shape != (channels, *labels.shape):
            raise UserError(
                f"{case.probabilities} has the shape {probabilities.shape}, but {case.reference} has {labels.shape} "
                f"and the model {channels} outputs: they are not of the same case or data set."
            )
        bar.update()
        return probabilities, labels

    return CalibrationCase(case.name, float(np.prod(spacing)), read)


def _read_reference(plan: Plan, file: Path) -> tuple[np.ndarray, Sequence[float]]:
    """Labels (z y x), and the spacing in mm."""
    with reading(file):
        labels, properties = plan.plans.image_reader_writer_class().read_seg(str(file))
    return labels[0], properties["spacing"]


def _record(model: Model, cases: Sequence[Predicted], found: Calibration, objective: str) -> dict[str, Any]:
    names = classes_of(model.plan).names
    folds = {case.name: case.fold for case in cases}
    return {
        "thresholds": dict(zip(names, found.thresholds, strict=True)),
        "shifts": dict(zip(names, found.shifts, strict=True)),
        "objective": objective,
        "dataset": model.plan.dataset.name,
        "configuration": model.plan.name,
        "plans": model.plan.plans.plans_name,
        "trainer": model.trainer,
        "folds": list(model.folds),
        "checkpoint": model.checkpoint,
        "before": {name: _means(found.volumes, name, "before") for name in names},
        "after": {name: _means(found.volumes, name, "after") for name in names},
        "cases": [asdict(row) | {"fold": folds[row.case]} for row in found.volumes],
        "versions": package_versions(RECORDED_PACKAGES),
    }


def _means(volumes: Sequence[CaseVolumes], label: str, when: str) -> dict[str, float]:
    rows = [asdict(row) for row in volumes if row.label == label]
    return {
        "absolute_difference_mm3": float(np.mean([abs(r[f"{when}_mm3"] - r["reference_mm3"]) for r in rows])),
        "dice": float(np.mean([r[f"{when}_dice"] for r in rows])),
    }


def _write_curves(curves: Mapping[str, ThresholdCurve], file: Path) -> None:
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["label", "threshold", "absolute_difference_mm3", "dice"])
        for label, curve in curves.items():
            points = zip(curve.thresholds.tolist(), curve.difference_mm3.tolist(), curve.dice.tolist(), strict=True)
            writer.writerows([label, *point] for point in points)
