"""Labelled cases, nnU-Net's folds, and the preprocessed cases that pre-training may read.

Pre-training never reads the validation images of its fold, nor any test image, nor another scan of these patients as
far as `patients.json` and `split.json` know them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_vit_mae.datasets.split.files import SPLITS, find_label_files, parent_fold, read_fold, read_split_record
from nnunet_vit_mae.datasets.split.patients import patient_of, recorded_patients
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import cases_in, channels_by_case
from nnunet_vit_mae.nnunet.folders import Dataset
from nnunet_vit_mae.nnunet.plans import Plan, load_plan
from nnunet_vit_mae.nnunet.preprocessing import preprocessed_pool
from nnunet_vit_mae.storage.files import write_json

logger = logging.getLogger(__name__)

FOLDS = 5  # nnU-Net's default


@dataclass(frozen=True)
class PreprocessedCase:
    """A preprocessed image: its name, and nnU-Net's `.b2nd` file (c z y x)."""

    name: str
    file: Path


def labelled_cases(plan: Plan) -> list[PreprocessedCase]:
    """Return the preprocessed labelled cases, sorted by name. Raises `UserError` if there are none."""
    folder = plan.preprocessed_folder
    names = sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder))) if folder.is_dir() else []
    if not names:
        raise UserError(f"There are no preprocessed cases in {folder}: run {plan.preprocessing_command} first.")
    return [PreprocessedCase(name, folder / f"{name}.b2nd") for name in names]


def is_preprocessed(dataset: Dataset, plans_name: str, configuration: str) -> bool:
    """Return whether nnU-Net has planned a dataset and preprocessed every labelled case.

    Raises `UserError` for plans that cannot be used or lack the configuration, for other than nnU-Net's default plans
    if they are not there, and if there are no labels.
    """
    if plans_name == "nnUNetPlans" and not dataset.plans_file(plans_name).is_file():
        return False
    folder = load_plan(dataset, plans_name, configuration).preprocessed_folder
    cases = find_label_files(dataset.raw, dataset.preprocessed).files
    return all((folder / f"{case}.pkl").is_file() for case in cases)


def reference_segmentations(plan: Plan) -> dict[str, Path]:
    """Return the reference segmentations of the labelled cases by case. Raises `UserError` if there are none."""
    files = cases_in(plan.dataset.references, plan.file_ending)
    if not files:
        raise UserError(
            f"There are no reference segmentations in {plan.dataset.references}: "
            f"run {plan.preprocessing_command} first."
        )
    return files


def pretraining_cases(plan: Plan, fold: str) -> list[PreprocessedCase]:
    """Return the cases for the pre-training of a fold (a number, or `all`), labelled ones first, each sorted by name.

    These are the training cases of the fold's parent, further series of their patients, and the unlabelled pool. Scans
    of patients that are held out, for testing (in `imagesTs` too) or to validate the fold, are not among them; the log
    says how many there are. Raises `UserError` if no labelled case is preprocessed, if there is no such fold, or if no
    case is left.
    """
    labelled = labelled_cases(plan)
    record, patients = read_split_record(plan.dataset.preprocessed), recorded_patients(plan.dataset.preprocessed)
    names = [case.name for case in labelled]
    if fold == "all":
        training, validation = set(names) - (set(record.left_out) - set(record.other_series)), []
    else:
        split = split_of(plan, parent_fold(plan.dataset.preprocessed, fold), names)
        training, validation = {*split["train"], *record.other_series}, split["val"]
    held_out = {patient_of(case, patients) for case in (*record.test, *validation)}
    held_out |= {patients[case] for case in _test_cases(plan) if case in patients and case not in names}
    candidates = [case for case in labelled if case.name in training] + _unlabelled_pool(plan)
    cases = [case for case in candidates if patient_of(case.name, patients) not in held_out]
    if not cases:
        raise UserError(
            f"No scan is left to pre-train on in fold {fold}: give another fold with -f, "
            f"or change the split in {plan.dataset.preprocessed / SPLITS}."
        )
    if closed := len(candidates) - len(cases):
        logger.info("%d scans of patients held out for testing or validation are not read.", closed)
    return cases


def training_names(plan: Plan, fold: str, names: list[str]) -> list[str]:
    """Return the training cases of a fold, or all of `names` for `all`."""
    return names if fold == "all" else split_of(plan, fold, names)["train"]


def split_of(plan: Plan, fold: str, names: list[str]) -> dict[str, list[str]]:
    """Return `train` and `val` of a fold in `splits_final.json`.

    If there is no such file, the labelled cases `names` are split as nnU-Net does, and the file is written. Raises
    `UserError` as `read_fold` does, or if there are too few cases to split.
    """
    file = plan.dataset.preprocessed / SPLITS
    if not file.is_file():
        refuse_no_fold(fold, len(names))
        from nnunetv2.utilities.crossval_split import generate_crossval_split  # imports scikit-learn

        write_json(generate_crossval_split(sorted(names), seed=12345, n_splits=FOLDS), file)
    return read_fold(file, fold, names)


def refuse_no_fold(fold: str, cases: int) -> None:
    """Raise `UserError` for a fold that is not one of those into which nnU-Net splits this many cases by itself."""
    if cases < FOLDS:
        raise UserError(f"{cases} labelled cases cannot be split into {FOLDS} folds: use -f all.")
    if fold not in map(str, range(FOLDS)):
        raise UserError(
            f"-f {fold} is neither 'all' nor one of the {FOLDS} folds that nnU-Net makes of the cases (counted from 0)."
        )


def _test_cases(plan: Plan) -> dict[str, dict[int, Path]]:
    return channels_by_case(plan.dataset.raw / "imagesTs", plan.file_ending)[0]


def _unlabelled_pool(plan: Plan) -> list[PreprocessedCase]:
    files, missing = preprocessed_pool(plan)
    if missing:
        logger.warning(
            "%d unlabelled images in %s are not preprocessed and will not be used: run mae3d_preprocess %s first.",
            len(missing),
            plan.dataset.unlabelled_images,
            plan.flags_text,
        )
    return [PreprocessedCase(file.name.removesuffix(".b2nd"), file) for file in files]
