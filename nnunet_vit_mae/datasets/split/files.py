"""Files of a split: labels are read; `splits_final.json`, `patients.json` and `split.json` are written and read again.

`split.json` records the options, the content and the parent of each fold, and the cases in no fold. Earlier files are
never lost, because models may have been trained with them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from nnunet_vit_mae.datasets.split.patients import PATIENTS
from nnunet_vit_mae.datasets.split.splits import Split, SplitOptions, Splits, fold_problems
from nnunet_vit_mae.errors import UserError, abbreviated, reading
from nnunet_vit_mae.imaging.channels import (
    IMAGE_ENDINGS,
    cases_in,
    channels_by_case,
    visible_files,
    without_ending,
)
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.imaging.labels import read_labels
from nnunet_vit_mae.imaging.volumes import read_volume, without_warnings_of_itk
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import link, locked, read_json, set_aside, write_json

SPLITS, SPLIT_RECORD = "splits_final.json", "split.json"
RAW_LABELS, PREPROCESSED_LABELS = "labelsTr", "gt_segmentations"


@dataclass(frozen=True)
class _Fold:
    train: list[str]
    val: list[str]


_Folds = Annotated[list[_Fold], Field(min_length=1)]


@dataclass(frozen=True)
class LabelFiles:
    """Label images by case, and the dataset.json that describes them."""

    files: Mapping[str, Path]
    description: Path


def find_label_files(raw: Path, preprocessed: Path) -> LabelFiles:
    """Find the cases that nnU-Net splits: those of the raw dataset, or of the preprocessed one if the raw one is gone.

    Raises `UserError` if there are none, or if a case has a label with another ending only, which nnU-Net passes over.
    """
    for folder, labels in ((raw, RAW_LABELS), (preprocessed, PREPROCESSED_LABELS)):
        description = folder / DESCRIPTION
        if description.is_file():
            ending = read_description(description).ending
            files = cases_in(folder / labels, ending)
            if others := _labels_with_other_endings(folder / labels, files):
                raise UserError(
                    f"{abbreviated(others)} in {folder / labels} do not end with {ending}, as file_ending in "
                    "dataset.json says, so that their cases would be in no fold: convert these labels, or take them "
                    "out."
                )
            if files:
                return LabelFiles(files, description)
    raise UserError(f"There are no labels in {raw / RAW_LABELS} with the file ending in dataset.json: check -d.")


def _labels_with_other_endings(folder: Path, known: Collection[str]) -> list[str]:
    """Return the images in a folder of labels that belong to none of the `known` cases, by their names."""
    names = [file.name for file in visible_files(folder)] if folder.is_dir() else []
    images = [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]
    return [name for name in images if without_ending(name, IMAGE_ENDINGS) not in known]


def label_volumes(labels: LabelFiles) -> dict[str, str]:
    """Read every label and return the foreground volume in mm3 by case, as text like the column of a table."""
    values = read_labels(labels.description).foreground
    volumes = {}
    with without_warnings_of_itk():
        for case, file in labels.files.items():
            with reading(file):
                array, geometry = read_volume(file)
            volumes[case] = f"{np.count_nonzero(np.isin(array, values)) * np.prod(geometry.spacing):.6g}"
    return volumes


def read_splits(file: Path) -> list[Split]:
    """Read splits as nnU-Net does; raises `UserError` for anything else."""
    advice = "give a list of folds with train and val, each a list of case names, as mae3d_split writes it"
    folds = read_entries(_Folds, file, advice)
    return [{"train": fold.train, "val": fold.val} for fold in folds]


def read_fold(file: Path, fold: str, cases: Collection[str]) -> Split:
    """Read one fold of splits for training, as `nnUNetv2_train` and `mae3d_pretrain` need it.

    Args:
        file: The splits.
        fold: Number of the fold, from 0.
        cases: Names of the labelled cases.

    Raises:
        UserError: If the file holds something else, has no such fold, or a side of the fold is empty, shares cases with
            the other one, or names a case that does not exist.
    """
    splits = read_splits(file)
    if fold not in map(str, range(len(splits))):
        raise UserError(f"-f {fold} is neither 'all' nor one of the {len(splits)} folds in {file} (counted from 0).")
    split = splits[int(fold)]
    if problems := fold_problems(int(fold), split, cases):
        raise UserError(f"{file}: {problems[0]}: correct it, or split anew with mae3d_split --overwrite.")
    return split


@dataclass(frozen=True)
class SplitRecord:
    """What `split.json` says: the parent of each fold, and the cases in no fold (see `Splits`)."""

    test: list[str]
    left_out: list[str]
    parents: list[int] = field(default_factory=list)  # earlier versions did not write these two
    other_series: list[str] = field(default_factory=list)


def read_split_record(folder: Path) -> SplitRecord:
    """Read `split.json` of a folder; without one, the record is empty. Raises `UserError` for any other content."""
    file = folder / SPLIT_RECORD
    if not file.is_file():
        return SplitRecord([], [])
    return read_entries(SplitRecord, file, "remove it if it was not written by mae3d_split")


def parent_fold(folder: Path, fold: str) -> str:
    """Return the fold that the few training patients of a fold for learning curves are from; other folds are their own.

    A fold that `split.json` gives as parent does not count if it validates on other cases, for the file of splits may
    have been changed.
    """
    parents = {str(number): str(parent) for number, parent in enumerate(read_split_record(folder).parents)}
    parent = parents.get(fold, fold)
    if parent == fold or not (folder / SPLITS).is_file():
        return fold
    validation = {str(number): set(split["val"]) for number, split in enumerate(read_splits(folder / SPLITS))}
    return parent if validation.get(fold) == validation.get(parent) else fold


def collect_test_cases(raw: Path, folder: Path, images: Path, labels: Path) -> int:
    """Link the test cases that `mae3d_split --test` set apart, which stay in imagesTr, and return their number.

    Args:
        raw: The raw dataset.
        folder: Where the split is recorded.
        images: Folder for their images.
        labels: Folder for their labels.

    Raises:
        UserError: If the split has no test cases, or a file is missing.
    """
    names = read_split_record(folder).test
    if not names:
        raise UserError(f"{folder / SPLIT_RECORD} has no test cases: split with mae3d_split --test.")
    ending = read_description(raw / DESCRIPTION).ending
    channels, _ = channels_by_case(raw / "imagesTr", ending)
    references = cases_in(raw / RAW_LABELS, ending)
    for name in names:
        if name not in channels or name not in references:
            raise UserError(f"The test case {name} has no image or label in {raw}: put it back, or split anew.")
        for source, target in [*((file, images) for file in channels[name].values()), (references[name], labels)]:
            target.mkdir(parents=True, exist_ok=True)
            (target / source.name).unlink(missing_ok=True)
            link(source, target / source.name)
    return len(names)


def write_splits(
    splits: Splits, options: SplitOptions, patients: Mapping[str, str], folder: Path, *, overwrite: bool
) -> list[Path]:
    """Write the three files and return the earlier ones that were moved aside, with the date in their names.

    Raises `UserError` if other splits exist and `overwrite` is not set, if another process is writing splits there, or
    if the folder cannot be written to.
    """
    record = {
        "wishes": asdict(options),  # this key is part of the file format
        "folds": splits.meanings,
        "parents": splits.parents,
        "test": splits.test,
        "left_out": splits.left_out,
        "other_series": splits.other_series,
    }
    contents = {SPLITS: splits.folds, PATIENTS: dict(sorted(patients.items())), SPLIT_RECORD: record}
    try:
        with locked(folder):
            return _write_three(contents, folder, overwrite=overwrite)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error}): choose another folder with -o.") from None


def _write_three(contents: dict[str, Any], folder: Path, *, overwrite: bool) -> list[Path]:
    if not overwrite and (folder / SPLITS).exists() and read_json(folder / SPLITS) != contents[SPLITS]:
        raise UserError(
            f"{folder / SPLITS} holds other splits, and models may have been trained with them: move it aside "
            "with --overwrite, or choose another folder with -o."
        )
    moved = []
    for name, content in contents.items():
        if (folder / name).exists() and _differs(folder / name, content):
            moved.append(set_aside(folder / name))
    # the splits last: with them, but without patients and test cases, a call that was stopped would look complete
    for name in reversed(contents):
        write_json(contents[name], folder / name)
    return moved


def _differs(file: Path, content: object) -> bool:
    try:
        return read_json(file) != json.loads(json.dumps(content))  # tuples become lists
    except UserError:  # not JSON, but still somebody's file
        return True
