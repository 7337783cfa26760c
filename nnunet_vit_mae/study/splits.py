"""The splits of a study: its numbers of patients fit the dataset, and its models never train on others."""

from __future__ import annotations

import shlex
from pathlib import Path

from nnunet_vit_mae.datasets.split.cohort import read_cohort
from nnunet_vit_mae.datasets.split.files import SPLIT_RECORD, SPLITS, read_split_record, read_splits
from nnunet_vit_mae.datasets.split.splits import LabelledCase, Split, SplitOptions, make_splits
from nnunet_vit_mae.datasets.tables import PatientColumns
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.files import read_json, write_json
from nnunet_vit_mae.study.design import StudyDesign
from nnunet_vit_mae.study.steps import split_command


def refuse_impossible_split(study: StudyDesign) -> None:
    """Raise `UserError` for what `mae3d_split` would refuse after the preprocessing: few patients, or other splits."""
    if Path(study.output, SPLITS).is_file():
        return  # it has been made
    preprocessed = Path(study.preprocessed_folder)
    columns = PatientColumns(Path(study.csv) if study.csv else None, None, study.patient)
    cohort = read_cohort(Path(study.raw), preprocessed, columns, preprocessed)
    options = SplitOptions(development=study.development, test=study.test, few=study.few)
    splits = make_splits([LabelledCase(case, cohort.patients[case]) for case in cohort.cases], options)
    there = preprocessed / SPLITS
    if there.exists() and read_splits(there) != splits.folds:
        raise UserError(
            f"{there} holds other splits than those of the study, and models may have been trained with them: move "
            f"them aside with {shlex.join(split_command(study))} --overwrite, or work on a copy of the dataset."
        )


def keep_splits(study: StudyDesign) -> None:
    """Keep copies of `splits_final.json` and `split.json` in the folder of the study.

    Raises:
        UserError: If it has other splits already.
    """
    for name in (SPLIT_RECORD, SPLITS):
        if not Path(study.output, name).is_file():
            write_json(read_json(Path(study.preprocessed_folder, name)), Path(study.output, name))
    refuse_other_splits(study)


def refuse_other_splits(study: StudyDesign) -> None:
    """Raise `UserError` if nnU-Net's splits are not those that the study keeps: test cases would be trained on.

    A study keeps none before its step `split` is done.
    """
    kept, now = Path(study.output), Path(study.preprocessed_folder)
    if (kept / SPLITS).is_file() and not ((now / SPLITS).is_file() and _splits_in(now) == _splits_in(kept)):
        raise UserError(
            f"{now} does not hold the splits that the study in {kept} began with: copy {SPLITS} and {SPLIT_RECORD} "
            "back from there, or give another folder with -o."
        )


def _splits_in(folder: Path) -> tuple[list[Split], list[str]]:
    """Return the folds, and the cases to test on."""
    return read_splits(folder / SPLITS), read_split_record(folder).test
