"""Which preprocessed cases pre-training may see: fold hygiene lives here. Test images are never read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_vit_mae.datasets.split.patients import separation_warning
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json, write_json
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.nnunet.preprocessing import preprocessed_pool

logger = logging.getLogger(__name__)

FOLDS = 5  # nnU-Net's own default


@dataclass(frozen=True)
class PreprocessedCase:
    """A preprocessed image: its name, and nnU-Net's `.b2nd` file (c z y x)."""

    name: str
    file: Path


def pretraining_cases(plan: Plan, fold: str) -> list[PreprocessedCase]:
    """The training cases of a fold (a number, or `all`) and then the unlabelled pool, each sorted by name.

    Raises `UserError` when there is nothing preprocessed or no such fold.
    """
    labelled = _labelled(plan.preprocessed_folder)
    if not labelled:
        raise UserError(
            f"There are no preprocessed cases in {plan.preprocessed_folder}: "
            f"run nnUNetv2_preprocess -d {plan.dataset.id} -c {plan.name} first."
        )
    training = set(training_names(plan, fold, [case.name for case in labelled]))
    seen = [case for case in labelled if case.name in training] + _unlabelled_pool(plan)
    if fold != "all":
        validation = split_of(plan, fold, [case.name for case in labelled])["val"]
        if warning := separation_warning(plan.dataset.preprocessed, [case.name for case in seen], validation):
            logger.warning(warning)
    return seen


def training_names(plan: Plan, fold: str, names: list[str]) -> list[str]:
    """Training cases of a fold; all of `names` for `all`."""
    return names if fold == "all" else split_of(plan, fold, names)["train"]


def split_of(plan: Plan, fold: str, names: list[str]) -> dict[str, list[str]]:
    """`train` and `val` of a fold in `splits_final.json`, which is made as nnU-Net makes it when it is not there."""
    file = plan.dataset.preprocessed / "splits_final.json"
    if not file.is_file():
        if len(names) < FOLDS:
            raise UserError(f"{len(names)} labelled cases cannot be split into {FOLDS} folds: use -f all.")
        write_json(generate_crossval_split(sorted(names), seed=12345, n_splits=FOLDS), file)
    splits = read_json(file)
    if fold not in map(str, range(len(splits))):
        raise UserError(f"-f {fold} is neither 'all' nor one of the {len(splits)} folds in {file} (counted from 0).")
    return splits[int(fold)]


def _unlabelled_pool(plan: Plan) -> list[PreprocessedCase]:
    files, missing = preprocessed_pool(plan)
    if missing:
        logger.warning(
            "%d unlabelled images in %s are not preprocessed and will not be seen: run mae3d_preprocess -d %s first.",
            len(missing),
            plan.dataset.raw / "imagesUn",
            plan.dataset.id,
        )
    return [PreprocessedCase(file.name.removesuffix(".b2nd"), file) for file in files]


def _labelled(folder: Path) -> list[PreprocessedCase]:
    if not folder.is_dir():
        return []
    return [
        PreprocessedCase(name, folder / f"{name}.b2nd")
        for name in sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder)))
    ]
