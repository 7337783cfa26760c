"""The cases of an evaluation: find the files that belong together, check that they fit, and measure each case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from nnunet_vit_mae.errors import UserError, abbreviated, reading
from nnunet_vit_mae.evaluation.measures import Box, boxes_by_value, measure, union_of
from nnunet_vit_mae.evaluation.results import EvaluationOptions
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, cases_in, channel_file_name, ending_in
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.imaging.grids import on_grid, refuse_other_grid, turned_geometry
from nnunet_vit_mae.imaging.labels import Labels, read_labels, read_mask, read_segmentation, values_in
from nnunet_vit_mae.imaging.volumes import NOT_FINITE, Geometry, all_finite, read_volume, without_warnings_of_itk
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.progress import with_progress

THICKNESS_DIGITS = 4  # decimals of mm: headers in single precision turn 5 mm into 5.0000002 mm


@dataclass(frozen=True)
class EvaluationCase:
    """The files of one case."""

    name: str
    reference: Path  # reference segmentation
    predictions: Mapping[str, Path]  # by model
    image: Path | None = None  # first channel
    slice_thickness_mm: float | None = None  # as recorded; without it, the largest spacing stands in
    patient: str | None = None  # of whom there are other cases too


@dataclass(frozen=True)
class EvaluationSet:
    """The models, labels and cases of an evaluation."""

    models: tuple[str, ...]
    labels: Labels
    cases: tuple[EvaluationCase, ...]
    notes: tuple[str, ...] = ()  # sentences for the reader of the report

    def with_slice_thickness(self, known: Mapping[str, float], source: Path) -> EvaluationSet:
        """Return the set with the slice thickness in mm of the cases that `source` knows, and a note on the others."""
        cases = tuple(replace(case, slice_thickness_mm=known.get(case.name)) for case in self.cases)
        missing = [case.name for case in cases if case.slice_thickness_mm is None]
        note = f"{source.name} has no slice thickness of {abbreviated(missing)}: the largest spacing stands in."
        return replace(self, cases=cases, notes=(*self.notes, *([note] if missing else [])))

    def with_patients(self, patients: Mapping[str, str], unknown: Sequence[str], source: Path) -> EvaluationSet:
        """Return the set with the patient of each case, if several are of one, and notes.

        Cases that are `unknown` to `source`, the table of patients, count as patients of their own.
        """
        cases = tuple(replace(case, patient=patients[case.name]) for case in self.cases)
        note = f"{source.name} has no patient of {abbreviated(unknown)}: each counts as a patient of its own."
        described = replace(self, notes=(*self.notes, *([note] if unknown else [])))
        of_cases = {case.patient for case in cases}
        if len(of_cases) == len(cases):
            return described
        note = (
            f"The {len(cases)} cases are of {len(of_cases)} patients. Intervals draw patients, and tests compare the "
            "means of each patient's cases."
        )
        return replace(described, cases=cases, notes=(*described.notes, note))

    def case(self, name: str) -> EvaluationCase:
        """Return the case of that name."""
        return next(case for case in self.cases if case.name == name)


# ---------- files


def find_evaluation_set(references: Path, predictions: Mapping[str, Path], images: Path | None = None) -> EvaluationSet:
    """Find the files of each case, and the labels.

    Args:
        references: Folder of reference segmentations, `CASE.nii.gz`.
        predictions: Folder of predictions with the same names, by model.
        images: Folder of images, `CASE_0000.nii.gz`.

    Returns:
        All cases that have a reference; the notes name predictions without one.

    Raises:
        UserError: If a folder or file is missing, formats differ, or models have different labels.
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
    return EvaluationSet(tuple(predictions), labels, cases, tuple(_notes_on_surplus(names, ending, predictions)))


