"""The cases that a model is calibrated on: which ones it may be, and nnU-Net's probabilities of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_vit_mae.datasets.split.files import SPLIT_RECORD, SPLITS, read_split_record
from nnunet_vit_mae.datasets.split.patients import patient_of, recorded_patients
from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, cases_in
from nnunet_vit_mae.nnunet.folds import reference_segmentations, split_of, training_names
from nnunet_vit_mae.nnunet.models import Model, is_imported, model_hash, refuse_damaged_weights
from nnunet_vit_mae.nnunet.prediction import (
    find_prediction_cases,
    find_reference,
    predict_cases,
    refuse_turned_reference,
    remove_outdated,
)
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import file_hash, inside, write_json
from nnunet_vit_mae.storage.layout import CHECKPOINT_NOTE, FINAL, VALIDATION

logger = logging.getLogger(__name__)

NOTE = "predicted.json"  # in the folder of predictions


@dataclass(frozen=True)
class PredictedCase:
    """A case with nnU-Net's probabilities (`.npz`) and its reference segmentation."""

    name: str
    fold: str | None  # of which it is a validation case; None in a development set
    probabilities: Path
    reference: Path


def calibration_folder(model: Model, fold: str | None) -> Path:
    """Return the folder in a model's for predictions that nnU-Net has not saved, by one fold or by all together."""
    return model.folder / ("calibration" if fold is None else f"calibration_fold_{fold}")


def validation_cases(model: Model, device: str) -> list[PredictedCase]:
    """Return the validation cases of the model's folds; folds without probabilities are predicted first.

    Raises `UserError` for fold `all`, which has no validation cases, for a model whose cases are at another site, and
    if files are missing.
    """
    if _cases_are_elsewhere(model):
        raise UserError("The validation cases of the model are at another site: give cases of this one with -i and -l.")
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
    if plan.file_ending in IMAGE_ENDINGS:
        for case in cases:
            refuse_turned_reference(case, find_reference(plan, case.name, references))

    def among(cases: Iterable[str]) -> list[str]:
        of_patients = {patient_of(case, patients) for case in cases}
        return sorted(name for name in names if patient_of(name, patients) in of_patients)

    if held_out := among(read_split_record(preprocessed).test):
        raise UserError(
            f"{len(held_out)} of the {len(names)} cases ({abbreviated(held_out)}) are of patients that "
            f"{preprocessed / SPLIT_RECORD} holds out for testing, and a test needs cases that no threshold was fitted "
            "to: leave them out."
        )
    if _cases_are_elsewhere(model):
        logger.warning("The cases that the model was trained on are at another site: use none of these patients.")
    elif not allow_training_cases:
        labelled = [*reference_segmentations(plan)]
        if among(labelled) and (trained_on := among(_trained_on(model, labelled))):
            raise UserError(
                f"The model was trained on {len(trained_on)} of the {len(names)} cases, or on other scans of their "
                f"patients ({abbreviated(trained_on)}), whose probabilities say nothing about new scans: leave them "
                "out, or add --allow_training_cases."
            )
    return _predicted_cases(model, images, references, names, device)


def _trained_on(model: Model, labelled: list[str]) -> list[str]:
    """Return the labelled cases that a model was trained on. Raises `UserError` if its split has changed since."""
    for fold in model.folds:
        if fold != "all":
            _refuse_other_split(model, fold, split_of(model.plan, fold, labelled)["val"])
    return [name for fold in model.folds for name in training_names(model.plan, fold, labelled)]


def _cases_are_elsewhere(model: Model) -> bool:
    """Return whether the model was imported without its dataset."""
    return is_imported(model) and not cases_in(model.plan.dataset.references, model.plan.file_ending)


def _predicted_cases(
    model: Model, images: Path, references: Path, names: Sequence[str], device: str
) -> list[PredictedCase]:
    references_of = {name: find_reference(model.plan, name, references) for name in names}
    predictions = _predict(model, images, names, calibration_folder(model, None), device)
    return [PredictedCase(name, None, predictions / f"{name}.npz", file) for name, file in references_of.items()]


def _validation_cases_of(model: Model, fold: str, device: str) -> list[PredictedCase]:
    plan, fold_folder = model.plan, model.folder / f"fold_{fold}"
    names = split_of(plan, fold, list(reference_segmentations(plan)))["val"]
    _refuse_other_split(model, fold, names)
    references_of = {name: find_reference(plan, name, plan.dataset.references) for name in names}
    probabilities = fold_folder / VALIDATION  # where nnUNetv2_train --npz saves them
    are_saved = model.checkpoint == FINAL and _is_of_final(probabilities / CHECKPOINT_NOTE, fold_folder / FINAL)
    if not are_saved or not _complete(probabilities, names, fold_folder / model.checkpoint):
        own, work = replace(model, folds=(fold,)), calibration_folder(model, fold)
        probabilities = _predict(own, plan.dataset.raw / "imagesTr", names, work, device)
    return [
        PredictedCase(name, fold, inside(probabilities, f"{name}.npz", source=SPLITS), references_of[name])
        for name in names
    ]


def _is_of_final(note: Path, final: Path) -> bool:
    """Return whether a validation was that of the final checkpoint, as far as it has a note.

    With --val_best it is that of the best one, and an earlier final checkpoint may have been put back.
    """
    validated = read_entries(dict[str, str], note, "remove it") if note.is_file() else {"checkpoint": FINAL}
    return validated.get("checkpoint") == FINAL and validated.get("sha256") in (None, file_hash(final))


def _refuse_other_split(model: Model, fold: str, validation: Collection[str]) -> None:
    """Raise `UserError` if nnU-Net validated the fold on other cases than today's splits say.

    A fold whose validation was stopped has only some of them, and one that came from elsewhere none.
    """
    folder = model.folder / f"fold_{fold}" / VALIDATION
    found, expected = {*cases_in(folder, model.plan.file_ending)}, {*validation}
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


def _predict(model: Model, images: Path, names: Sequence[str], work: Path, device: str) -> Path:
    """Predict cases with probabilities in the folder `work`, from where an earlier call was stopped; returns where.

    A note says which checkpoints and images the predictions are of; those of others are removed.
    """
    cases = find_prediction_cases(model.plan, images)
    refuse_damaged_weights(model)  # before anything is written
    predictions, note, ending = work / "predictions", work / NOTE, model.plan.file_ending
    made_of = {"model": model_hash(model), "images": str(images)}
    of_others = not note.is_file() or read_entries(dict[str, str], note, "remove it") != made_of
    for file in [*predictions.glob("*.npz"), *predictions.glob(f"*{ending}")]:
        if of_others or file.name.removesuffix(".npz").removesuffix(ending) not in names:
            file.unlink()  # one that cannot be removed must not be taken for one of this model
    if of_others:
        write_json(made_of, note)
    remove_outdated(model.plan, cases, predictions)
    places = {"links": work / "images", "log": work / "log.txt"}
    predict_cases(model, images, names, predictions, **places, device=device, probabilities=True)
    return predictions
