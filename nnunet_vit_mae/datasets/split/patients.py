"""Which case belongs to which patient, as recorded by `mae3d_split` beside the splits.

Scans of one patient look alike. If one is trained on and another is validated on, the validation is too optimistic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunet_vit_mae.errors import abbreviated
from nnunet_vit_mae.storage.entries import read_entries

PATIENTS = "patients.json"  # patient by case, beside splits_final.json


def read_patients(file: Path) -> dict[str, str]:
    """Read the record of `mae3d_split`; raises `UserError` if it is something else."""
    return read_entries(dict[str, str], file, "remove it, or write it again with mae3d_split")


def recorded_patients(folder: Path) -> dict[str, str]:
    """Return the patients by case in `patients.json` of a folder: none if there is no such file."""
    return read_patients(folder / PATIENTS) if (folder / PATIENTS).is_file() else {}


def patient_of(case: str, patients: Mapping[str, str]) -> str:
    """Return the patient of a case; a case of an unknown patient counts as a patient of its own."""
    return patients.get(case, f"case {case}")


def on_both_sides(patients: Mapping[str, str], first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Return the patients with cases on both sides."""
    sides = [{patient_of(case, patients) for case in side} for side in (first, second)]
    return sorted(sides[0] & sides[1])


def separation_warning(folder: Path, training: Iterable[str], validation: Iterable[str]) -> str | None:
    """Return a warning if, by `patients.json` in `folder`, patients are both trained on and validated on, else None."""
    if not (both := on_both_sides(recorded_patients(folder), training, validation)):
        return None
    return (
        f"Patients in the validation set are seen in training too ({abbreviated(both)}): the validation will be too "
        "optimistic. Split by patient with mae3d_split."
    )
