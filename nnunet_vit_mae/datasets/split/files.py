"""The files around a split: labelled cases in, `splits_final.json`, `patients.json` and `split.json` out.

`split.json` records the wishes, what each fold is, and the cases that are in none of them. An earlier file is never
lost: models may have been trained with it.
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
from nnunet_vit_mae.files import link, read_json, write_json
from nnunet_vit_mae.imaging.channels import cases_in, channels_by_case
from nnunet_vit_mae.imaging.labels import read_labels, read_volume
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk

SPLITS, SPLIT_RECORD = "splits_final.json", "split.json"
LABELS = {"raw": "labelsTr", "preprocessed": "gt_segmentations"}


@dataclass(frozen=True)
class Labelled:
    """Label images by case, and the data set's dataset.json."""

    files: Mapping[str, Path]
    description: Path


def labelled_cases(raw: Path, preprocessed: Path) -> Labelled:
    """The cases that nnU-Net splits: those of the raw data set, or of the preprocessed one where the raw one is gone.

    Raises `UserError` when there are none.
    """
    for folder, labels in ((raw, LABELS["raw"]), (preprocessed, LABELS["preprocessed"])):
        description = folder / "dataset.json"
        if description.is_file():
            ending = str(read_json(description).get("file_ending", ".nii.gz"))
            if files := cases_in(folder / labels, ending):
                return Labelled(files, description)
    raise UserError(f"There are no labels in {raw / LABELS['raw']} that dataset.json there describes: check -d.")


def label_volumes(labelled: Labelled) -> dict[str, str]:
    """mm3 of all foreground of each case, as text like a column of a table. Reads every label."""
    values = read_labels(labelled.description).foreground
    volumes = {}
    with without_warnings_of_itk():
        for case, file in labelled.files.items():
            with reading(file):
                array, geometry = read_volume(file)
            volumes[case] = f"{np.count_nonzero(np.isin(array, values)) * np.prod(geometry.spacing):.6g}"
    return volumes


def read_splits(file: Path) -> list[Split]:
    """Splits as nnU-Net reads them; raises `UserError` for anything else."""
    folds = read_json(file)
    whole = isinstance(folds, list) and folds
    if not whole or not all(isinstance(fold, dict) and _is_split(fold) for fold in folds):
        raise UserError(
            f"{file} is not a list of folds with train and val, each a list of names: write it with mae3d_split."
        )
    return folds


def _is_split(fold: dict) -> bool:
    sides = (fold.get("train"), fold.get("val"))
    return all(isinstance(side, list) and all(isinstance(case, str) for case in side) for side in sides)


def outside_of(folder: Path) -> set[str]:
    """Cases that a former call put into no fold on purpose."""
    file = folder / SPLIT_RECORD
    if not file.is_file():
        return set()
    record = read_json(file)
    try:
        return {*record["test"], *record["left_out"]}
    except (KeyError, TypeError):
        raise UserError(f"{file} is not a record of mae3d_split: remove it.") from None


def collect_test_cases(raw: Path, folder: Path, images: Path, labels: Path) -> int:
    """Link the test cases that `mae3d_split --test` set apart, which stay in imagesTr; gives their number.

    Args:
        raw: The raw dataset.
        folder: Where the split is recorded.
        images: Folder for their images.
        labels: Folder for their labels.

    Raises:
        UserError: If the split has no test cases, or a file is missing.
    """
    names = read_json(folder / SPLIT_RECORD).get("test", [])
    if not names:
        raise UserError(f"{folder / SPLIT_RECORD} has no test cases: split with mae3d_split --test.")
    ending = str(read_json(raw / "dataset.json").get("file_ending", ".nii.gz"))
    channels, _ = channels_by_case(raw / "imagesTr", ending)
    references = cases_in(raw / LABELS["raw"], ending)
    for name in names:
        if name not in channels or name not in references:
            raise UserError(f"The test case {name} has no image or label in {raw}: put it back, or split anew.")
        for source, target in [*((file, images) for file in channels[name].values()), (references[name], labels)]:
            target.mkdir(parents=True, exist_ok=True)
            (target / source.name).unlink(missing_ok=True)
            link(source, target / source.name)
    return len(names)


def write_splits(
    splits: Splits, wishes: SplitOptions, patients: Mapping[str, str], folder: Path, *, overwrite: bool
) -> list[Path]:
    """Write the three files; gives those that were moved aside, with the date in their names.

    Raises `UserError` when there are other splits already and `overwrite` is not set, and when nothing can be written.
    """
    record = {
        "wishes": asdict(wishes),
        "folds": splits.meanings,
        "test": splits.test,
        "left_out": splits.left_out,
    }
    contents = {SPLITS: splits.folds, PATIENTS: dict(sorted(patients.items())), SPLIT_RECORD: record}
    moved = []
    try:
        if not overwrite and (folder / SPLITS).exists() and read_json(folder / SPLITS) != splits.folds:
            raise UserError(
                f"{folder / SPLITS} holds other splits, and models may have been trained with them: give --overwrite "
                "to move it aside, or write elsewhere with -o."
            )
        for name, content in contents.items():
            file = folder / name
            if file.exists() and _other(file, content):
                moved.append(file.rename(file.with_stem(f"{file.stem}_until_{datetime.now():%Y-%m-%d_%H-%M-%S-%f}")))
            write_json(content, file)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error}): write elsewhere with -o.") from None
    return moved


def _other(file: Path, content: object) -> bool:
    try:
        return read_json(file) != json.loads(json.dumps(content))  # which has lists, and no tuples
    except UserError:  # not JSON: somebody's all the same
        return True
