"""Thresholds for a trained model of nnU-Net, written into its checkpoints (ViTiac, section 3.1), and a temperature.

A shift of the bias in front of the softmax (or sigmoids) acts as a threshold on the probability. It still does after
everything else that nnU-Net does: mirroring, blending of windows, averaging of folds, linear resampling. A calibrated
model is therefore an ordinary checkpoint, with which nnU-Net's own command predicts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes
from nnunet_vit_mae.calibration.record import CALIBRATION_RECORD
from nnunet_vit_mae.calibration.temperature import (
    Reliability,
    VoxelSample,
    fit_temperature,
    negative_log_likelihood,
    reliability_of,
    sample_voxels,
)
from nnunet_vit_mae.calibration.thresholds import Calibration, CaseVolumes, ThresholdCurve, fit_thresholds
from nnunet_vit_mae.datasets.split.files import SPLIT_RECORD, SPLITS, read_split_record
from nnunet_vit_mae.datasets.split.patients import patient_of, recorded_patients
from nnunet_vit_mae.errors import UserError, abbreviated, reading
from nnunet_vit_mae.evaluation.calibration_figures import agreement_figure, curve_figure, reliability_figure
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, cases_in
from nnunet_vit_mae.imaging.labels import as_labels
from nnunet_vit_mae.imaging.volumes import read_geometry, refuse_large, without_warnings_of_itk
from nnunet_vit_mae.nnunet.calibrated import record_folder, write_calibrated
from nnunet_vit_mae.nnunet.folds import reference_segmentations, split_of, training_names
from nnunet_vit_mae.nnunet.models import Model, model_hash, refuse_damaged_weights
from nnunet_vit_mae.nnunet.plans import Plan, classes_of
from nnunet_vit_mae.nnunet.prediction import (
    PredictionCase,
    find_prediction_cases,
    find_reference,
    open_probabilities,
    predict_cases,
    remove_outdated,
)
from nnunet_vit_mae.plots import save_figure
from nnunet_vit_mae.storage.csv_tables import write_rows
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import inside, write_json
from nnunet_vit_mae.storage.layout import CHECKPOINT_NOTE, FINAL, VALIDATION
from nnunet_vit_mae.storage.stored_rows import StoredRows
from nnunet_vit_mae.weights import file_hash, package_versions

NOTE = "predicted.json"  # in the folder of predictions
FOLDER = "calibration"  # in the model's folder, for probabilities that nnU-Net has not saved
RECORDED_PACKAGES = ("nnunet-vit-mae", "nnunetv2", "torch", "numpy")


@dataclass(frozen=True)
class PredictedCase:
    """A case with nnU-Net's probabilities (`.npz`) and its reference segmentation."""

    name: str
    fold: str | None  # of which it is a validation case; None in a development set
    probabilities: Path
    reference: Path


@dataclass(frozen=True)
class FittedModel:
    """What was fitted to the cases of a calibration, and how reliable the probabilities are before and after it."""

    calibration: Calibration
    temperature: float  # 1 unless it was asked for
    likelihood: dict[str, float]  # mean negative log likelihood of a voxel, `before` and `after` the temperature
    reliability: dict[str, dict[str, Reliability]]  # by class; `before` and `after`


def validation_cases(model: Model, device: str) -> list[PredictedCase]:
    """Return the validation cases of the model's folds; folds without probabilities are predicted first.

    Raises `UserError` for fold `all`, which has no validation cases, and if files are missing.
    """
    if "all" in model.folds:
        raise UserError(
            "-f all was trained on every labelled case: give other cases with -i and -l, or add --allow_training_cases."
        )
    return [case for fold in model.folds for case in _validation_cases_of(model, fold, device)]


def training_cases(model: Model, device: str) -> list[PredictedCase]:
    """Return all labelled cases but those held out for testing, whatever the model was trained on.

    This is what `--allow_training_cases` asks for. Raises `UserError` if files are missing.
    """
    dataset = model.plan.dataset
    held_out = set(read_split_record(dataset.preprocessed).test)
    images = dataset.raw / "imagesTr"
    names = [case.name for case in find_prediction_cases(model.plan, images) if case.name not in held_out]
    return _predicted_cases(model, images, dataset.raw / "labelsTr", names, device)


