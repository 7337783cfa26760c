"""Files of a split: labels are read; `splits_final.json`, `patients.json` and `split.json` are written.

`split.json` records the options, the content of each fold, and the cases in no fold. Earlier files are never lost,
because models may have been trained with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from nnunet_vit_mae.datasets.split.patients import PATIENTS
from nnunet_vit_mae.datasets.split.splits import Split, SplitOptions, Splits
from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.files import read_json, write_json
from nnunet_vit_mae.imaging.channels import cases_in
from nnunet_vit_mae.imaging.labels import read_labels, read_volume
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk

SPLITS, SPLIT_RECORD = "splits_final.json", "split.json"
RAW_LABELS, PREPROCESSED_LABELS = "labelsTr", "gt_segmentations"


@dataclass(frozen=True)
class LabelFiles:
    """Label images by case, and the dataset.json that describes them."""

    files: Mapping[str, Path]
    description: Path


def find_label_files(raw: Path, preprocessed: Path) -> LabelFiles:
    """Find the cases that nnU-Net splits: those of the raw dataset, or of the preprocessed one if the raw one is gone.

    Raises `UserError` if there are none.
    """
    for folder, labels in ((raw, RAW_LABELS), (preprocessed, PREPROCESSED_LABELS)):
        description = folder / "dataset.json"
        if description.is_file():
            ending = str(read_json(description).get("file_ending", ".nii.gz"))
            if files := cases_in(folder / labels, ending):
                return LabelFiles(files, description)
    raise UserError(f"There are no labels in {raw / RAW_LABELS} with the file ending in dataset.json: check -d.")


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
    folds = read_json(file)
    if not isinstance(folds, list) or not folds or not all(_is_split(fold) for fold in folds):
        raise UserError(
            f"{file} is not a list of folds with train and val, each a list of case names: write it with mae3d_split."
        )
    return folds


def _is_split(fold: object) -> bool:
    if not isinstance(fold, dict):
        return False
    sides = (fold.get("train"), fold.get("val"))
    return all(isinstance(side, list) and all(isinstance(case, str) for case in side) for side in sides)


def cases_in_no_fold(folder: Path) -> set[str]:
    """Return the cases that an earlier split put into no fold on purpose."""
    file = folder / SPLIT_RECORD
    if not file.is_file():
        return set()
    record = read_json(file)
    try:
        return {*record["test"], *record["left_out"]}
    except (KeyError, TypeError):
        raise UserError(f"{file} was not written by mae3d_split: remove it.") from None


def write_splits(
    splits: Splits, options: SplitOptions, patients: Mapping[str, str], folder: Path, *, overwrite: bool
) -> list[Path]:
    """Write the three files and return the earlier ones that were moved aside, with the date in their names.

    Raises `UserError` if other splits exist and `overwrite` is not set, or if the folder cannot be written to.
    """
    record = {
        "wishes": asdict(options),  # this key is part of the file format
        "folds": splits.meanings,
        "test": splits.test,
        "left_out": splits.left_out,
    }
    contents = {SPLITS: splits.folds, PATIENTS: dict(sorted(patients.items())), SPLIT_RECORD: record}
    moved = []
    try:
        if not overwrite and (folder / SPLITS).exists() and read_json(folder / SPLITS) != splits.folds:
            raise UserError(
                f"{folder / SPLITS} holds other splits, and models may have been trained with them: move it aside "
                "with --overwrite, or choose another folder with -o."
            )
        for name, content in contents.items():
            file = folder / name
            if file.exists() and _differs(file, content):
                moved.append(file.rename(file.with_stem(f"{file.stem}_until_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")))
            write_json(content, file)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error}): choose another folder with -o.") from None
    return moved


def _differs(file: Path, content: object) -> bool:
    try:
        return read_json(file) != json.loads(json.dumps(content))  # tuples become lists
    except UserError:  # not JSON, but still somebody's file
        return True