def described_labels(references: Path, predictions: Sequence[Path]) -> Labels | None:
    """Read the labels from a `dataset.json`: nnU-Net's beside the predictions, else the dataset's.

    Args:
        references: Folder of reference segmentations; a `dataset.json` may lie in it or in its parent.
        predictions: Folders of predictions.

    Returns:
        The labels; None without a `dataset.json`.

    Raises:
        UserError: If models have different labels, or a `dataset.json` has none.
    """
    files = [folder / DESCRIPTION for folder in predictions if (folder / DESCRIPTION).is_file()]
    by_file = {file: _foreground_labels(file) for file in files}
    for file, labels in by_file.items():
        if labels != by_file[files[0]]:
            raise UserError(
                f"{file} and {files[0]} have different labels: compare models that segment the same labels."
            )
    if files:
        return by_file[files[0]]
    for folder in (references, references.resolve().parent):
        if (folder / DESCRIPTION).is_file():
            return _foreground_labels(folder / DESCRIPTION)
    return None


def labels_in(references: Sequence[Path]) -> Labels:
    """Read all reference segmentations and name each label after its number.

    Args:
        references: Files of one folder.

    Returns:
        The labels that occur.

    Raises:
        UserError: If all references are empty, or one cannot be read.
    """
    with without_warnings_of_itk():
        masks = map(read_mask, with_progress(references, unit="case", desc="reading labels"))
        values = {value for mask in masks for value in values_in(mask)} - {0}
    if not values:
        raise UserError(
            f"All reference segmentations in {references[0].parent} are empty: check -r, or put nnU-Net's "
            f"{DESCRIPTION} there."
        )
    return Labels({str(value): (value,) for value in sorted(values)})


def _foreground_labels(file: Path) -> Labels:
    labels = read_labels(file)
    if not labels.values:
        raise UserError(f"{file} lists no label except the background: add the labels that the models segment.")
    return labels


def _case(
    name: str, ending: str, references: Path, predictions: Mapping[str, Path], images: Path | None
) -> EvaluationCase:
    files = {model: folder / f"{name}{ending}" for model, folder in predictions.items()}
    for model, file in files.items():
        if not file.is_file():
            others = [file.with_name(name + other) for other in IMAGE_ENDINGS]
            if existing := [other for other in others if other.is_file()]:
                raise UserError(
                    f"{existing[0]} has another format than the references ({ending}): convert one of them."
                )
            raise UserError(f"{model} has no prediction of the case {name}: predict it to {file}, or check -r and -p.")
    image = None if images is None else images / channel_file_name(name, 0, ending)
    if image is not None and not image.is_file():
        raise UserError(f"The case {name} has no image {image}: add it, or check -i.")
    return EvaluationCase(name, references / f"{name}{ending}", files, image)


def _notes_on_surplus(names: Sequence[str], ending: str, predictions: Mapping[str, Path]) -> Iterator[str]:
    for model, folder in predictions.items():
        if extra := sorted({*cases_in(folder, ending)} - {*names}):
            yield f"{model}: predictions without a reference are left out ({abbreviated(extra)})."


# ---------- measures


@dataclass(frozen=True)
class _MeasuredCase:
    rows: list[dict[str, Any]]  # one for each model and label
    beside: list[str]  # models whose prediction lies less than a voxel beside the reference


def measure_cases(
    evaluation_set: EvaluationSet, options: EvaluationOptions, processes: int = 1
) -> tuple[pd.DataFrame, list[str]]:
    """Measure all cases; each process holds one case in memory at a time.

    Args:
        evaluation_set: The files and labels.
        options: Tolerance of the surface Dice, and size of the smallest lesion.
        processes: Number of processes.

    Returns:
        A table with a row for each model, case and label, in this order, and notes for the reader.

    Raises:
        UserError: If a file cannot be read, does not fit the others of its case, or holds unknown labels.
    """
    measure_case = partial(_measure_case, labels=evaluation_set.labels, options=options)
    cases = evaluation_set.cases
    results = run_each(measure_case, cases, processes, initializer=use_one_torch_thread)
    by_name: dict[str, _MeasuredCase] = {}
    for case, measured in with_progress(results, total=len(cases), unit="case", desc="measuring"):
        if measured is None:
            raise UserError(
                f"There is not enough memory for the case {case.name}: use fewer processes than -np {processes}."
            )
        by_name[case.name] = measured
    in_order = [by_name[case.name] for case in cases]
    rows = [row for model in evaluation_set.models for case in in_order for row in case.rows if row["model"] == model]
    notes = []
    for model in evaluation_set.models:
        if names := [case.name for case in cases if model in by_name[case.name].beside]:
            notes.append(
                f"{model}: predictions lie up to a voxel beside their references, and are compared voxel by voxel "
                f"({abbreviated(names)})."
            )
    return pd.DataFrame(rows), notes