def development_cases(
    model: Model, images: Path, references: Path, device: str, *, allow_training_cases: bool
) -> list[PredictedCase]:
    """Return the cases of a development set, predicted by all folds together.

    Raises `UserError` for cases of patients that the model was trained on or that are held out for testing, and if
    files are missing.
    """
    plan, preprocessed = model.plan, model.plan.dataset.preprocessed
    cases, patients = find_prediction_cases(plan, images), recorded_patients(preprocessed)
    names = [case.name for case in cases]
    if plan.dataset_json["file_ending"] in IMAGE_ENDINGS:
        _refuse_turned_references(plan, cases, references)

    def among(cases: Iterable[str]) -> list[str]:
        of_patients = {patient_of(case, patients) for case in cases}
        return sorted(name for name in names if patient_of(name, patients) in of_patients)

    if held_out := among(read_split_record(preprocessed).test):
        raise UserError(
            f"{len(held_out)} of the {len(names)} cases ({abbreviated(held_out)}) are of patients that "
            f"{preprocessed / SPLIT_RECORD} holds out for testing, and a test needs cases that no threshold was fitted "
            "to: leave them out."
        )
    labelled = list(reference_segmentations(plan))
    if allow_training_cases or not among(labelled):
        return _predicted_cases(model, images, references, names, device)
    for fold in model.folds:
        if fold != "all":
            _refuse_other_split(model, fold, split_of(plan, fold, labelled)["val"])
    if trained_on := among(name for fold in model.folds for name in training_names(plan, fold, labelled)):
        raise UserError(
            f"The model was trained on {len(trained_on)} of the {len(names)} cases, or on other scans of their "
            f"patients ({abbreviated(trained_on)}), whose probabilities say nothing about new scans: leave them out, "
            "or add --allow_training_cases."
        )
    return _predicted_cases(model, images, references, names, device)


def _predicted_cases(
    model: Model, images: Path, references: Path, names: Sequence[str], device: str
) -> list[PredictedCase]:
    references_of = {name: find_reference(model.plan, name, references) for name in names}
    predictions = _predict(model, images, names, FOLDER, device)
    return [PredictedCase(name, None, predictions / f"{name}.npz", file) for name, file in references_of.items()]


def _refuse_turned_references(plan: Plan, cases: Iterable[PredictionCase], references: Path) -> None:
    """Raise `UserError` if a reference has other voxels than its image, for example the same along another axis.

    The origin does not matter, as voxels are compared by their numbers; some tools do not keep it.
    """
    for case in cases:
        image, reference = case.images[0], find_reference(plan, case.name, references)
        with reading(f"The case {case.name}"), without_warnings_of_itk():
            expected, found = read_geometry(image), read_geometry(reference)
        if difference := expected.difference(replace(found, origin=expected.origin)):
            raise UserError(
                f"{image} and {reference} differ in {difference}: resample the reference to the image, or correct the "
                "header that is wrong."
            )


def fit(model: Model, cases: Sequence[PredictedCase], objective: str, *, temperature: bool = False) -> FittedModel:
    """Find the shifts with the smallest loss on these cases, and the best temperature if asked for.

    Raises `UserError` for files that cannot be read.
    """
    classes = classes_of(model.plan)
    readable = [
        calibration_case(
            model.plan,
            case.name,
            case.reference,
            cache(partial(open_probabilities, case.probabilities, classes.outputs)),
            source=case.probabilities,
        )
        for case in cases
    ]
    sample = sample_voxels(readable, classes)
    best = fit_temperature(sample, regions=classes.regions) if temperature else 1.0
    calibration = fit_thresholds(readable, classes, objective).at_temperature(best)
    return FittedModel(calibration, best, *_reliabilities(sample, classes, best))


def write(model: Model, cases: Sequence[PredictedCase], fitted: FittedModel, objective: str) -> list[Path]:
    """Write a calibrated checkpoint for each fold, the record, and curves and Bland-Altman plots.

    All but the checkpoints of several folds lies in the folder that `record_folder` names. Raises `UserError` if the
    head of the network cannot be found.
    """
    classes, folder, calibration = classes_of(model.plan), record_folder(model), fitted.calibration
    shifts = calibration.shifts if classes.regions else (0.0, *calibration.shifts)
    checkpoints = [write_calibrated(file, shifts, fitted.temperature) for file in model.files]
    curves = dict(zip(classes.names, calibration.curves, strict=True))
    figures = {
        folder / "calibration_curve.png": curve_figure(curves, calibration.thresholds),
        folder / "calibration_reliability.png": reliability_figure(fitted.reliability, fitted.temperature),
    }
    for label in classes.names:
        ending = f"_{label}" if len(classes.names) > 1 else ""
        figures[folder / f"calibration_bland_altman{ending}.png"] = agreement_figure(calibration.volumes, label)
    for file, figure in figures.items():
        save_figure(figure, file)
    _write_curves(curves, folder / "calibration_curve.csv")
    hashes = {"checkpoints": {file.relative_to(model.folder).as_posix(): file_hash(file) for file in checkpoints}}
    sources = {"made_from": {file.relative_to(model.folder).as_posix(): file_hash(file) for file in model.files}}
    record = _record(model, cases, fitted, objective) | hashes | sources
    write_json(record, folder / CALIBRATION_RECORD)
    return [*checkpoints, folder / CALIBRATION_RECORD, folder / "calibration_curve.csv", *figures]


