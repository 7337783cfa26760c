"""Tables and lists of cases: a CSV file with a row for each case, or a text file with a name on each line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, case_and_channel, without_ending
from nnunet_vit_mae.storage.csv_tables import read_cells


@dataclass(frozen=True)
class PatientColumns:
    """The table that lists patients, if there is one, and its columns; `case` is None if it is to be detected."""

    file: Path | None = None
    case: str | None = None
    patient: str = "patient"


@dataclass(frozen=True)
class CaseTable:
    """A CSV file with a row for each case: `columns` holds the fields by column and case."""

    file: Path
    columns: Mapping[str, Mapping[str, str]]

    def column(self, name: str, flag: str) -> Mapping[str, str]:
        """Return a column; raises `UserError` that mentions `flag` if there is none of that name."""
        if name not in self.columns:
            raise UserError(f"{self.file} has no column {name}, only {', '.join(self.columns)}: check {flag}.")
        return self.columns[name]

    def known(self, name: str) -> dict[str, str]:
        """Return the fields of a column that are not empty, by case; none if there is no such column."""
        return {case: field for case, field in self.columns.get(name, {}).items() if field}

    @property
    def rows(self) -> dict[str, dict[str, str]]:
        """The fields of each case by column."""
        cases = next(iter(self.columns.values()))
        return {case: {name: column[case] for name, column in self.columns.items()} for case in cases}

    def patients(self, name: str) -> dict[str, str]:
        """Return the patients by case; raises `UserError` if a field is empty."""
        patients = dict(self.column(name, "--patient"))
        if empty := [case for case, patient in patients.items() if not patient]:
            raise UserError(
                f"{self.file} has no {name} for {abbreviated(empty)}: complete the column, or remove these rows."
            )
        return patients


def read_case_table(
    file: Path, case_column: str | None, cases: Collection[str], advice: str = "check --case"
) -> CaseTable:
    """Read a CSV file with a row for each case.

    Args:
        file: The table; see `read_cells`.
        case_column: Name of the column with the case names; None chooses the column in which most of `cases` occur.
        cases: Names of the cases. The table may have their file names instead, and store umlauts in another way.
        advice: What to do if there is no such column.

    Raises:
        UserError: If the file is missing, is not a table, has no column of cases, has two different rows for a case, or
            has lost the zeros at the beginning of names.
    """
    by_spelling = _by_spelling(cases)
    try:
        cells = read_cells(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing: check --csv.") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check --csv.") from None
    header, *rows = [[cell.strip() for cell in row] for row in cells] or [[]]
    header, rows = _without_empty_columns(header, rows)
    if not rows:
        raise UserError(f"{file} has no rows: give a table with a header and a row for each case.")
    if len(set(header)) < len(header):
        raise UserError(f"{file} has two columns of the same name: rename one of them.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise UserError(
                f"{file} has {len(row)} fields in row {number}, but {len(header)} columns: correct the row."
            )
    if case_column is None:
        case_column = _column_of_cases(file, header, rows, by_spelling)
    elif case_column not in header:
        raise UserError(f"{file} has no column {case_column}, only {', '.join(header)}: {advice}.")
    key = header.index(case_column)
    refuse_lost_zeros(file, case_column, {row[key] for row in rows}, cases)
    for row in rows:
        row[key] = _case_of(row[key], by_spelling)
    return CaseTable(file, _by_case(file, header, rows, key))


def read_names(file: Path, known: Collection[str], flag: str) -> list[str]:
    """Read case names, one per line; empty lines and lines that start with # are skipped.

    Raises `UserError` if the file cannot be read or names a case that is not in `known`.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}): check {flag}.") from None
    by_spelling = _by_spelling(known)
    names = [by_spelling.get(normalize("NFC", line), line) for line in lines if line and not line.startswith("#")]
    if unknown := sorted({*names} - {*known}):
        raise UserError(f"{file} lists unknown cases ({abbreviated(unknown)}): correct the names.")
    return names


def refuse_lost_zeros(file: Path, column: str, cells: Collection[str], cases: Collection[str]) -> None:
    """Raise `UserError` if a spreadsheet has made numbers of the case names, such as 7 of 007."""
    others = {*cells} - {*cases}
    lost = [case for case in cases if case not in cells and _number(case) in others]
    if lost:
        raise UserError(
            f"{file} has {_number(lost[0])} in the column {column}, but the case is {lost[0]}: a spreadsheet has "
            "removed the zeros; format the column as text and enter the names again."
        )


def _number(case: str) -> str:
    return case.lstrip("0") or "0"


def _by_spelling(cases: Collection[str]) -> dict[str, str]:
    """Return the cases by their names with composed umlauts: macOS stores an umlaut as two characters."""
    return {normalize("NFC", case): case for case in cases}


def _column_of_cases(file: Path, header: list[str], rows: list[list[str]], by_spelling: Mapping[str, str]) -> str:
    cases = list(by_spelling.values())
    matches = {
        name: len(set(cases) & {_case_of(row[number], by_spelling) for row in rows})
        for number, name in enumerate(header)
    }
    best = max(matches, key=lambda name: (matches[name], name == "case"))  # the first of several equal ones
    if not matches[best]:
        for number, name in enumerate(header):
            refuse_lost_zeros(file, name, {row[number] for row in rows}, cases)
        raise UserError(
            f"{file} has no column with case names such as {next(iter(cases), '')}: add one, with file names without "
            "_0000 and file ending."
        )
    return best


def _case_of(cell: str, by_spelling: Mapping[str, str]) -> str:
    """Return the case that a cell names, also by a file name; a cell that names no case is returned as it is."""
    composed = normalize("NFC", cell)
    stem = without_ending(composed, IMAGE_ENDINGS)
    names = (composed, stem, case_and_channel(stem)[0])
    return next((by_spelling[name] for name in names if name in by_spelling), cell)


def _without_empty_columns(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Remove empty columns at the end, for which spreadsheets write delimiters."""
    used = max((number + 1 for row in [header, *rows] for number, field in enumerate(row) if field), default=0)
    return header[:used], [row[:used] for row in rows]


def _by_case(file: Path, header: list[str], rows: list[list[str]], key: int) -> dict[str, dict[str, str]]:
    by_case: dict[str, list[str]] = {}
    for row in rows:
        if row[key] and by_case.setdefault(row[key], row) != row:
            raise UserError(f"{file} has two different rows for {row[key]}: keep one of them.")
    return {name: {case: row[number] for case, row in by_case.items()} for number, name in enumerate(header)}
