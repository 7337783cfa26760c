"""Splits by patient: no patient on two sides, each validated once, nested few-label folds, and no file lost."""

import errno
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import SHAPE, Workspace, write_case
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.cli.split import main
from nnunet_vit_mae.datasets.split import files
from nnunet_vit_mae.datasets.split.files import parent_fold
from nnunet_vit_mae.datasets.split.patients import on_both_sides, separation_warning
from nnunet_vit_mae.datasets.split.splits import (
    LabelledCase,
    SplitOptions,
    alike_names,
    assign_strata,
    find_problems,
    make_splits,
    parts_of,
)
from nnunet_vit_mae.datasets.tables import read_case_table
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation import split_figure as split_figure_module
from nnunet_vit_mae.storage.files import locked, write_json

cohorts = st.lists(st.tuples(st.integers(1, 6), st.sampled_from("AB"), st.integers(0, 2)), min_size=1, max_size=14)


def cases_of(cohort) -> list[LabelledCase]:
    """A patient for each entry: number of cases, scanner, volume class of the last one."""
    return [
        LabelledCase(f"{patient:02d}_{case}", f"P{patient}", f"{scanner}{volume if case == cases - 1 else 0}")
        for patient, (cases, scanner, volume) in enumerate(cohort)
        for case in range(cases)
    ]


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts, folds=st.integers(2, 6), seed=st.integers(0, 99), one=st.booleans(), order=st.randoms())
def test_cross_validation_by_patient(cohort, folds, seed, one, order):
    cases = cases_of(cohort)
    options = SplitOptions(folds, one_per_patient=one, seed=seed)
    if len(cohort) < folds:
        with pytest.raises(UserError, match="too few for --folds"):
            make_splits(cases, options)
        return
    splits = make_splits(cases, options)
    patients = {entry.case: entry.patient for entry in cases}
    chosen = {entry.case for entry in cases} - {*splits.left_out}
    assert len(splits.folds) == folds
    assert sorted(case for fold in splits.folds for case in fold["val"]) == sorted(chosen)
    for fold in splits.folds:
        assert fold["train"]
        assert fold["val"]
        assert not on_both_sides(patients, fold["train"], fold["val"])
        assert {*fold["train"], *fold["val"]} == chosen
    assert not find_problems(splits.folds, patients, list(patients), left_out=splits.left_out)
    if one:
        assert len(chosen) == len(cohort)
    shuffled = list(cases)
    order.shuffle(shuffled)
    assert make_splits(shuffled, options) == splits


@settings(max_examples=40, deadline=None)
@given(cohort=cohorts, few=st.sets(st.integers(1, 5), min_size=1), seed=st.integers(0, 99))
def test_few_are_nested_and_validate_on_the_same_cases(cohort, few, seed):
    assume(len(cohort) >= 3)
    cases, folds = cases_of(cohort), 3
    patients = {entry.case: entry.patient for entry in cases}
    base = make_splits(cases, SplitOptions(folds, seed=seed))
    smallest = min(len({patients[case] for case in fold["train"]}) for fold in base.folds)
    options = SplitOptions(folds, few=tuple(few), seed=seed)
    if max(few) > smallest:
        with pytest.raises(UserError, match="has only"):
            make_splits(cases, options)
        return
    splits = make_splits(cases, options)
    assert splits.folds[:folds] == base.folds
    larger = base.folds
    for step, number in reversed(list(enumerate(sorted(few), 1))):
        block = splits.folds[step * folds : (step + 1) * folds]
        for fold, above in zip(block, larger, strict=True):
            assert fold["val"] == above["val"]
            assert {*fold["train"]} <= {*above["train"]}
            taken = {patients[case] for case in fold["train"]}
            assert len(taken) == number
            assert {case for case in base.folds[block.index(fold)]["train"] if patients[case] in taken} == {
                *fold["train"]
            }
        larger = block
    assert splits.meanings[folds] == f"{min(few)} training patients of fold 0"


