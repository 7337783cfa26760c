"""The cases of an evaluation: which files belong together, whether they fit, and the measures of each, one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from nnunet_vit_mae.errors import UserError, abbreviated, reading
from nnunet_vit_mae.evaluation.measures import measure
from nnunet_vit_mae.evaluation.results import Options
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, cases_in, channel_file_name, ending_in
from nnunet_vit_mae.imaging.labels import Labels, read_labels, read_volume, whole_numbers
from nnunet_vit_mae.imaging.volumes import Geometry, read_geometry, without_warnings_of_itk
from nnunet_vit_mae.workers import run_each

DATASET_JSON = "dataset.json"
THICKNESS_DIGITS = 4  # of mm: headers hold single precision, and 5.0000002 mm is 5 mm


@dataclass(frozen=True)
class EvaluationCase:
    """A reference, its prediction by each model, and the first channel of its image when images are given."""

    name: str
    reference: Path
    predictions: Mapping[str, Path]
    image: Path | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """All that is evaluated."""

    models: tuple[str, ...]
    labels: Labels
    cases: tuple[EvaluationCase, ...]
    notes: tuple[str, ...] = ()


# ---------- which files


def find_evaluation_set(references: Path, predictions: Mapping[str, Path], images: Path | None = None) -> EvaluationSet:
    """Find what belongs together; predictions are folders by name of the model.

    Raises `UserError` for folders or files that are missing, of different formats, or described differently.
    """
    ending = ending_in(references, "-r")
    for folder in predictions.values():
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: check -p.")
    if images is not None and not images.is_dir():
        raise UserError(f"{images} is not a folder: check -i.")
    names = list(cases_in(references, ending))
    cases = tuple(_case(name, ending, references, predictions, images) for name in names)
    labels = described_labels(references, list(predictions.values()))
    if labels is None:
        labels = labels_in([case.reference for case in cases])
    return EvaluationSet(tuple(predictions), labels, cases, tuple(_surplus(names, ending, predictions)))


def described_labels(references: Path, predictions: Sequence[Path]) -> Labels | None:
    """Labels from the `dataset.json` that nnU-Net puts beside predictions, or that of the data set; None without any.

    Raises `UserError` when models were trained for different labels.
    """
    files = [folder / DATASET_JSON for folder in predictions if (folder / DATASET_JSON).is_file()]
    found = [_foreground(file) for file in files]
    for file, labels in zip(files, found, strict=True):
        if labels != found[0]:
            raise UserError(f"{file} and {files[0]} have different labels: compare models that segment the same.")
    if found:
        return found[0]
    for folder in (references, references.resolve().parent):
        if (folder / DATASET_JSON).is_file():
            return _foreground(folder / DATASET_JSON)
    return None


def labels_in(references: Sequence[Path]) -> Labels:
    """The values that occur in the references, as labels named after their numbers; reads all of them.

    Raises `UserError` when there is nothing but background.
    """
    with without_warnings_of_itk():
        values = {
            int(value) for file in tqdm(references, unit="case", desc="labels") for value in np.unique(read_mask(file))
        }
    values -= {0}
    if not values:
        raise UserError(
            f"All references in {references[0].parent} are empty: check -r, or put nnU-Net's {DATASET_JSON} there."
        )
    return Labels({str(value): (value,) for value in sorted(values)})


def _foreground(file: Path) -> Labels:
    labels = read_labels(file)
    if not labels.values:
        raise UserError(f"{file} names no label besides the background.")
    return labels


def _case(
    name: str, ending: str, references: Path, predictions: Mapping[str, Path], images: Path | None
) -> EvaluationCase:
    files = {model: folder / f"{name}{ending}" for model, folder in predictions.items()}
    for model, file in files.items():
        if not file.is_file():
            other = [file.with_name(name + wrong) for wrong in IMAGE_ENDINGS if file.with_name(name + wrong).is_file()]
            if other:
                raise UserError(f"{other[0]} has another format than the references ({ending}): convert one of them.")
            raise UserError(f"{model} has no prediction of the case {name}: predict it to {file}, or check -r and -p.")
    image = None if images is None else images / channel_file_name(name, 0, ending)
    if image is not None and not image.is_file():
        raise UserError(f"The case {name} has no image {image}: add it, or check -i.")
    return EvaluationCase(name, references / f"{name}{ending}", files, image)


def _surplus(names: Sequence[str], ending: str, predictions: Mapping[str, Path]) -> Iterator[str]:
    for model, folder in predictions.items():
        if extra := sorted({*cases_in(folder, ending)} - {*names}):
            yield f"{model}: predictions without a reference are left out ({abbreviated(extra)})."


# ---------- what is in them


@dataclass(frozen=True)
class _Measured:
    """Rows of one case, and what differs between its files that does not stop an evaluation."""

    rows: list[dict[str, Any]]
    elsewhere: list[str]  # models whose prediction has another origin or direction


def measure_cases(study: EvaluationSet, options: Options, processes: int = 1) -> tuple[pd.DataFrame, list[str]]:
    """A row for each model, case and label, in this order, and notes; one case at a time is in memory per process.

    Raises `UserError` for files that cannot be read, do not fit each other, or hold other labels.
    """
    measure_case = partial(_measure_case, labels=study.labels, options=options)
    jobs = run_each(measure_case, study.cases, processes, initializer=use_one_torch_thread)
    measured = {}
    for case, found in tqdm(jobs, total=len(study.cases), unit="case", desc="measuring"):
        if found is None:
            raise UserError(f"The case {case.name} needs more memory than there is: give fewer than -np {processes}.")
        measured[case.name] = found
    done = [measured[case.name] for case in study.cases]
    rows = [row for model in study.models for found in done for row in found.rows if row["model"] == model]
    notes = []
    for model in study.models:
        if cases := [case.name for case in study.cases if model in measured[case.name].elsewhere]:
            notes.append(
                f"{model}: predictions have another origin or direction than their references, but are compared voxel "
                f"by voxel, as nnU-Net does ({abbreviated(cases)})."
            )
    return pd.DataFrame(rows), notes


def use_one_torch_thread() -> None:
    """There are as many processes as cores."""
    torch.set_num_threads(1)


def read_mask(file: Path) -> np.ndarray:
    """Labels of a file, z y x; raises `UserError` when it cannot be read, is cut off or holds other than integers."""
    return _read(file)[0]


def _read(file: Path) -> tuple[np.ndarray, Geometry]:
    with reading(file):
        array, geometry = read_volume(file)
    if not whole_numbers(array):
        raise UserError(f"{file} holds numbers that are not integers: give segmentations, not probabilities.")
    return array.astype(np.int32) if array.dtype.kind == "f" else array, geometry


def _measure_case(case: EvaluationCase, labels: Labels, options: Options) -> _Measured:
    with without_warnings_of_itk():
        reference, geometry = _read(case.reference)
        _refuse_other_labels(case.reference, reference, labels)
        thickness = _slice_thickness(case, geometry)
        counted = np.True_ if labels.ignore is None else reference != labels.ignore
        rows, elsewhere = [], []
        for model, file in case.predictions.items():
            prediction, other = _read(file)
            _refuse_other_labels(file, prediction, labels)
            _refuse_other_grid(file, other, case.reference, geometry)
            if geometry.difference(other):
                elsewhere.append(model)
            for label, values in labels.values.items():
                found = measure(
                    _mask(reference, values) & counted,
                    _mask(prediction, values) & counted,
                    geometry.spacing[::-1],
                    tolerance=options.tolerance_mm,
                    min_lesion_voxels=options.min_lesion_voxels,
                )
                key = {"model": model, "case": case.name, "label": label}
                rows.append({**key, **found, "slice_thickness_mm": thickness})
    return _Measured(rows, elsewhere)


def _slice_thickness(case: EvaluationCase, geometry: Geometry) -> float:
    """The largest spacing of the image, or of the reference without one."""
    if case.image is not None:
        with reading(case.image):
            image = read_geometry(case.image)
        _refuse_other_grid(case.reference, geometry, case.image, image)
        geometry = image
    return round(max(geometry.spacing), THICKNESS_DIGITS)


def _refuse_other_grid(file: Path, geometry: Geometry, other_file: Path, other: Geometry) -> None:
    """Size and spacing have to be the same; voxels cannot be compared otherwise."""
    difference = geometry.difference(other)
    if difference and difference.startswith(("size", "spacing")):
        raise UserError(f"{file} does not fit {other_file}: they differ in {difference}; resample one to the other.")


def _refuse_other_labels(file: Path, array: np.ndarray, labels: Labels) -> None:
    unknown = np.unique(array[~np.isin(array, list(labels.known))])
    if len(unknown):
        known = ", ".join(map(str, sorted(labels.known)))
        raise UserError(
            f"{file} holds the label {abbreviated(map(str, unknown))}, but only {known} are known: "
            f"correct the file, or the labels in {DATASET_JSON}."
        )


def _mask(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    return np.logical_or.reduce([array == value for value in values])
