"""Tables and lists that people keep of their scans: a CSV file with a row for each case, or a name on each line."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.errors import UserError, abbreviated

DELIMITERS = ",;\t"  # spreadsheets write semicolons where the comma is the decimal sign


@dataclass(frozen=True)
class CaseTable:
    """A CSV file with a row for each case: column -> case -> what is written there."""

    file: Path
    columns: Mapping[str, Mapping[str, str]]

    def column(self, name: str, flag: str) -> Mapping[str, str]:
        """A column by its name; raises `UserError` when there is none."""
        if name not in self.columns:
            raise UserError(f"{self.file} has no column {name}, only {', '.join(self.columns)}: check {flag}.")
        return self.columns[name]

    def patients(self, name: str) -> dict[str, str]:
        """Patient by case; raises `UserError` when one is empty."""
        patients = dict(self.column(name, "--patient"))
        if empty := [case for case, patient in patients.items() if not patient]:
            raise UserError(
                f"{self.file} has no {name} for {abbreviated(empty)}: fill in the column, or remove the rows."
            )
        return patients


def read_case_table(file: Path, case_column: str | None, cases: Collection[str]) -> CaseTable:
    """Read a CSV file; its column of cases is named, or else found: the one in which most of `cases` occur.

    Fields are separated by commas, semicolons or tabs, whichever the first line has most of. Raises `UserError` for a
    file that is missing, no table, without a column of cases, or with two different rows for one case.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{file} is missing: check --csv.") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{file} cannot be read as text ({error}): save it as CSV in UTF-8.") from None
    first_line = re.sub('"[^"]*"', "", (lines or [""])[0])
    delimiter = max(DELIMITERS, key=first_line.count)
    header, *rows = [[field.strip() for field in row] for row in csv.reader(lines, delimiter=delimiter) if row] or [[]]
    header, rows = _without_empty_columns(header, rows)
    if not rows:
        raise UserError(f"{file} has no rows: give a table with a header and a row for each case.")
    if len(set(header)) < len(header):
        raise UserError(f"{file} has two columns of one name: rename one of them.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(
                f"{file} has {len(row)} fields in row {number}, but {len(header)} columns: correct the row."
            )
    if case_column is None:
        case_column = _column_of_cases(file, header, rows, cases)
    elif case_column not in header:
        raise UserError(f"{file} has no column {case_column}, only {', '.join(header)}: check --case.")
    return CaseTable(file, _by_case(file, header, rows, header.index(case_column)))


def read_names(file: Path, known: Collection[str], flag: str) -> list[str]:
    """Names of cases, one a line, without lines that are empty or start with #; raises `UserError` for unknown ones."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): check {flag}.") from None
    names = [line for line in lines if line and not line.startswith("#")]
    if unknown := sorted({*names} - {*known}):
        raise UserError(f"{file} names {abbreviated(unknown)}, which is no case there: correct the name.")
    return names


def _column_of_cases(file: Path, header: list[str], rows: list[list[str]], cases: Collection[str]) -> str:
    found = {name: len(set(cases) & {row[number] for row in rows}) for number, name in enumerate(header)}
    best = max(found, key=lambda name: (found[name], name == "case"))  # the first one of equals
    if not found[best]:
        raise UserError(
            f"{file} has no column with names of cases such as {next(iter(cases), '')}: add one, named as the files "
            "are without _0000 and ending."
        )
    return best


def _without_empty_columns(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Spreadsheets end lines with delimiters of columns that nobody has filled."""
    used = max((number + 1 for row in [header, *rows] for number, field in enumerate(row) if field), default=0)
    return header[:used], [row[:used] for row in rows]


def _by_case(file: Path, header: list[str], rows: list[list[str]], key: int) -> dict[str, dict[str, str]]:
    by_case: dict[str, list[str]] = {}
    for row in rows:
        if row[key] and by_case.setdefault(row[key], row) != row:
            raise UserError(f"{file} has two different rows for {row[key]}: keep one of them.")
    return {name: {case: row[number] for case, row in by_case.items()} for number, name in enumerate(header)}