@settings(max_examples=40, deadline=None)
@given(cohort=cohorts, seed=st.integers(0, 99), development=st.sampled_from([0.0, 0.15, 0.4]))
def test_a_test_share_is_in_no_fold(cohort, seed, development):
    assume(len(cohort) >= 5)
    cases = cases_of(cohort)
    patients = {entry.case: entry.patient for entry in cases}
    splits = make_splits(cases, SplitOptions(3, development=development, test=0.15, seed=seed))
    assert splits.test
    assert len(splits.folds) == (1 if development else 3)
    for fold in splits.folds:
        seen = [*fold["train"], *fold["val"]]
        assert not on_both_sides(patients, seen, splits.test)
        assert sorted([*seen, *splits.test]) == sorted(patients)
        assert not on_both_sides(patients, fold["train"], fold["val"])


def test_strata_are_kept_in_proportion():
    cases = [LabelledCase(f"c{n:02d}", f"p{n:02d}", "rare" if n % 5 == 0 else "common") for n in range(60)]
    rare = {case.case for case in cases if case.stratum == "rare"}
    splits = make_splits(cases, SplitOptions(4, few=(5, 10, 20), test=0.2))
    assert len(rare & {*splits.test}) in (2, 3)
    assert all(len(rare & {*fold["val"]}) in (2, 3) for fold in splits.folds[:4])
    for fold, meaning in zip(splits.folds[4:], splits.meanings[4:], strict=True):
        wanted = int(meaning.split()[0]) / 5
        assert abs(len(rare & {*fold["train"]}) - wanted) <= 1


def test_many_numbers_become_thirds_and_few_stay_classes():
    cases = [f"c{n}" for n in range(10)]
    volume = {case: str(n * 1.5) for n, case in enumerate(cases)}
    field = {case: "3" if n % 2 else "1.5" for n, case in enumerate(cases[:-1])}
    made = assign_strata([volume, field], cases)
    assert made["c0"] == "none / 1.5"
    assert [made[f"c{n}"].split(" / ")[0] for n in range(1, 10)] == ["low"] * 3 + ["middle"] * 3 + ["high"] * 3
    assert made["c9"] == "high / unknown"
    assert set(assign_strata([], cases).values()) == {""}
    grade = {case: str(n % 5) for n, case in enumerate(cases)}
    assert assign_strata([grade], cases) == grade
    age = {case: "n/a" if case == "c4" else str(60 + n) for n, case in enumerate(cases)}
    assert sorted(assign_strata([age], cases).values()) == ["high"] * 3 + ["low"] * 3 + ["middle"] * 3 + ["n/a"]


def test_a_small_stratum_cannot_stop_a_split_and_is_mentioned_when_it_matters():
    cases = [LabelledCase(f"c{n}", f"p{n}", f"s{n}") for n in range(7)]
    splits = make_splits(cases, SplitOptions(3, test=0.2))
    assert len(splits.notes) == 2


# ---------- tables


def test_tables_of_hospitals(tmp_path):
    file = tmp_path / "sessions.csv"
    file.write_text("\ufeffname;scan;patient;vendor\nx;a_1;A;GE, old\ny;a_2;A;Philips\nz;b_1;B;GE\n", encoding="utf-8")
    table = read_case_table(file, None, ["a_1", "a_2", "b_1"])
    assert table.patients("patient") == {"a_1": "A", "a_2": "A", "b_1": "B"}
    assert table.column("vendor", "--stratify")["a_1"] == "GE, old"
    assert read_case_table(file, "name", ["a_1"]).patients("patient") == {"x": "A", "y": "A", "z": "B"}


def test_tables_as_spreadsheets_leave_them(tmp_path):
    file = tmp_path / "table.csv"
    file.write_text('case;"patient, id";;\r\na;A;;\r\n;B;;\r\n;C;;\r\n', encoding="utf-8")
    assert read_case_table(file, None, ["a"]).columns == {"case": {"a": "a"}, "patient, id": {"a": "A"}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "has no rows"),
        ("case,patient\n", "has no rows"),
        ("case,case\na,b\n", "two columns of the same name"),
        ("case,patient\nc0,A,1\n", "has 3 fields in row 2"),
        ("case,patient\nc0,A\nc0,B\n", "two different rows for c0"),
        ("case,patient\nx,A\ny,B\n", "no column with case names such as c0"),
        ("case,patient\nc0,A\n", "has no row for c1, c2, c3 and 5 more"),
        ("case,patient\n" + "".join(f"c{n},\n" for n in range(9)), "has no patient for c0, c1, c2 and 6 more"),
        ("case,person\n" + "".join(f"c{n},{n}\n" for n in range(9)), "no column patient, only case, person"),
        (b"\xff\xfe\x00case", "cannot be read as a table"),
    ],
)
def test_mistakes_in_a_table(data, tmp_path, refused, content, sentence):
    file = tmp_path / "table.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(main, "-d", "905", "--csv", str(file))
    assert sentence in message
    assert message.count("\n") == 1