def threshold_table(fitted: FittedModel) -> str:
    """Return the threshold of each class, means before and after, and calibration errors, as text."""
    calibration = fitted.calibration
    lines = [f"{'class':20}  {'threshold':>9}  {'mm3 before':>12}  {'after':>12}  {'Dice before':>11}  {'after':>6}"]
    labels = list(dict.fromkeys(row.label for row in calibration.volumes))
    for label, threshold in zip(labels, calibration.thresholds, strict=True):
        before, after = (_means(calibration.volumes, label, when) for when in ("before", "after"))
        volumes = [f"{means['absolute_difference_mm3']:12.1f}" for means in (before, after)]
        dice = f"{before['dice']:11.3f}  {after['dice']:6.3f}"
        lines.append(f"{label:20}  {threshold:9.4g}  {'  '.join(volumes)}  {dice}")
    lines.append("mm3: mean absolute volume difference. All means are over the cases that the threshold was fitted to.")
    for label, errors in _calibration_errors(fitted).items():
        before, after = ("-" if error is None else f"{error:.4f}" for error in errors.values())
        tempered = f", {after} at the temperature {fitted.temperature:.3g}" if fitted.temperature != 1 else ""
        lines.append(f"{label}: expected calibration error {before}{tempered}.")
    return "\n".join(lines)


def _validation_cases_of(model: Model, fold: str, device: str) -> list[PredictedCase]:
    plan, fold_folder = model.plan, model.folder / f"fold_{fold}"
    names = split_of(plan, fold, list(reference_segmentations(plan)))["val"]
    _refuse_other_split(model, fold, names)
    references_of = {name: find_reference(plan, name, plan.dataset.references) for name in names}
    probabilities = fold_folder / VALIDATION  # where nnUNetv2_train --npz saves them
    note = probabilities / CHECKPOINT_NOTE  # with --val_best, they are those of the best checkpoint
    validated = read_entries(dict[str, str], note, "remove it")["checkpoint"] if note.is_file() else FINAL
    are_saved = model.checkpoint == FINAL == validated
    if not are_saved or not _complete(probabilities, names, fold_folder / model.checkpoint):
        model = replace(model, folds=(fold,))
        probabilities = _predict(model, plan.dataset.raw / "imagesTr", names, f"{FOLDER}_fold_{fold}", device)
    return [
        PredictedCase(name, fold, inside(probabilities, f"{name}.npz", source=SPLITS), references_of[name])
        for name in names
    ]


def _refuse_other_split(model: Model, fold: str, validation: Collection[str]) -> None:
    """Raise `UserError` if nnU-Net validated the fold on other cases than today's splits say.

    A fold whose validation was stopped has only some of them, and one that came from elsewhere none.
    """
    folder = model.folder / f"fold_{fold}" / VALIDATION
    found, expected = {*cases_in(folder, model.plan.dataset_json["file_ending"])}, {*validation}
    finished = (folder / "summary.json").is_file()
    if others := found ^ expected if finished else found - expected:
        raise UserError(
            f"{model.plan.dataset.preprocessed / SPLITS} is not the split that {model.folder / f'fold_{fold}'} was "
            f"validated with: their cases differ ({abbreviated(sorted(others))}). Put that split back, or, if the "
            f"model was trained with this one, remove {folder} and run nnUNetv2_train with --val."
        )


def _complete(folder: Path, names: Sequence[str], checkpoint: Path) -> bool:
    """Return whether there are probabilities of all cases, none of them older than the checkpoint."""
    files = [folder / f"{name}.npz" for name in names]
    return all(file.is_file() and file.stat().st_mtime >= checkpoint.stat().st_mtime for file in files)


