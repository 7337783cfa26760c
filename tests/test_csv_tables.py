"""Tables that people open in a spreadsheet, and those that they save from one."""

import csv
import re
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_vit_mae.datasets.tables import read_case_table, read_names
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.csv_tables import (
    escaped,
    read_cells,
    read_frame,
    read_rows,
    unescaped,
    write_frame,
    write_records,
    write_rows,
)

PACKAGE = Path(__file__).parent.parent / "nnunet_vit_mae"
FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "＝1", "-name", "+49 170"]  # noqa: RUF001
PLAIN = ["case_1", "a=b", "-2.5", "+3", "1e-5", "", "O'Neil", "'tis", "'-2"]


@pytest.mark.parametrize("text", FORMULAS)
def test_text_that_a_spreadsheet_would_compute_is_escaped_and_read_back(text, tmp_path):
    file = tmp_path / "table.csv"
    write_rows(("case", text), [("a", text)], file)
    with file.open(newline="", encoding="utf-8") as stream:
        written = list(csv.reader(stream))
    assert written == [["case", f"'{text}"], ["a", f"'{text}"]]
    assert read_rows(file) == [{"case": "a", text: text}]
    write_frame(pd.DataFrame({"case": [text], "volume": [-2.5]}), file)
    assert f"'{text[:4]}" in file.read_bytes().decode()
    assert read_frame(file).to_dict("records") == [{"case": text, "volume": -2.5}]


@pytest.mark.parametrize("text", PLAIN[:-1])
def test_numbers_and_other_text_stay(text):
    assert escaped(text) == text


def test_numbers_stay_numbers():
    assert [escaped(value) for value in (-2.5, -3, None, float("-inf"))] == [-2.5, -3, None, float("-inf")]


@given(st.text(alphabet="'=+-@\t\r\n1.a, \"", max_size=8))
def test_every_text_comes_back(text):
    assert unescaped(escaped(text)) == text
    assert not re.match(r"[=@\t\r\n]", escaped(text))


def test_records_lack_columns(tmp_path):
    write_records([{"b": "=1"}], ("a", "b"), tmp_path / "table.csv")
    assert read_rows(tmp_path / "table.csv") == [{"a": "", "b": "=1"}]


def test_one_module_writes_csv():
    sources = {file: file.read_text() for file in PACKAGE.rglob("*.py") if file.name != "csv_tables.py"}
    assert not [file for file, text in sources.items() if re.search(r"csv\.(w|W|DictW)riter|to_csv\(|read_csv\(", text)]


# ---------- as spreadsheets save them

ROWS = [["Fall", "Patient", "Gerät"], *([f"case_{i:03d}", f"M{i // 2}", "Größe A" if i % 2 else "B"] for i in range(4))]
CASES = [row[0] for row in ROWS[1:]]


def saved(separator, encoding="utf-8", end="\r\n"):
    return (end.join(separator.join(row) for row in ROWS) + end).encode(encoding)


@pytest.mark.parametrize(
    "content",
    [
        saved(";", "utf-8-sig"),
        saved("\t", "utf-16"),
        b"\xfe\xff" + saved("\t", "utf-16-be"),
        saved("\t"),
        saved(" , "),
        saved(",", end="\n"),
        saved(",", end="\r"),
        saved(",") + b",,\r\n,,\r\n\r\n",
        b"sep=;\r\n" + saved(";"),
        b"\r\n\r\n" + saved(";"),
        saved(",").replace(b"case_000", b"case_000.nii.gz").replace(b"case_001", b"case_001_0000.nrrd"),
    ],
)
def test_tables_of_spreadsheets_are_read(content, tmp_path):
    file = tmp_path / "table.csv"
    file.write_bytes(content)
    table = read_case_table(file, None, CASES)
    assert table.columns["Gerät"] == {row[0]: row[2] for row in ROWS[1:]}
    assert table.patients("Patient") == {row[0]: row[1] for row in ROWS[1:]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(";", "latin-1"), "save it as a CSV file in UTF-8"),
        (b"PK\x03\x04" + bytes(200), "is a workbook: save its sheet as a CSV file"),
        (b"\xd0\xcf\x11\xe0" + bytes(200), "is a workbook"),
        (b"\xff\xfea", "cannot be read as a table"),
        (b'case,patient\n"' + b"x" * 200_000, "cannot be read as a table"),
    ],
)
def test_other_files_are_refused(content, reason, tmp_path):
    file = tmp_path / "table.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_case_table(file, None, CASES)


@pytest.mark.parametrize("column", [None, "case"])
def test_lost_zeros_are_named(column, tmp_path):
    file = tmp_path / "table.csv"
    file.write_text("case,patient\n7,a\n100,b\n")
    with pytest.raises(UserError, match="has 7 in the column case, but the case is 007: a spreadsheet has removed"):
        read_case_table(file, column, ["007", "100"])
    file.write_text("age,patient\n7,a\n")
    with pytest.raises(UserError, match="the case is 007"):
        read_case_table(file, None, ["007"])
    file.write_text("case,age\n007,7\n100,7\n")
    assert read_case_table(file, column, ["007", "100"]).columns["age"] == {"007": "7", "100": "7"}


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_umlauts_of_names_may_be_stored_in_another_way(stored, tmp_path):
    table, names = tmp_path / "table.csv", tmp_path / "names.txt"
    name, other = (normalize(form, "Müller_1") for form in (stored, {"NFC": "NFD", "NFD": "NFC"}[stored]))
    table.write_text(f"case,patient\n{other}_0000.nii.gz,a\n", encoding="utf-8")
    names.write_text(f"{other}\n", encoding="utf-8")
    assert read_case_table(table, None, [name]).patients("patient") == {name: "a"}
    assert read_names(names, [name], "--leave_out") == [name]


def test_spreadsheets_with_a_decimal_comma(tmp_path):
    file = tmp_path / "table.csv"
    cells = [["case", "mm"], ["a,b", "2,5"], ["b", "-1,5E+02"], ["c", "1,2,3"]]
    for separator, encoding in ((";", "utf-8-sig"), ("\t", "utf-16")):
        file.write_text("\n".join(separator.join(row) for row in cells), encoding=encoding)
        assert read_cells(file) == [["case", "mm"], ["a,b", "2.5"], ["b", "-1.5E+02"], ["c", "1,2,3"]]
    file.write_text('case,mm\na,"2,500"\n')  # thousands
    assert read_cells(file) == [["case", "mm"], ["a", "2,500"]]


def test_cells_in_quotes_may_hold_anything(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text('case,note\na,"one, two\nthree; ""four"""\n')
    assert read_cells(file) == [["case", "note"], ["a", 'one, two\nthree; "four"']]