# ---------- the command


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Nine labelled cases of five patients, P4 with one; gives the folder that nnU-Net reads splits from."""
    Workspace(tmp_path).use_here(monkeypatch)
    raw = tmp_path / "raw" / "Dataset905_Cohort"
    rows = ["case,patient,vendor"]
    for number in range(9):
        label = np.zeros(SHAPE, np.uint8)
        label[2, 3, :number] = 1
        write_case(raw / "imagesTr", f"c{number}", [np.ones(SHAPE)], label)
        rows.append(f"c{number},P{number // 2},{'AB'[number // 2 % 2]}")
    (raw / "sessions.csv").write_text("\n".join(rows))
    (raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}))
    return tmp_path / "preprocessed" / "Dataset905_Cohort"


def typed(*arguments: str) -> None:
    main(["-d", "905", "--csv", "sessions.csv", *arguments])


def test_the_command_writes_what_nnunet_reads(data, capsys):
    typed("--folds", "3", "--stratify", "vendor", "--stratify_volume", "--few", "2", "1")
    said = capsys.readouterr().out
    folds = json.loads((data / "splits_final.json").read_text())
    assert len(folds) == 9
    assert "6  2 training patients of fold 0" in said
    assert "give -f 0 1 2." in said
    assert json.loads((data / "patients.json").read_text())["c8"] == "P4"
    assert json.loads((data / "split.json").read_text())["folds"][8] == "2 training patients of fold 2"
    main(["-d", "905", "--verify"])
    assert "9 folds of 9 cases of 5 patients, none on two sides" in capsys.readouterr().out


def test_the_printed_command_can_be_typed(data, tmp_path, capsys):
    (tmp_path / "raw" / "Dataset905_Cohort").rename(tmp_path / "raw" / "Dataset905_Head and Neck")
    main(["-d", "Dataset905_Head and Neck"])
    assert "nnUNetv2_train 'Dataset905_Head and Neck' 3d_fullres FOLD" in capsys.readouterr().out


def test_a_patient_of_a_test_case_is_in_no_fold(data, refused):
    """Splits that were made without the table take two scans of a patient for two patients."""
    main(["-d", "905", "--folds", "2", "--test", "0.3"])
    record = json.loads((data / "split.json").read_text()) | {"test": ["c1", "c5"]}
    folds = [{"train": ["c0", "c2", "c3"], "val": ["c4", "c6", "c7", "c8"]}]
    for name, content in {"splits_final.json": folds, "split.json": record}.items():
        (data / name).write_text(json.dumps(content))
    message = refused(lambda _: typed("--verify"))
    assert "fold 0 has cases of P0, P2, of whom other cases are for testing" in message


def test_the_parts_of_a_split_are_drawn(data, tmp_path, monkeypatch, capsys):
    drawn = []
    original = split_figure_module.split_figure
    monkeypatch.setattr(split_figure_module, "split_figure", lambda *given: drawn.append(given) or original(*given))
    rows = [f"c{n},P{n // 2},{n + 1},K{n % 2}" for n in range(8)] + ["c8,P4,,"]
    (tmp_path / "scans.csv").write_text("\n".join(["case,patient,slice_thickness_mm,kernel", *rows]))
    monkeypatch.chdir(tmp_path)
    png, svg = tmp_path / "parts.png", tmp_path / "again.svg"
    arguments = ["-d", "905", "--csv", str(tmp_path / "scans.csv")]
    main([*arguments, *"--folds 2 --test 0.2 --few 1 --figure".split(), str(png)])
    assert f"Wrote {png}." in capsys.readouterr().out
    assert png.read_bytes().startswith(b"\x89PNG")
    parts, scans = drawn[0]
    assert list(parts) == ["fold 0", "fold 1", "test"]
    assert sorted(case for cases in parts.values() for case in cases) == [f"c{n}" for n in range(9)]
    assert scans.thickness == {f"c{n}": n + 1 for n in range(8)}
    assert scans.kernel == {f"c{n}": f"K{n % 2}" for n in range(8)}
    assert scans.volume["c4"] == pytest.approx(2 * scans.volume["c2"])
    main([*arguments, "--verify", "--figure", str(svg)])
    assert drawn[1] == drawn[0]
    text = svg.read_text()
    assert all(title in text for title in ("Labelled volume", "Slice thickness", "Kernel"))


def test_a_development_set_is_drawn_beside_the_training_set(data):
    assert parts_of([{"train": ["a", "b"], "val": ["c"]}, {"train": ["a"], "val": ["c"]}], ["d"]) == {
        "training": ["a", "b"],
        "validation": ["c"],
        "test": ["d"],
    }


@pytest.mark.parametrize(("file", "sentence"), [("parts.pdf", "must end with .png or .svg"), ("no/p.png", "make it")])
def test_a_figure_that_cannot_be_written_stops_the_split(data, refused, file, sentence):
    assert sentence in refused(lambda _: typed("--folds", "3", "--figure", file))
    assert not data.exists()


def test_other_splits_are_refused_and_then_moved_aside(data, refused, capsys):
    typed("--folds", "3")
    first = (data / "splits_final.json").read_text()
    typed("--folds", "3")  # the same ones are no loss
    assert not list(data.glob("*_until_*"))
    assert "--overwrite" in refused(lambda _: typed("--folds", "4"))
    assert (data / "splits_final.json").read_text() == first
    typed("--folds", "4", "--overwrite")
    (aside,) = data.glob("splits_final_until_*.json")
    assert aside.read_text() == first
    assert f"Moved aside: {aside}" in capsys.readouterr().out


def test_development_test_and_one_per_patient(data, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    typed("--development", "0.2", "--test", "0.2", "--one_per_patient", "-o", str(out))
    (fold,) = json.loads((out / "splits_final.json").read_text())
    record = json.loads((out / "split.json").read_text())
    assert [len(side) for side in (fold["train"], fold["val"], record["test"], record["left_out"])] == [3, 1, 1, 4]
    said = capsys.readouterr().out
    assert "1 for testing, 4 left out" in said
    patients = json.loads((out / "patients.json").read_text())
    siblings = [case for case in record["left_out"] if patients[case] == patients[record["test"][0]]]
    assert all(f"and {case} too, which are of the same patients" in said for case in siblings)
    assert not data.exists()
    typed("--verify", "-o", str(out))
    assert "1 folds of 4 cases of 4 patients" in capsys.readouterr().out


def test_cases_can_be_left_out(data, tmp_path, refused):
    (tmp_path / "empty.txt").write_text("c0\n\n")
    typed("--folds", "2", "--leave_out", str(tmp_path / "empty.txt"))
    assert json.loads((data / "split.json").read_text())["left_out"] == ["c0"]
    typed("--verify")
    (tmp_path / "empty.txt").write_text("c99\n")
    assert "unknown cases (c99)" in refused(lambda _: typed("--leave_out", str(tmp_path / "empty.txt")))
    assert "check --leave_out" in refused(lambda _: typed("--leave_out", str(tmp_path / "nowhere.txt")))


def test_names_that_a_spreadsheet_has_changed_are_mentioned(data, tmp_path, capsys):
    assert alike_names({"007", "7", "7.0", "70", "Ab1", "aB1", "b"}) == [["007", "7", "7.0"], ["Ab1", "aB1"]]
    assert alike_names({"Mu\u0308ller", "M\u00fcller"}) == [["Mu\u0308ller", "M\u00fcller"]]
    table = tmp_path / "table.csv"
    table.write_text("case,patient\n" + "".join(f"c{n},{'0' * (n % 2)}{n // 2}\n" for n in range(9)))
    main(["-d", "905", "--csv", str(table), "--folds", "2"])
    assert "Are these different patients? 0, 00; 01, 1;" in capsys.readouterr().out


def test_unlabelled_scans_are_found_in_the_table_by_their_files_too(data, tmp_path, capsys):
    for case, folder in {"u0": "imagesUn", "u1": "imagesUn", "t0": "imagesTs"}.items():
        write_case(tmp_path / "raw" / "Dataset905_Cohort" / folder, case, [np.ones(SHAPE)])
    table = tmp_path / "table.csv"
    rows = [f"c{number}.nii.gz,P{number // 2}" for number in range(9)]
    table.write_text("\n".join(["file,patient", *rows, "u0_0000.nii.gz,p0", "t0_0000.nii.gz,P9"]))
    main(["-d", "905", "--csv", str(table), "--folds", "2"])
    patients = json.loads((data / "patients.json").read_text())
    assert (patients["u0"], patients["t0"]) == ("p0", "P9")
    printed = capsys.readouterr().out
    assert "has no row for u1 of imagesUn: each counts as a patient of its own" in printed
    assert "Are these different patients? P0, p0." in printed


def test_without_a_table_each_case_is_a_patient_or_those_of_a_former_call(data, capsys):
    main(["-d", "905", "--folds", "9"])
    assert "each case counts as a patient of its own" in capsys.readouterr().out
    typed("--folds", "3", "--overwrite")
    main(["-d", "905", "--folds", "2", "--overwrite"])
    assert "Patients are taken from" in capsys.readouterr().out
    assert json.loads((data / "patients.json").read_text())["c8"] == "P4"


def test_a_case_that_came_after_the_split(data, tmp_path, refused, capsys):
    """Without a table it is a patient of its own, as the others are; a table that was given has to have it."""
    main(["-d", "905", "--folds", "2"])
    label = next((tmp_path / "raw" / "Dataset905_Cohort" / "labelsTr").iterdir())
    label.with_name("c9.nii.gz").write_bytes(label.read_bytes())
    assert "c9 is in no fold" in refused(main, "-d", "905", "--verify")
    main(["-d", "905", "--folds", "2", "--overwrite"])
    assert json.loads((data / "patients.json").read_text())["c9"] == "c9"
    label.with_name("c9.nii.gz").unlink()
    typed("--folds", "2", "--overwrite")
    label.with_name("c9.nii.gz").write_bytes(label.read_bytes())
    assert "patients.json has no row for c9: give a table of all cases with --csv." in refused(main, "-d", "905")


def test_labels_of_the_preprocessed_dataset_do(data, tmp_path):
    raw = tmp_path / "raw" / "Dataset905_Cohort"
    data.mkdir(parents=True)
    (raw / "labelsTr").rename(data / "gt_segmentations")
    (raw / "dataset.json").rename(data / "dataset.json")
    typed("--folds", "2")
    assert (data / "splits_final.json").is_file()


def test_labels_with_another_ending_are_named(data, tmp_path, refused):
    """nnU-Net passes over them, and so would the folds."""
    labels = tmp_path / "raw" / "Dataset905_Cohort" / "labelsTr"
    (labels / "c2.nii.gz").rename(labels / "c2.NII.GZ")
    (labels / "c3.nrrd").touch()  # the case has a label as well
    (labels / "c9.mha").touch()
    (labels / "notes.txt").touch()
    message = refused(lambda _: typed("--folds", "2"))
    assert f"c2.NII.GZ, c9.mha in {labels} do not end with .nii.gz" in message
    assert not data.exists()
    (labels / "c2.NII.GZ").rename(labels / "c2.nii.gz")
    (labels / "c9.mha").unlink()
    typed("--folds", "2")


@pytest.mark.parametrize(
    ("folds", "sentence"),
    [
        ([{"train": ["c0", "c2"], "val": ["c1"]}], "fold 0 has patient P0 in train and in val"),
        ([{"train": ["c0"], "val": ["c0"]}], "fold 0 has c0 in train and in val"),
        ([{"train": ["c0"], "val": ["c99"]}], "fold 0 has c99, without a label"),
        ([{"train": ["c0"], "val": ["c2"]}], "c1, c3, c4 and 4 more are in no fold"),
        ([{"train": ["c0", "c0"], "val": []}], "fold 0 has no cases in val"),
        ([{"train": ["c0", "c0"], "val": ["c2"]}], "fold 0 lists c0 twice in train"),
        ([{"train": ["c0"]}], "give a list of folds"),
        ({}, "give a list of folds"),
        (None, "splits_final.json is missing"),
    ],
)
def test_verify_finds(data, refused, folds, sentence):
    data.mkdir(parents=True)
    if folds is not None:
        (data / "splits_final.json").write_text(json.dumps(folds))
    assert sentence in refused(lambda _: typed("--verify"))


def test_seeds_and_patients_that_cannot_be(data, refused):
    assert "--patient needs a table" in refused(main, "-d", "905", "--patient", "person")
    with pytest.raises(SystemExit) as stop:
        typed("--seed", "5000000000")
    assert stop.value.code == 2


def test_verify_finds_a_test_case_in_a_fold(data, refused):
    typed("--folds", "2", "--test", "0.2")
    (held,) = {tuple(json.loads((data / "split.json").read_text())["test"])}
    folds = json.loads((data / "splits_final.json").read_text())
    folds[1]["train"] += held
    (data / "splits_final.json").write_text(json.dumps(folds))
    assert f"fold 1 has {held[0]}" in refused(lambda _: typed("--verify"))
    (data / "split.json").write_text("[]")
    assert "split.json cannot be used" in refused(lambda _: typed("--verify"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--folds 6", "5 patients are too few for --folds 6"),
        ("--folds 1", "give 2 or more"),
        ("--folds 4 --test 0.3", "too few for --test 0.3 and --folds 4"),
        ("--development 0.5 --test 0.5", "leave no patient to train on"),
        ("--development 0.45 --test 0.54", "too few for --test 0.54 and --development 0.45"),
        ("--folds 3 --few 4", "--few 4 is too many: fold"),
        ("--stratify scanner", "no column scanner, only case, patient, vendor: check --stratify"),
        ("--case name", "no column name, only case, patient, vendor: check --case"),
        ("--patient who", "no column who"),
        ("--csv nowhere.csv", "nowhere.csv is missing: check --csv"),
    ],
)
def test_mistakes_get_one_sentence(data, refused, arguments, sentence):
    message = refused(lambda _: typed(*arguments.split()))
    assert sentence in message
    assert message.count("\n") == 1
    assert not data.exists()


def test_mistakes_before_any_table(data, tmp_path, refused):
    assert "give it with --csv" in refused(main, "-d", "905", "--stratify", "vendor")
    assert "is not between 0 and 1" in refused(main, "-d", "905", "--test", "2")
    (tmp_path / "raw" / "Dataset905_Cohort" / "labelsTr" / "c3.nii.gz").write_bytes(b"broken")
    assert "c3.nii.gz cannot be read" in refused(lambda _: typed("--folds", "2", "--stratify_volume"))
    (tmp_path / "raw" / "Dataset905_Cohort" / "labelsTr").rename(tmp_path / "gone")
    assert "There are no labels" in refused(lambda _: typed("--folds", "2"))
    (tmp_path / "file").touch()
    (tmp_path / "gone").rename(tmp_path / "raw" / "Dataset905_Cohort" / "labelsTr")
    assert "cannot be written to" in refused(lambda _: typed("--folds", "2", "-o", str(tmp_path / "file")))


def test_splits_come_last_so_that_none_are_without_patients_and_test_cases(data, tmp_path, monkeypatch, refused):
    typed("--folds", "2")
    written = []

    def full_disk(content, file):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        written.append(file.name)
        write_json(content, file)

    monkeypatch.setattr(files, "write_json", full_disk)
    assert "No space left" in refused(lambda _: typed("--folds", "3", "--overwrite"))
    assert not (data / "splits_final.json").exists()
    assert len(list(data.glob("splits_final_until_*.json"))) == 1


def test_two_calls_at_once_do_not_overwrite_each_other(data, refused):
    with locked(data):
        assert "Another process is writing to" in refused(lambda _: typed("--folds", "2"))
    assert not data.exists()


# ---------- warnings where splits are used


def test_the_warning_needs_patients_that_are_known(tmp_path, refused):
    assert separation_warning(tmp_path, ["a"], ["b"]) is None
    (tmp_path / "patients.json").write_text('{"a": "P", "b": "P", "c": "Q"}')
    assert separation_warning(tmp_path, ["a", "z"], ["c", "y"]) is None
    assert "(P)" in str(separation_warning(tmp_path, ["a", "c"], ["b"]))
    (tmp_path / "patients.json").write_text("[]")
    with pytest.raises(UserError, match="must be an object"):
        separation_warning(tmp_path, ["a"], ["b"])


@pytest.mark.slow
def test_pretraining_and_training_warn_of_separated_patients(in_workspace, caplog):
    import torch

    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.folds import pretraining_cases
    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline

    folder = in_workspace.preprocessed
    names = [f"train_{number}" for number in range(6)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    plan = load_plan(find_dataset("901"), "nnUNetPlans", "3d_fullres")

    def trained() -> str:
        plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": False}
        description = json.loads((folder / "dataset.json").read_text())
        trainer = nnUNetTrainerBaseline(plans, "3d_fullres", 0, description, torch.device("cpu"))
        trainer.get_tr_and_val_datasets()
        return Path(trainer.log_file).read_text()

    with caplog.at_level(logging.INFO):
        assert [case.name for case in pretraining_cases(plan, "0")] == names[:4]
        assert "are not read" not in caplog.text
        assert "too optimistic" not in trained()
        (folder / "patients.json").write_text(json.dumps({"train_3": "P", "train_4": "P"}))
        assert [case.name for case in pretraining_cases(plan, "all")] == names
        assert "are not read" not in caplog.text
        assert [case.name for case in pretraining_cases(plan, "0")] == names[:3]
    assert "1 scans of patients held out" in caplog.text
    assert "seen in training too (P)" in trained()


def test_held_out_cases_are_linked_to_a_folder(in_workspace, tmp_path, refused, capsys):
    held_out = tmp_path / "held_out"
    flags = ["-d", "901", "--folds", "2", "--test_folder", str(held_out)]
    assert "add --test, or --verify" in refused(main, *flags)
    main([*flags, "--test", "0.3"])
    tested = json.loads((in_workspace.preprocessed / "split.json").read_text())["test"]
    assert sorted(file.name for file in (held_out / "labels").iterdir()) == [f"{case}.nii.gz" for case in tested]
    images = sorted(file.name for file in (held_out / "images").iterdir())
    assert images == [f"{case}_{channel:04}.nii.gz" for case in tested for channel in range(2)]
    capsys.readouterr()
    again = ["-d", "901", "--verify", "--test_folder"]
    assert "give a new folder with --test_folder" in refused(main, *again, str(held_out))
    main([*again, str(tmp_path / "again")])
    assert f"Linked {len(tested)} cases" in capsys.readouterr().out
    assert len(list((tmp_path / "again" / "images").iterdir())) == 2 * len(tested)


LABELLED, POOL = [f"train_{number}" for number in range(6)], [f"pool_{number}" for number in range(3)]


@pytest.fixture
def pretraining_names(in_workspace):
    """Return the names of the preprocessed cases that pre-training reads for a fold."""
    from nnunet_vit_mae.cli import preprocess
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.folds import pretraining_cases
    from nnunet_vit_mae.nnunet.plans import load_plan

    preprocess.main("-d 901 -np 1".split())
    plan = load_plan(find_dataset("901"), "nnUNetPlans", "3d_fullres")
    return lambda fold: [case.name for case in pretraining_cases(plan, fold)]


def split_901(in_workspace, patients: dict[str, str], *flags: str) -> dict:
    table = in_workspace.root / "patients.csv"
    table.write_text("case,patient\n" + "".join(f"{case},{patient}\n" for case, patient in patients.items()))
    main(["-d", "901", "--csv", str(table), *flags])
    return json.loads((in_workspace.preprocessed / "split.json").read_text())


@pytest.mark.slow
def test_pretraining_reads_no_scan_of_a_test_patient(in_workspace, pretraining_names, caplog):
    patients = {case: f"P{number // 2}" for number, case in enumerate(LABELLED)}  # two labelled scans of each
    patients |= {case: f"P{number}" for number, case in enumerate(POOL)}
    record = split_901(in_workspace, patients, "--folds", "2", "--test", "0.3")
    tested = {patients[case] for case in record["test"]}
    expected = [case for case in [*LABELLED, *POOL] if patients[case] not in tested]
    assert len(expected) == 6
    with caplog.at_level(logging.INFO):
        assert pretraining_names("all") == expected
    assert "3 scans of patients held out for testing or validation are not read" in caplog.text
    for fold in ("0", "1"):
        split = json.loads((in_workspace.preprocessed / "splits_final.json").read_text())[int(fold)]
        closed = tested | {patients[case] for case in split["val"]}
        assert pretraining_names(fold) == [case for case in expected if patients[case] not in closed]


@pytest.mark.slow
def test_pretraining_reads_no_scan_of_a_patient_in_the_test_folder(in_workspace, pretraining_names):
    patients = {case: case for case in LABELLED} | {"pool_1": "P", "pool_2": "Q", "test_7": "P"}
    write_case(in_workspace.raw / "imagesTs", "test_7", [np.ones(SHAPE)] * 2)
    write_case(in_workspace.raw / "imagesTs", LABELLED[0], [np.ones(SHAPE)] * 2)  # of somebody else, of the same name
    split_901(in_workspace, patients, "--folds", "2")
    assert pretraining_names("all") == [*LABELLED, "pool_0", "pool_2"]


@pytest.mark.parametrize(
    ("fold", "parent"), [("0", "0"), ("2", "0"), ("3", "1"), ("all", "all"), ("7", "7"), ("02", "02"), ("-1", "-1")]
)
def test_only_a_fold_as_nnunet_names_it_has_a_parent(tmp_path, fold, parent):
    splits = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps([*splits, *splits]))
    (tmp_path / "split.json").write_text(json.dumps({"test": [], "left_out": [], "parents": [0, 1, 0, 1]}))
    assert parent_fold(tmp_path, fold) == parent


@pytest.mark.slow
def test_a_fold_of_few_patients_is_pretrained_on_the_scans_of_its_parent(in_workspace, pretraining_names):
    record = split_901(in_workspace, {case: case for case in LABELLED}, "--folds", "3", "--few", "1", "2")
    assert record["parents"] == [0, 1, 2] * 3
    for fold, parent in enumerate(record["parents"]):
        assert pretraining_names(str(fold)) == pretraining_names(str(parent))
    splits = json.loads((in_workspace.preprocessed / "splits_final.json").read_text())
    splits[3] |= {"train": splits[4]["train"], "val": splits[4]["val"]}  # another hand changed the file of splits
    (in_workspace.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    assert pretraining_names("3") == [*splits[4]["train"], *POOL]


@pytest.mark.slow
def test_other_series_of_training_patients_belong_to_pretraining(in_workspace, pretraining_names):
    patients = {case: f"P{number // 2}" for number, case in enumerate(LABELLED)}
    (in_workspace.root / "bad.txt").write_text("train_5\n")
    flags = ["--folds", "2", "--one_per_patient", "--leave_out", str(in_workspace.root / "bad.txt")]
    record = split_901(in_workspace, patients, *flags)
    assert len(record["other_series"]) == 2
    assert set(record["left_out"]) == {*record["other_series"], "train_5"}
    assert pretraining_names("all") == [*LABELLED[:5], *POOL]
    splits = json.loads((in_workspace.preprocessed / "splits_final.json").read_text())
    for number, split in enumerate(splits):
        of_training = {patients[case] for case in split["train"]}
        expected = [case for case in LABELLED[:5] if patients[case] in of_training]
        assert set(split["train"]) < set(expected) or expected == split["train"]
        assert pretraining_names(str(number)) == [*expected, *POOL]


@pytest.mark.slow
def test_training_with_few_patients_takes_the_encoder_of_the_parent(in_workspace):
    import torch

    from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerViTMAE
    from nnunet_vit_mae.storage.layout import encoder_file

    split_901(in_workspace, {case: case for case in LABELLED}, "--folds", "3", "--few", "1")
    plans = json.loads((in_workspace.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainerViTMAE(plans, "3d_fullres", 4, description, torch.device("cpu"))
    for fold in ("all", "1", "4"):  # each is preferred to those before
        file = encoder_file(in_workspace.results, "nnUNetPlans", "3d_fullres", fold)
        file.parent.mkdir(parents=True)
        file.touch()
        assert trainer._find_encoder() == file
