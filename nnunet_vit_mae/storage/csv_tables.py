"""CSV files that people open in a spreadsheet: the one place that writes them, and reads what this package wrote.

A spreadsheet takes a cell that begins with `=`, `+`, `-` or `@` for a formula and computes it, so that a name from a
DICOM header or a file could run a command there. Such a cell gets an apostrophe in front, as OWASP recommends
(https://owasp.org/www-community/attacks/CSV_Injection), and our readers remove it. Numbers stay numbers.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.files import replacing

if TYPE_CHECKING:
    import pandas as pd

# ends of the line too, and the wide forms, which spreadsheets in East Asia take for the plain ones
FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")  # noqa: RUF001
DELIMITERS = ",;\t"  # spreadsheets write semicolons where the comma is the decimal separator
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # .xlsx and .ods, .xls
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
DECIMAL_COMMA = re.compile(r"([+-]?\d+),(\d+(?:[eE][+-]?\d+)?)")


def escaped(cell: Any) -> Any:
    """Return a cell as it is written: text that a spreadsheet would compute gets an apostrophe in front.

    >>> escaped("=1+1"), escaped("-2.5"), escaped(-2.5), escaped("a=b")
    ("'=1+1", '-2.5', -2.5, 'a=b')
    """
    # a cell that begins with an apostrophe already gets another one, so that `unescaped` gives it back
    is_formula = isinstance(cell, str) and FORMULA.match(cell) and not NUMBER.fullmatch(cell)
    return f"'{cell}" if is_formula else cell


def unescaped(cell: Any) -> Any:
    """Return a cell as it was before `escaped`.

    >>> unescaped(escaped("=1+1")), unescaped("'tis")
    ('=1+1', "'tis")
    """
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and FORMULA.match(cell) else cell


def write_rows(columns: Sequence[str], rows: Iterable[Iterable[Any]], file: Path) -> None:
    """Write a table with a header; the file is complete or absent. None is an empty cell."""
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(map(escaped, columns))
        writer.writerows(map(escaped, row) for row in rows)


def read_rows(file: Path) -> list[dict[str, str]]:
    """Read the rows of a table by column. Raises `ValueError` if its rows do not fit its header; see `read_cells`."""
    header, *rows = read_cells(file) or [[]]
    return [dict(zip(header, row, strict=True)) for row in rows]


def read_cells(file: Path) -> list[list[str]]:
    """Read a table of ours, or one that a spreadsheet saved: in UTF-8 or UTF-16, with commas, semicolons or tabs.

    Returns:
        The rows that are not empty, the header first. Numbers have a decimal point.

    Raises:
        UserError: If the file is a workbook, or text in an encoding that it does not name.
        OSError: If the file cannot be read.
    """
    content = file.read_bytes()
    if content.startswith(WORKBOOKS):
        raise UserError(f"{file} is a workbook: save its sheet as a CSV file in UTF-8.")
    try:
        text = content.decode("utf-16" if content.startswith(UTF16) else "utf-8-sig").lstrip("\r\n")
        first, _, rest = text.partition("\n")
        if separator := re.fullmatch("sep=(.)\r?", first):  # Excel's own note
            delimiter, text = separator[1], rest
        else:
            delimiter = max(DELIMITERS, key=re.sub('"[^"]*"', "", first).count)
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a table ({error}): save it as a CSV file in UTF-8.") from None
    read = unescaped if delimiter == "," else _with_decimal_point
    return [list(map(read, row)) for row in rows if row]


def _with_decimal_point(cell: str) -> str:
    match = DECIMAL_COMMA.fullmatch(cell)
    return f"{match[1]}.{match[2]}" if match else unescaped(cell)


def write_frame(frame: pd.DataFrame, file: Path) -> None:
    """Write a data frame without its index, as `write_rows` does; missing values are empty cells."""
    written = frame.rename(columns=escaped).map(escaped)
    # Python takes a lone carriage return for a part of the cell, and does not quote it; pandas ends the row there
    returns = written.map(lambda cell: isinstance(cell, str) and "\r" in cell).any(axis=None)
    quoting = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    with replacing(file) as temporary:
        written.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n", quoting=quoting)


def read_frame(file: Path, **how: Any) -> pd.DataFrame:
    """Read what `write_frame` wrote; `how` are arguments of `pandas.read_csv`. Only empty cells are missing values."""
    import pandas as pd

    as_written = {"keep_default_na": False, "na_values": [""]}  # pandas takes a label "NA" for a missing value
    return pd.read_csv(file, encoding="utf-8", **as_written, **how).rename(columns=unescaped).map(unescaped)


def write_records(records: Sequence[Mapping[str, Any]], columns: Sequence[str], file: Path) -> None:
    """Write a row for each mapping; a column that it lacks is an empty cell."""
    write_rows(columns, ([record.get(column, "") for column in columns] for record in records), file)


def write_instances(kind: type, instances: Iterable[Any], file: Path) -> None:
    """Write a row for each instance of a dataclass, and a column for each of its fields; NaN is an empty cell."""
    columns = [field.name for field in fields(kind)]
    rows = ([getattr(instance, column) for column in columns] for instance in instances)
    write_rows(columns, (["" if _is_nan(cell) else cell for cell in row] for row in rows), file)


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and math.isnan(cell)
