"""Which patient a case is of, as recorded by `mae3d_split` beside the splits.

Series of one patient look alike. When one is trained on and another validated on, the validation flatters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.files import read_json

PATIENTS = "patients.json"  # case -> patient, beside splits_final.json


def read_patients(file: Path) -> dict[str, str]:
    """The record of `mae3d_split`; raises `UserError` when it is something else."""
    patients = read_json(file)
    if not isinstance(patients, dict) or not all(isinstance(patient, str) for patient in patients.values()):
        raise UserError(f"{file} does not map cases to patients: remove it, or write it anew with mae3d_split.")
    return patients


def on_both_sides(patients: Mapping[str, str], one: Iterable[str], other: Iterable[str]) -> list[str]:
    """Patients with cases in both; a case that nobody knows counts as a patient of its own."""
    sides = [{patients.get(case, f"case {case}") for case in side} for side in (one, other)]
    return sorted(sides[0] & sides[1])


def separation_warning(folder: Path, training: Iterable[str], validation: Iterable[str]) -> str | None:
    """A sentence when patients known from `patients.json` in `folder` are trained on and validated on, else None."""
    file = folder / PATIENTS
    if not file.is_file():
        return None
    if not (both := on_both_sides(read_patients(file), training, validation)):
        return None
    return (
        f"Patients who are validated on are seen in training too ({abbreviated(both)}): the validation will look "
        "better than new patients would. Split by patient with mae3d_split, and keep their scans out of imagesUn."
    )
