"""The whole check of a raw dataset: every case on its own, then all cases together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.datasets.check.across_cases import findings_across_cases
from nnunet_vit_mae.datasets.check.inspection import ERROR, WARNING, CaseSummary, Finding, find_tasks, inspect_all
from nnunet_vit_mae.datasets.contrasts.record import Channels
from nnunet_vit_mae.datasets.split.patients import recorded_patients
from nnunet_vit_mae.datasets.split.splits import question_about
from nnunet_vit_mae.datasets.tables import PatientColumns, read_case_table
from nnunet_vit_mae.errors import abbreviated
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.imaging.labels import Labels
from nnunet_vit_mae.progress import with_progress


@dataclass(frozen=True)
class DatasetCheck:
    """Name of a dataset, summaries of its cases, and what is wrong; `note` names cases of unknown patients."""

    name: str
    cases: list[CaseSummary]
    channels: Channels
    labels: Labels
    findings: list[Finding]
    note: str = ""

    @property
    def errors(self) -> list[Finding]:
        """Findings that stop training or make its result wrong."""
        return [finding for finding in self.findings if finding.level == ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """Findings that may be intended."""
        return [finding for finding in self.findings if finding.level == WARNING]


def check_dataset(raw: Path, columns: PatientColumns, preprocessed: Path, processes: int) -> DatasetCheck:
    """Read every image and label of the raw dataset `raw` once and compare the cases.

    Patients come from the table in `columns`, else from the record of `mae3d_split` in `preprocessed`, if there is one.
    Raises `UserError` if dataset.json, the images or the table cannot be used.
    """
    tasks, channels, labels, findings = find_tasks(raw)
    patients, note = _known_patients(columns, [task.name for task in tasks], preprocessed)
    summaries = with_progress(inspect_all(tasks, labels, processes), total=len(tasks), unit="case", desc="checking")
    cases = sorted(summaries, key=lambda case: (case.folder, case.name))
    findings += [finding for case in cases for finding in case.findings]
    reoriented = read_description(raw / DESCRIPTION).reoriented
    findings += findings_across_cases(cases, channels, labels, patients, reoriented=reoriented)
    return DatasetCheck(raw.name, cases, channels, labels, findings, note)


def _known_patients(columns: PatientColumns, cases: Sequence[str], preprocessed: Path) -> tuple[dict[str, str], str]:
    """Return the patients by case, as far as they are known, and a note about cases without one and on alike names."""
    if columns.file is None:
        patients, unknown = recorded_patients(preprocessed), []
    else:
        patients = read_case_table(columns.file, columns.case, cases).patients(columns.patient)
        unknown = [name for name in cases if name not in patients]
    note = f"{columns.file} has no row for {abbreviated(unknown)}: the patient is unknown." if unknown else ""
    return patients, "\n".join(filter(None, [note, question_about(patients.values())]))