def use_one_torch_thread() -> None:
    """Limit this process to one thread, because there are as many processes as cores."""
    torch.set_num_threads(1)


def _measure_case(case: EvaluationCase, labels: Labels, options: EvaluationOptions) -> _MeasuredCase:
    with without_warnings_of_itk():
        reference, geometry = read_segmentation(case.reference)
        _refuse_other_labels(case.reference, reference, labels)
        thickness = _slice_thickness(case, geometry)
        rows, beside = [], []
        for model, file in case.predictions.items():
            prediction, its_geometry = read_segmentation(file)
            _refuse_other_labels(file, prediction, labels)
            prediction, its_geometry = on_grid(file, prediction, its_geometry, case.reference, geometry)
            if geometry.difference(its_geometry):
                beside.append(model)
            boxes = [boxes_by_value(array) for array in (reference, prediction)]
            for label, values in labels.values.items():
                box = _box_of(values, boxes)
                measures = measure(
                    *counted_masks(reference[box], prediction[box], values, labels.ignore),
                    geometry.spacing[::-1],
                    tolerance=options.tolerance_mm,
                    min_lesion_voxels=options.min_lesion_voxels,
                )
                key = {"model": model, "case": case.name, "label": label}
                of_patient = {} if case.patient is None else {"patient": case.patient}
                rows.append({**key, **measures, "slice_thickness_mm": thickness, **of_patient})
    return _MeasuredCase(rows, beside)


def _slice_thickness(case: EvaluationCase, geometry: Geometry) -> float:
    """Return what is recorded, else the largest spacing of the image, or of the reference if there is no image."""
    if case.image is not None:
        with reading(case.image):
            voxels, image = read_volume(case.image)
        if not all_finite(voxels, case.image):
            raise UserError(f"{case.image} {NOT_FINITE}, or give another file.")
        refuse_other_grid(case.reference, turned_geometry(geometry, image), case.image, image)
        geometry = image
    return round(case.slice_thickness_mm or max(geometry.spacing), THICKNESS_DIGITS)


def _refuse_other_labels(file: Path, array: np.ndarray, labels: Labels) -> None:
    if unknown := sorted(values_in(array) - labels.known):
        known = ", ".join(map(str, sorted(labels.known)))
        raise UserError(
            f"{file} holds the unknown label {abbreviated(map(str, unknown))}; known labels are {known}. Correct the "
            f"file, or the labels in {DESCRIPTION}."
        )


def _box_of(values: Sequence[int], boxes: Sequence[Mapping[int, Box]]) -> Box:
    """Return the box around some labels in all of several segmentations."""
    if min(values) <= 0:  # only positive labels have boxes
        return (slice(None),) * 3
    return union_of(found[value] for found in boxes for value in values if value in found)


def counted_masks(
    reference: np.ndarray, prediction: np.ndarray, values: Sequence[int], ignore: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return where two segmentations hold some labels, except where the reference says that voxels do not count.

    Args:
        reference: Labels, of any shape.
        prediction: Labels of the same shape.
        values: The labels to find.
        ignore: The label of the reference whose voxels do not count; None if it has none.

    Returns:
        Boolean masks of the reference and of the prediction.
    """
    counted = np.True_ if ignore is None else reference != ignore
    first, second = (
        np.logical_or.reduce([array == value for value in values]) & counted for array in (reference, prediction)
    )
    return first, second
