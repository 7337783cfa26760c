"""Pseudonyms of patients, and the key to them: a table that links cases to patients, and that stays at the hospital."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nnunet_vit_mae.datasets.convert.studies import Study
from nnunet_vit_mae.datasets.tables import read_case_table
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.csv_tables import write_rows
from nnunet_vit_mae.storage.files import locked

KEY_FIELDS = ("case", "patient", "session")


def name_cases(studies: Sequence[Study], key: Path | None) -> dict[tuple[str, str], str]:
    """Return the case by patient and session, and write them to the key, if there is one.

    Those in an earlier key keep their numbers, new ones follow them. Raises `UserError` if the key cannot be read or
    written, or if another conversion is adding to it.
    """
    if key is None:
        return _pseudonyms(studies, {})
    try:
        with locked(key):  # of two conversions at once, the second would write the key without the cases of the first
            names = _pseudonyms(studies, read_key(key) if key.exists() else {})
            write_rows(KEY_FIELDS, ((case, *of) for of, case in names.items()), key)
            return names
    except OSError as error:
        raise UserError(
            f"{key} cannot be written ({error.strerror}): give a file in a writable folder with --key."
        ) from None


def _pseudonyms(studies: Sequence[Study], known: Mapping[tuple[str, str], str]) -> dict[tuple[str, str], str]:
    names, patients, last_sessions = dict(known), {}, Counter()
    for (patient, _), case in known.items():
        patients[patient], session = case.split("_")
        last_sessions[patients[patient]] = max(last_sessions[patients[patient]], int(session))
    last = max((int(number[1:]) for number in last_sessions), default=0)
    for study in studies:
        if (study.patient, study.session) in names:
            continue
        if study.patient not in patients:
            last += 1
            patients[study.patient] = f"P{last:04d}"
        number = patients[study.patient]
        last_sessions[number] += 1
        names[study.patient, study.session] = f"{number}_{last_sessions[number]}"
    return names


def read_key(key: Path) -> dict[tuple[str, str], str]:
    """Return the case by patient and session. Raises `UserError` for anything but a key; the message holds no name."""
    no_key = UserError(f"{key} is not the key of an earlier conversion: give another file with --key.")
    try:
        columns = read_case_table(key, "case", ()).columns
        names = {(columns["patient"][case], columns["session"][case]): case for case in columns["case"]}
    except (KeyError, UserError):  # whose messages may hold names
        raise no_key from None
    if not all(re.fullmatch(r"P[0-9]{4,}_[0-9]+", case) for case in names.values()):
        raise no_key
    return names
