"""The cohort of a dataset, i.e. its labelled cases with their patients: read it, split it, verify its splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nnunet_vit_mae.datasets.split.files import (
    SPLITS,
    LabelFiles,
    find_label_files,
    label_volumes,
    read_split_record,
    read_splits,
    write_splits,
)
from nnunet_vit_mae.datasets.split.patients import PATIENTS, recorded_patients
from nnunet_vit_mae.datasets.split.splits import (
    LabelledCase,
    SplitOptions,
    Splits,
    assign_strata,
    find_problems,
    make_splits,
)
from nnunet_vit_mae.datasets.tables import CaseTable, PatientColumns, read_case_table, read_names
from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.imaging.channels import channels_by_case
from nnunet_vit_mae.imaging.description import read_description


@dataclass(frozen=True)
class Cohort:
    """Labelled cases, patients by case, the table they were read from, if any, and where the patients come from."""

    labels: LabelFiles
    patients: Mapping[str, str]
    table: CaseTable | None = None
    note: str = ""

    @property
    def cases(self) -> list[str]:
        """Names of all labelled cases."""
        return list(self.labels.files)


def read_cohort(raw: Path, preprocessed: Path, columns: PatientColumns, folder: Path) -> Cohort:
    """Find the labelled cases of a dataset and their patients.

    Patients come from the table in `columns`, else from an earlier split in `folder` that had one; without either, each
    case counts as its own patient. The note says which unlabelled cases have no patient. Raises `UserError` if there
    are no labels, or if a labelled case has no patient.
    """
    labels = find_label_files(raw, preprocessed)
    cases = list(labels.files)
    unlabelled, tested = (_cases_of(raw / images, labels) for images in ("imagesUn", "imagesTs"))
    if columns.file is not None:
        table = read_case_table(columns.file, columns.case, [*cases, *unlabelled, *tested])
        cohort = Cohort(labels, table.patients(columns.patient), table)
        source, advice = table.file, "complete it, or check --case"
    elif (recorded := recorded_patients(folder)) and any(case != recorded[case] for case in recorded):
        source, advice = folder / PATIENTS, "give a table of all cases with --csv"
        cohort = Cohort(labels, recorded, note=f"Patients are taken from {source}; --csv replaces them.")
    else:
        note = "Without --csv, each case counts as a patient of its own."
        return Cohort(labels, {case: case for case in cases}, note=note)
    if missing := [case for case in cases if case not in cohort.patients]:
        raise UserError(f"{source} has no row for {abbreviated(missing)}: {advice}.")
    if missing := [case for case in unlabelled if case not in cohort.patients]:
        note = f"{source} has no row for {abbreviated(missing)} of imagesUn: each counts as a patient of its own."
        return replace(cohort, note=f"{cohort.note}\n{note}".lstrip())
    return cohort


def _cases_of(images: Path, labels: LabelFiles) -> list[str]:
    return list(channels_by_case(images, read_description(labels.description).ending)[0])


@dataclass(frozen=True)
class StrataOptions:
    """What to keep in proportion: columns of the cohort's table, and tertiles of the labelled volume."""

    columns: Sequence[str] = ()
    volume: bool = False


@dataclass(frozen=True)
class WrittenSplits:
    """Splits, how they were made, the stratum of each case, their file, and earlier files that were moved aside."""

    splits: Splits
    options: SplitOptions
    strata: Mapping[str, str]
    file: Path
    moved: list[Path]


def split_cohort(
    cohort: Cohort,
    options: SplitOptions,
    folder: Path,
    strata_options: StrataOptions,
    *,
    leave_out: Path | None = None,
    overwrite: bool = False,
) -> WrittenSplits:
    """Split the patients of a cohort and write `splits_final.json` and its companions to `folder`.

    `leave_out` is a text file of cases that go into no fold. Raises `UserError` if a column or a case does not exist,
    if there are too few patients, or if other splits exist and `overwrite` is not set.
    """
    left_out = set(read_names(leave_out, cohort.cases, "--leave_out")) if leave_out else set()
    cases = [case for case in cohort.cases if case not in left_out]
    strata = assign_strata(_strata_columns(cohort, strata_options), cases)
    splits = make_splits([LabelledCase(case, cohort.patients[case], strata[case]) for case in cases], options)
    splits = replace(splits, left_out=sorted({*splits.left_out, *left_out}))
    outside = {"test": splits.test, "left_out": splits.left_out}
    problems = find_problems(splits.folds, cohort.patients, cohort.cases, **outside)
    assert not problems, problems
    moved = write_splits(splits, options, cohort.patients, folder, overwrite=overwrite)
    return WrittenSplits(splits, options, strata, folder / SPLITS, moved)


def _strata_columns(cohort: Cohort, options: StrataOptions) -> list[Mapping[str, str]]:
    if options.columns and cohort.table is None:
        raise UserError("--stratify needs a table with that column: give it with --csv.")
    columns = [cohort.table.column(name, "--stratify") for name in options.columns] if cohort.table else []
    if options.volume:
        columns.append(label_volumes(cohort.labels))
    return columns


def verify_folder(cohort: Cohort, folder: Path) -> tuple[str, list[str]]:
    """Verify the splits in `folder`.

    Returns:
        A summary for splits without problems, and the problems, one clause each.
    """
    file = folder / SPLITS
    folds = read_splits(file)
    record = read_split_record(folder)
    if problems := find_problems(folds, cohort.patients, cohort.cases, test=record.test, left_out=record.left_out):
        return "", problems
    cases = {case for fold in folds for side in ("train", "val") for case in fold[side]}
    patients = {cohort.patients[case] for case in cases}
    summary = f"{file}: {len(folds)} folds of {len(cases)} cases of {len(patients)} patients, none on two sides."
    return summary, []