def _predict(model: Model, images: Path, names: Sequence[str], folder: str, device: str) -> Path:
    """Predict cases with probabilities, continuing where an earlier call was stopped; returns the folder.

    A note says which checkpoints and images the predictions are of; those of others are removed.
    """
    cases = find_prediction_cases(model.plan, images)
    refuse_damaged_weights(model)  # before anything is written
    work, ending = model.folder / folder, model.plan.dataset_json["file_ending"]
    predictions, note = work / "predictions", work / NOTE
    made_of = {"model": model_hash(model), "images": str(images)}
    if not note.is_file() or read_entries(dict[str, str], note, "remove it") != made_of:
        shutil.rmtree(predictions, ignore_errors=True)
        write_json(made_of, note)
    for file in [*predictions.glob("*.npz"), *predictions.glob(f"*{ending}")]:
        if file.name.removesuffix(".npz").removesuffix(ending) not in names:
            file.unlink()
    remove_outdated(model.plan, cases, predictions)
    places = {"links": work / "images", "log": work / "log.txt"}
    predict_cases(model, images, names, predictions, **places, device=device, probabilities=True)
    return predictions


def calibration_case(
    plan: Plan, name: str, reference: Path, probabilities: Callable[[], np.ndarray | StoredRows], source: Path
) -> CalibrationCase:
    """Return a case whose probabilities (channels z y x) come from a function; `source` is named in messages.

    Raises `UserError` if the reference cannot be read, and on reading the case if it has another shape.
    """
    _, spacing = _read_reference(plan, reference)

    def read() -> tuple[np.ndarray | StoredRows, np.ndarray]:
        labels, _ = _read_reference(plan, reference)
        found = probabilities()
        if found.shape[1:] != labels.shape:
            raise UserError(
                f"{source} has {found.shape[1:]} voxels, but {reference} has {labels.shape}: "
                "they do not belong to the same case."
            )
        return found, labels

    return CalibrationCase(name, float(np.prod(spacing)), read)


def _read_reference(plan: Plan, file: Path) -> tuple[np.ndarray, Sequence[float]]:
    """Return the labels (z y x) and the spacing in mm."""
    refuse_large([file])
    with reading(file):
        labels, properties = plan.plans.image_reader_writer_class().read_seg(str(file))
        return as_labels(labels[0], file), properties["spacing"]


def _reliabilities(
    sample: VoxelSample, classes: Classes, temperature: float
) -> tuple[dict[str, float], dict[str, dict[str, Reliability]]]:
    """Return likelihood, and reliability by class, before and after a temperature."""
    temperatures, regions = {"before": 1.0, "after": temperature}, classes.regions
    likelihood = {when: negative_log_likelihood(sample, value, regions=regions) for when, value in temperatures.items()}
    by_class = {
        name: {when: reliability_of(sample, value, index, regions=regions) for when, value in temperatures.items()}
        for index, name in enumerate(classes.names)
    }
    return likelihood, by_class


def _record(model: Model, cases: Sequence[PredictedCase], fitted: FittedModel, objective: str) -> dict[str, Any]:
    names, calibration = classes_of(model.plan).names, fitted.calibration
    folds = {case.name: case.fold for case in cases}
    return {
        "thresholds": dict(zip(names, calibration.thresholds, strict=True)),
        "shifts": dict(zip(names, calibration.shifts, strict=True)),
        "temperature": fitted.temperature,
        "calibration_error": _calibration_errors(fitted),
        "negative_log_likelihood": fitted.likelihood,
        "objective": objective,
        "dataset": model.plan.dataset.name,
        "configuration": model.plan.name,
        "plans": model.plan.plans.plans_name,
        "trainer": model.trainer,
        "folds": list(model.folds),
        "checkpoint": model.checkpoint,
        "before": {name: _means(calibration.volumes, name, "before") for name in names},
        "after": {name: _means(calibration.volumes, name, "after") for name in names},
        "cases": [asdict(row) | {"fold": folds[row.case]} for row in calibration.volumes],
        "versions": package_versions(RECORDED_PACKAGES),
    }


def _calibration_errors(fitted: FittedModel) -> dict[str, dict[str, float | None]]:
    """Return the expected calibration error of each class before and after the temperature; None without voxels."""
    return {
        name: {when: curve.expected_error if len(curve.voxels) else None for when, curve in curves.items()}
        for name, curves in fitted.reliability.items()
    }


def _means(volumes: Sequence[CaseVolumes], label: str, when: str) -> dict[str, float]:
    rows = [asdict(row) for row in volumes if row.label == label]
    return {
        "absolute_difference_mm3": float(np.mean([abs(r[f"{when}_mm3"] - r["reference_mm3"]) for r in rows])),
        "dice": float(np.mean([r[f"{when}_dice"] for r in rows])),
    }


def _write_curves(curves: Mapping[str, ThresholdCurve], file: Path) -> None:
    rows = [
        (label, *point)
        for label, curve in curves.items()
        for point in zip(curve.thresholds.tolist(), curve.difference_mm3.tolist(), curve.dice.tolist(), strict=True)
    ]
    write_rows(("label", "threshold", "absolute_difference_mm3", "dice"), rows, file)
