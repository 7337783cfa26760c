"""The cases of an evaluation: which files belong together, whether they fit, and the measures of each, one by one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from tqdm import tqdm

from nnunet_vit_mae.datasets.contrasts import ENDINGS
from nnunet_vit_mae.datasets.volumes import Geometry, read_geometry, without_warnings_of_itk
from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.evaluation.measures import measure
from nnunet_vit_mae.evaluation.results import Options
from nnunet_vit_mae.files import read_json

T = TypeVar("T")
DESCRIPTION = "dataset.json"
FEW = 5  # names that a sentence lists
THICKNESS_DIGITS = 4  # of mm: headers hold single precision, and 5.0000002 mm is 5 mm


@dataclass(frozen=True)
class Labels:
    """Label values by name, several for a region; `ignore` marks voxels that count nowhere."""

    values: Mapping[str, tuple[int, ...]]
    ignore: int | None = None


@dataclass(frozen=True)
class Case:
    """A reference, its prediction by each model, and the first channel of its image when images are given."""

    name: str
    reference: Path
    predictions: Mapping[str, Path]
    image: Path | None = None


@dataclass(frozen=True)
class Study:
    """All that is evaluated."""

    models: tuple[str, ...]
    labels: Labels
    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


# ---------- which files


def find_study(references: Path, predictions: Mapping[str, Path], images: Path | None = None) -> Study:
    """Find what belongs together; predictions are folders by name of the model.

    Raises `UserError` for folders or files that are missing, of different formats, or described differently.
    """
    for flag, folder in [("-r", references), *(("-p", folder) for folder in predictions.values())]:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: check {flag}.")
    if images is not None and not images.is_dir():
        raise UserError(f"{images} is not a folder: check -i.")
    ending = _ending(references)
    names = sorted(file.name.removesuffix(ending) for file in _files(references) if file.name.endswith(ending))
    cases = tuple(_case(name, ending, references, predictions, images) for name in names)
    labels = read_labels(references, list(predictions.values()))
    if labels is None:
        labels = labels_in([case.reference for case in cases])
    return Study(tuple(predictions), labels, cases, tuple(_surplus(names, ending, predictions)))


def read_labels(references: Path, predictions: Sequence[Path]) -> Labels | None:
    """Labels from the `dataset.json` that nnU-Net puts beside predictions, or that of the data set; None without any.

    Raises `UserError` when models were trained for different labels.
    """
    files = [folder / DESCRIPTION for folder in predictions if (folder / DESCRIPTION).is_file()]
    found = [_labels_of(file) for file in files]
    for file, labels in zip(files, found, strict=True):
        if labels != found[0]:
            raise UserError(f"{file} and {files[0]} have different labels: compare models that segment the same.")
    if found:
        return found[0]
    for folder in (references, references.resolve().parent):
        if (folder / DESCRIPTION).is_file():
            return _labels_of(folder / DESCRIPTION)
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
            f"All references in {references[0].parent} are empty: check -r, or put nnU-Net's {DESCRIPTION} there."
        )
    return Labels({str(value): (value,) for value in sorted(values)})


def _labels_of(file: Path) -> Labels:
    """The labels and regions of a `dataset.json`, without the background."""
    description = read_json(file)
    labels: Any = description.get("labels") if isinstance(description, dict) else None
    try:
        values = {str(name): tuple(int(number) for number in np.atleast_1d(value)) for name, value in labels.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f'{file} has no labels as nnU-Net writes them, such as "labels": {{"tumour": 1}}.') from None
    ignore = values.pop("ignore", None)
    foreground = {name: numbers for name, numbers in values.items() if set(numbers) != {0}}
    if not foreground:
        raise UserError(f"{file} names no label besides the background.")
    return Labels(foreground, None if ignore is None else ignore[0])


def _ending(references: Path) -> str:
    found = {ending for file in _files(references) for ending in ENDINGS if file.name.endswith(ending)}
    if not found:
        raise UserError(f"There are no segmentations ({', '.join(ENDINGS)}) in {references}: check -r.")
    if len(found) > 1:
        raise UserError(f"The files in {references} end in {' and '.join(sorted(found))}: convert them to one format.")
    return found.pop()


def _files(folder: Path) -> list[Path]:
    """What is neither hidden nor a folder: copies by macOS leave files such as ._case.nii.gz."""
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _case(name: str, ending: str, references: Path, predictions: Mapping[str, Path], images: Path | None) -> Case:
    files = {model: folder / f"{name}{ending}" for model, folder in predictions.items()}
    for model, file in files.items():
        if not file.is_file():
            other = [file.with_name(name + wrong) for wrong in ENDINGS if file.with_name(name + wrong).is_file()]
            if other:
                raise UserError(f"{other[0]} has another format than the references ({ending}): convert one of them.")
            raise UserError(f"{model} has no prediction of the case {name}: predict it to {file}, or check -r and -p.")
    image = None if images is None else images / f"{name}_0000{ending}"
    if image is not None and not image.is_file():
        raise UserError(f"The case {name} has no image {image}: add it, or check -i.")
    return Case(name, references / f"{name}{ending}", files, image)


def _surplus(names: Sequence[str], ending: str, predictions: Mapping[str, Path]) -> Iterator[str]:
    for model, folder in predictions.items():
        cases = [file.name.removesuffix(ending) for file in _files(folder) if file.name.endswith(ending)]
        if extra := [case for case in cases if case not in set(names)]:
            yield f"{model}: predictions without a reference are left out ({_some(extra)})."


# ---------- what is in them


@dataclass(frozen=True)
class _Measured:
    """Rows of one case, and what differs between its files that does not stop an evaluation."""

    rows: list[dict[str, Any]]
    elsewhere: list[str]  # models whose prediction has another origin or direction


def measure_cases(study: Study, options: Options, processes: int = 1) -> tuple[pd.DataFrame, list[str]]:
    """A row for each model, case and label, in this order, and notes; one case at a time is in memory per process.

    Raises `UserError` for files that cannot be read, do not fit each other, or hold other labels.
    """
    job = partial(_measure_case, labels=study.labels, options=options)
    with _mapping(processes, len(study.cases)) as mapping:
        done = list(tqdm(mapping(job, study.cases), total=len(study.cases), unit="case", desc="measuring"))
    rows = [row for model in study.models for found in done for row in found.rows if row["model"] == model]
    notes = []
    for model in study.models:
        if cases := [case.name for case, found in zip(study.cases, done, strict=True) if model in found.elsewhere]:
            notes.append(
                f"{model}: predictions have another origin or direction than their references, but are compared voxel "
                f"by voxel, as nnU-Net does ({_some(cases)})."
            )
    return pd.DataFrame(rows), notes


def read_mask(file: Path) -> np.ndarray:
    """Labels of a file, z y x; raises `UserError` when it cannot be read, is cut off or holds other than integers."""
    return _read(file)[0]


def _read(file: Path) -> tuple[np.ndarray, Geometry]:
    try:
        geometry = read_geometry(file)
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    except Exception as error:  # noqa: BLE001 (SimpleITK and nibabel have errors of their own; the reason goes on)
        raise UserError(f"{file} cannot be read ({reader_reason(error)}): repair or replace it.") from None
    if array.ndim != 3:
        raise UserError(f"{file} has {array.ndim} dimensions, but three are needed.")
    if array.dtype.kind == "f":
        if not np.array_equal(array, np.rint(array)):  # NaN is not equal to itself
            raise UserError(f"{file} holds numbers that are not integers: give segmentations, not probabilities.")
        array = array.astype(np.int32)
    return array, geometry


def _measure_case(case: Case, labels: Labels, options: Options) -> _Measured:
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


def _slice_thickness(case: Case, geometry: Geometry) -> float:
    """The largest spacing of the image, or of the reference without one."""
    if case.image is not None:
        try:
            image = read_geometry(case.image)
        except Exception as error:  # noqa: BLE001 (as above)
            raise UserError(f"{case.image} cannot be read ({reader_reason(error)}): repair or replace it.") from None
        _refuse_other_grid(case.reference, geometry, case.image, image)
        geometry = image
    return round(max(geometry.spacing), THICKNESS_DIGITS)


def _refuse_other_grid(file: Path, geometry: Geometry, other_file: Path, other: Geometry) -> None:
    """Size and spacing have to be the same; voxels cannot be compared otherwise."""
    difference = geometry.difference(other)
    if difference and difference.startswith(("size", "spacing")):
        raise UserError(f"{file} does not fit {other_file}: they differ in {difference}; resample one to the other.")


def _refuse_other_labels(file: Path, array: np.ndarray, labels: Labels) -> None:
    known = {0, *(value for values in labels.values.values() for value in values)}
    known |= set() if labels.ignore is None else {labels.ignore}
    unknown = np.unique(array[~np.isin(array, list(known))])
    if len(unknown):
        raise UserError(
            f"{file} holds the label {_some(map(str, unknown))}, but only {_some(map(str, sorted(known)))} are known: "
            f"correct the file, or the labels in {DESCRIPTION}."
        )


def _mask(array: np.ndarray, values: Sequence[int]) -> np.ndarray:
    return np.logical_or.reduce([array == value for value in values])


@contextmanager
def _mapping(processes: int, cases: int) -> Iterator[Callable[[Callable[[Any], T], Iterable[Any]], Iterator[T]]]:
    """`map`, with processes where there are several; results come in the order of the cases."""
    if min(processes, cases) == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")  # torch and ITK have threads, which a fork does not survive
    pool = ProcessPoolExecutor(
        min(processes, cases), mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield pool.map
    except BrokenProcessPool:
        raise UserError(
            f"A process ended without a word, most often for lack of memory: give fewer than -np {processes}."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _some(names: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - FEW} more" if len(listed) > FEW else ""
    return ", ".join(listed[:FEW]) + more
