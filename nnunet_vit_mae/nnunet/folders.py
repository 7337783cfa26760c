"""Where nnU-Net keeps a dataset, and where this package keeps what nnU-Net has no place for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_vit_mae.datasets.split.files import PREPROCESSED_LABELS
from nnunet_vit_mae.errors import UserError, did_you_mean
from nnunet_vit_mae.storage.layout import dataset_id

DIGITS = 9  # of the longest number that is looked for; nnU-Net's have three


@dataclass(frozen=True)
class Dataset:
    """A dataset of nnU-Net: its name (`Dataset501_Name`) and its three folders, which need not exist yet."""

    name: str
    raw: Path
    preprocessed: Path
    results: Path

    @property
    def id(self) -> str:
        """The three digits that `-d` takes."""
        return dataset_id(self.name)

    @property
    def unlabelled_images(self) -> Path:
        """The raw images without labels, for which nnU-Net has no folder."""
        return self.raw / "imagesUn"

    @property
    def references(self) -> Path:
        """nnU-Net's copies of the reference segmentations."""
        return self.preprocessed / PREPROCESSED_LABELS

    def plans_file(self, plans_name: str) -> Path:
        """Return the file of the plans that `-p` names."""
        return self.preprocessed / f"{plans_name}.json"


def find_dataset(id_or_name: str) -> Dataset:
    """Find the dataset that `-d` names, by number (`505`) or by name (`Dataset505_MandibleCT`).

    Raises `UserError` if one of nnU-Net's variables is not set, or if no dataset or several datasets match.
    """
    roots = {path.env_var_name: path for path in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results)}
    missing = [name for name, path in roots.items() if not path.is_set() or not os.environ.get(name, "set").strip()]
    if missing:
        raise UserError(f"The environment variable {', '.join(missing)} is not set: set nnU-Net's three folders first.")
    raw, preprocessed, results = (Path(os.fspath(path)) for path in roots.values())
    for variable, folder in zip(roots, (raw, preprocessed, results), strict=True):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"The environment variable {variable} names {folder}, which is not a folder: correct it.")

    name = id_or_name if id_or_name.startswith("Dataset") else _name_of_number(id_or_name)
    if not re.fullmatch(r"Dataset[0-9]{3,}_[^/\\]+", name):
        raise UserError(f"-d {name} is not the name of a dataset: give one such as Dataset501_Name, or its number.")
    if not any((root / name).is_dir() for root in (raw, preprocessed, results)):  # results: of a model from elsewhere
        known = {folder.name for root in (raw, preprocessed, results) for folder in root.glob("Dataset*")}
        raise UserError(
            f"There is no dataset {name} in {raw}, {preprocessed} or {results}{did_you_mean(name, known)}: "
            "check -d and nnU-Net's variables."
        )
    return Dataset(name, raw / name, preprocessed / name, results / name)


def others_of_number(name: str) -> list[str]:
    """Return the names of other datasets with the number of a dataset, which `-d` cannot name by number then."""
    return [str(other) for other in find_candidate_datasets(int(dataset_id(name))) if other != name]


def results_folder() -> Path:
    """Return nnU-Net's folder of results. Raises `UserError` if its variable is not set."""
    if not nnUNet_results.is_set():
        raise UserError("The environment variable nnUNet_results is not set: set it, or give a folder with -o.")
    return Path(os.fspath(nnUNet_results))


def _name_of_number(number: str) -> str:
    if not (number.isascii() and number.isdigit() and len(number) <= DIGITS):
        raise UserError(f"-d {number} is neither a dataset number such as 501 nor a name such as Dataset501_Name.")
    candidates = [str(name) for name in find_candidate_datasets(int(number))]
    if not candidates:
        raise UserError(
            f"-d {number} is no dataset in nnU-Net's three folders: check the number, and nnU-Net's variables."
        )
    if len(candidates) > 1:
        raise UserError(f"-d {number} is the number of {' and '.join(candidates)}: give the name of one.")
    return candidates[0]
