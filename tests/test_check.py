"""A dataset with one defect at a time: what is found, how grave it is, and what is written."""

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Workspace, read_voxels
from hypothesis import given
from hypothesis import strategies as st

from nnunet_vit_mae.cli.check import main
from nnunet_vit_mae.datasets.check import check_report
from nnunet_vit_mae.datasets.check.across_cases import robust_z, thickness_histogram
from nnunet_vit_mae.datasets.check.inspection import CaseSummary
from nnunet_vit_mae.imaging.volumes import Geometry

SIZE = (9, 8, 7)  # x y z
SPACING = (0.7, 1.1, 3.3)


@dataclass(frozen=True)
class RawData:
    """Six training, one unlabelled and one test case of two channels, without a defect."""

    raw: Path

    def file(self, name: str) -> Path:
        return self.raw / f"{name}.nii.gz"

    def write(self, name: str, array: np.ndarray | None = None, **geometry) -> None:
        """Noise that depends on the name, or the array, in an oblique volume."""
        size = geometry.get("size", SIZE)
        noise = np.random.default_rng(zlib.crc32(name.encode())).normal(100, 20, size[::-1]).astype(np.float32)
        image = sitk.GetImageFromArray(noise if array is None else array)
        image.SetSpacing(geometry.get("spacing", SPACING))
        image.SetOrigin(geometry.get("origin", (-9.1, 12.3, -7.7)))
        image.SetDirection(geometry.get("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1)))
        self.file(name).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(self.file(name)), useCompression=True)

    def fill(self) -> None:
        for case in (*(f"imagesTr/a{number}" for number in range(6)), "imagesUn/u", "imagesTs/t"):
            self.write(f"{case}_0000")
            self.write(f"{case}_0001")
        for number in range(6):
            self.write(f"labelsTr/a{number}", label(number))
        self.describe()

    def describe(self, **changes) -> None:
        content = {
            "channel_names": {"0": "T1", "1": "FLAIR"},
            "labels": {"background": 0, "x": 1},
            "numTraining": 6,
            "file_ending": ".nii.gz",
        }
        (self.raw / "dataset.json").write_text(json.dumps(content | changes))

    def array(self, name: str) -> np.ndarray:
        return read_voxels(self.file(name))


def label(seed: int = 0) -> np.ndarray:
    array = np.zeros(SIZE[::-1], np.uint8)
    array[2, 3, : 2 + seed] = 1
    return array


@pytest.fixture
def data(tmp_path, monkeypatch) -> RawData:
    Workspace(tmp_path).use_here(monkeypatch)
    monkeypatch.chdir(tmp_path)
    data = RawData(tmp_path / "raw" / "Dataset906_Checked")
    data.fill()
    return data


@pytest.fixture
def found(data, monkeypatch):
    """Run the command without its picture, which takes longest; gives (case, kind) -> text by level."""
    monkeypatch.setattr(check_report, "write_figure", lambda *_: None)

    def run(*arguments: str) -> dict[str, dict[tuple[str, str], str]]:
        code = 0
        try:
            main(["-d", "906", "-np", "1", *arguments])
        except SystemExit as stop:
            code = stop.code
        content = json.loads(Path("check_Dataset906_Checked/check.json").read_text())
        assert code == (2 if content["errors"] else 0)
        return {
            level: {(entry["case"], entry["kind"]): entry["text"] for entry in content[level]}
            for level in ("errors", "warnings")
        }

    return run


def test_a_good_dataset_has_nothing_to_say_and_is_not_touched(data, found, capsys):
    (data.raw / "README.txt").write_text("of mae3d_convert, which is no mistake\n")
    before = {file: file.read_bytes() for file in data.raw.rglob("*") if file.is_file()}
    assert found() == {"errors": {}, "warnings": {}}
    said = capsys.readouterr().out
    assert "No problems were found." in said
    assert "3-3.5 mm in 8" in said
    assert {file: file.read_bytes() for file in data.raw.rglob("*") if file.is_file()} == before
    assert "check.json " in Path("check_Dataset906_Checked/README.txt").read_text()
    content = json.loads(Path("check_Dataset906_Checked/check.json").read_text())
    case = content["cases"]["imagesTr/a3"]
    assert case["size"] == list(SIZE)
    assert case["orientation"] == "LPS"
    assert case["label_mm3"]["1"] == pytest.approx(5 * np.prod(SPACING))
    assert set(case["intensities"]) == {"T1", "FLAIR"}


def test_several_processes_find_the_same(data, found):
    data.file("imagesTr/a2_0001").unlink()
    alone = found()
    assert found("-np", "2") == alone
    assert list(alone["errors"]) == [("imagesTr/a2", "missing channel")]


def test_a_file_with_a_wrong_checksum_is_damaged(data, found):
    data.write("imagesTr/a4_0001", np.random.default_rng(0).random((40, 50, 60)).astype(np.float32))  # a long file
    file = data.file("imagesTr/a4_0001")
    content = bytearray(file.read_bytes())
    content[-8] ^= 1  # the checksum itself: programs read the voxels without an error
    file.write_bytes(content)
    assert "a4_0001.nii.gz cannot be read" in found()["errors"]["imagesTr/a4", "unreadable"]


def test_unreadable_files(data, found):
    data.file("imagesTr/a0_0000").write_bytes(b"no image")
    whole = data.file("imagesTr/a1_0001").read_bytes()
    data.file("imagesTr/a1_0001").write_bytes(whole[: len(whole) // 2])
    content = gzip.decompress(data.file("labelsTr/a2").read_bytes())
    data.file("labelsTr/a2").write_bytes(gzip.compress(content[:-9]))
    colours = sitk.GetImageFromArray(np.ones((*SIZE[::-1], 2), np.float32), isVector=True)
    sitk.WriteImage(colours, str(data.file("imagesUn/u_0000")))
    sitk.WriteImage(sitk.GetImageFromArray(np.eye(5, 7, dtype=np.float32)), str(data.file("imagesTs/t_0000")))
    errors = found()["errors"]
    for case in ("imagesTr/a0", "imagesTr/a1", "imagesTr/a2", "imagesUn/u", "imagesTs/t"):
        assert "cannot be read" in errors[case, "unreadable"]
    assert "cut off" in errors["imagesTr/a2", "unreadable"]


def test_voxels_that_cannot_be(data, found):
    for case, value in (("a0", np.nan), ("a1", np.inf)):
        array = data.array(f"imagesTr/{case}_0000")
        array[1, 2, 3] = value
        data.write(f"imagesTr/{case}_0000", array)
    data.write("imagesTr/a2_0001", np.zeros(SIZE[::-1], np.uint8))
    data.write("imagesTr/a3_0001", np.full(SIZE[::-1], 7, np.int16))
    data.write("imagesTr/a4_0001", np.zeros(SIZE[::-1], np.uint8))
    record = {"imagesTr": {"a4": {"present": ["T1"], "filled": ["FLAIR"], "blank": []}}}
    (data.raw / "contrasts.json").write_text(json.dumps(record))
    errors = found()["errors"]
    assert set(errors) == {
        ("imagesTr/a0", "NaN or infinity"),
        ("imagesTr/a1", "NaN or infinity"),
        ("imagesTr/a2", "constant"),
        ("imagesTr/a3", "constant"),
    }
    assert "all zeros" in errors["imagesTr/a2", "constant"]
    assert "7 everywhere" in errors["imagesTr/a3", "constant"]


def test_files_that_are_missing_or_too_many(data, found):
    data.file("imagesTr/a0_0001").unlink()
    data.file("labelsTr/a1").unlink()
    for channel in ("0000", "0001"):
        data.file(f"imagesTr/a2_{channel}").unlink()
    data.write("imagesTr/a3_0002")
    data.file("imagesTr/a4_0001").rename(data.file("imagesTr/a4_1"))
    (data.raw / "labelsTr" / "a5.nii").write_bytes(gzip.decompress(data.file("labelsTr/a5").read_bytes()))
    data.file("labelsTr/a5").unlink()
    errors = found()["errors"]
    assert "move unlabelled cases" in errors["imagesTr/a1", "missing label"]
    assert "has a label named a5.nii, but labels must end with .nii.gz" in errors["imagesTr/a5", "missing label"]
    assert set(errors) == {
        ("imagesTr/a0", "missing channel"),
        ("imagesTr/a1", "missing label"),
        ("imagesTr/a2", "no image"),
        ("imagesTr/a3", "unknown channel"),
        ("imagesTr/a4", "missing channel"),
        ("imagesTr/a4_1", "misnamed"),
        ("imagesTr/a5", "missing label"),
        ("", "numTraining"),
    }


def test_labels_and_geometry(data, found):
    data.write("labelsTr/a0", label() * 3)
    data.write("labelsTr/a1", label() * np.float32(0.5))
    data.write("labelsTr/a2", label(), origin=(0, 0, 0))
    data.write("imagesTr/a3_0001", size=(9, 8, 6))
    data.write("labelsTr/a4", np.where(label(), np.inf, 0).astype(np.float32))
    errors = found()["errors"]
    assert set(errors) == {
        ("imagesTr/a0", "unknown label"),
        ("imagesTr/a1", "not integers"),
        ("imagesTr/a2", "geometry"),
        ("imagesTr/a3", "geometry"),
        ("imagesTr/a4", "not integers"),
    }
    assert "holds 3, which" in errors["imagesTr/a0", "unknown label"]
    assert "origin" in errors["imagesTr/a2", "geometry"]
    assert "size (9 8 7 and 9 8 6 voxels)" in errors["imagesTr/a3", "geometry"]


def test_a_label_along_other_axes_is_told_from_one_in_another_place(data, found):
    turned = sitk.DICOMOrient(sitk.ReadImage(str(data.file("labelsTr/a0"))), "SPR")
    sitk.WriteImage(turned, str(data.file("labelsTr/a0")))
    data.write("labelsTr/a1", label(1), origin=(0, 0, 0))
    errors = found()["errors"]
    assert "it is stored along other axes (SPR, not LPS), so turn it" in errors["imagesTr/a0", "geometry"]
    assert "so turn it" not in errors["imagesTr/a1", "geometry"]


def test_what_dataset_json_says(data, found):
    data.describe(labels={"background": 0, "x": 1, "y": 3}, numTraining=5)
    findings = found()
    assert "labels in dataset.json are 0, 1, 3" in findings["errors"]["", "label values"]
    assert "numTraining is 5" in findings["errors"]["", "numTraining"]
    assert "label 3" in findings["warnings"]["", "unused label"]


def test_regions_and_voxels_to_ignore_are_known(data, found):
    data.write("labelsTr/a0", label() * 3)
    data.write("labelsTr/a1", label() * 2)
    data.describe(labels={"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, regions_class_order=[1, 2])
    assert not found()["errors"]


def test_labels_that_nnunet_refuses_are_errors(data, found):
    data.describe(labels={"background": 0, "whole": [1, 2], "ignore": 1, "core": 2})
    errors = found()["errors"]
    assert "ignore is 1 in dataset.json, but nnU-Net requires the highest label, 2" in errors["", "label values"]
    assert "a label for each of the 2 regions" in errors["", "regions"]
    data.describe(labels={"background": 1, "x": 0})
    assert "must list background with the label 0" in found()["errors"]["", "label values"]


def test_copies_are_worse_on_the_test_side(data, found):
    data.write("imagesTs/t_0000", data.array("imagesTr/a0_0000").astype(np.float64))
    data.write("imagesUn/u_0001", data.array("imagesTr/a1_0001"))
    data.write("imagesTr/a3_0000", data.array("imagesTr/a2_0000"))
    data.write("imagesTr/a4_0000", data.array("imagesTr/a4_0001"))
    findings = found()
    assert findings["errors"] == {
        ("imagesTr/a0", "duplicate"): "has an image with the same voxels as one of imagesTs/t"
    }
    assert set(findings["warnings"]) == {
        ("imagesUn/u", "duplicate"),
        ("imagesTr/a3", "duplicate"),
        ("imagesTr/a4", "duplicate"),
    }


def test_many_copies_do_not_hide_the_one_that_is_tested_on(data, found):
    for number in range(12):
        for channel in range(2):
            data.write(f"imagesUn/u{number}_{channel:04d}", data.array(f"imagesTr/a0_{channel:04d}"))
    data.write("imagesTs/t_0000", data.array("imagesTr/a0_0000"))
    findings = found()
    cases = {case for case, kind in findings["errors"] if kind == "duplicate"}
    assert cases == {"imagesTr/a0", *(f"imagesUn/u{number}" for number in range(12))}


def test_patients_on_two_sides(data, found, tmp_path, capsys):
    (data.raw / "sessions.csv").write_text("case,patient\na0,P\na1,Q\nt,P\nu,Q\na2,Q\n")
    findings = found("--csv", "sessions.csv")
    assert "has no row for a3, a4, a5" in capsys.readouterr().out
    assert findings["errors"] == {("imagesTs/t", "patient on two sides"): "is of patient P: imagesTr/a0 and imagesTs/t"}
    assert list(findings["warnings"]) == [("imagesUn/u", "patient on two sides")]
    folder = tmp_path / "preprocessed" / "Dataset906_Checked"
    folder.mkdir(parents=True)
    (folder / "patients.json").write_text('{"a0": "P", "u": "P", "t": "p"}')
    assert list(found()["warnings"]) == [("imagesUn/u", "patient on two sides")]
    assert "Are these different patients? P, p." in capsys.readouterr().out


def test_the_same_name_on_two_sides_is_mentioned(data, found):
    for channel in ("0000", "0001"):
        data.write(f"imagesTs/a0_{channel}")
    assert list(found()["warnings"]) == [("imagesTs/a0", "same name")]


def test_outliers_and_orientations(data, found, capsys):
    data.write("imagesTr/a2_0001", data.array("imagesTr/a2_0001") * 10)
    for name in ("imagesTr/a3_0000", "imagesTr/a3_0001"):
        data.write(name, direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    data.write("labelsTr/a3", label(3), direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    for name in ("imagesUn/u_0000", "imagesUn/u_0001"):
        data.write(name, spacing=(5, 1, 1))
    findings = found()
    assert not findings["errors"]
    assert set(findings["warnings"]) == {
        ("imagesTr/a2", "intensity"),
        ("imagesTr/a3", "orientation"),
        ("imagesUn/u", "orientation"),
        ("imagesUn/u", "geometry"),
    }
    assert "has axes RAS, most have LPS" in findings["warnings"]["imagesTr/a3", "orientation"]
    assert "Warning: intensity (2)" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "expected"), [("lesion", False), ("left lesion", True)])
def test_a_mirror_image_is_an_error_where_labels_name_a_side(data, found, name, expected):
    data.describe(labels={"background": 0, name: 1})
    left_handed = (-1, 0, 0, 0, 1, 0, 0, 0, 1)
    for file in ("imagesTr/a3_0000", "imagesTr/a3_0001"):
        data.write(file, direction=left_handed)
    data.write("labelsTr/a3", label(3), direction=left_handed)
    findings = found()
    assert [key for key in findings["warnings"] if key[0] == "imagesTr/a3"] == [("imagesTr/a3", "orientation")]
    assert list(findings["errors"]) == ([("imagesTr/a3", "mirror image")] if expected else [])
    if expected:
        text = findings["errors"]["imagesTr/a3", "mirror image"]
        assert "(axes RPS, such as imagesTr/a0 LPS), and the label left lesion names a side" in text


def test_axes_do_not_matter_where_nnunet_turns_images(data, found):
    data.describe(labels={"background": 0, "left lesion": 1}, overwrite_image_reader_writer="SimpleITKIOWithReorient")
    left_handed = (-1, 0, 0, 0, 1, 0, 0, 0, 1)
    for file in ("imagesTr/a3_0000", "imagesTr/a3_0001"):
        data.write(file, direction=left_handed)
    data.write("labelsTr/a3", label(3), direction=left_handed)
    findings = found()
    assert not findings["errors"]
    assert not findings["warnings"]


def write_ct(data, labelled_hu: float) -> None:
    """Write CT of which 60% of the voxels are soft tissue, with a label of a given intensity."""
    data.describe(channel_names={"0": "CT"})
    for case in (*(f"imagesTr/a{number}" for number in range(6)), "imagesUn/u", "imagesTs/t"):
        data.file(f"{case}_0001").unlink()
        array = np.linspace(0, 100, np.prod(SIZE), dtype=np.float32).reshape(SIZE[::-1])
        array += 150 * (array > 60) + zlib.crc32(case.encode()) % 7  # no two are equal
        if case.startswith("imagesTr"):
            array[data.array(case.replace("images", "labels")) > 0] = labelled_hu
        data.write(f"{case}_0000", array)


def test_ct_whose_soft_tissue_nnunet_clips_away_is_warned_about(data, found):
    write_ct(data, labelled_hu=131)
    warnings = found()["warnings"]
    assert list(warnings) == [("", "CT clipping")]
    text = warnings["", "CT clipping"]
    assert "clips the channel CT below 131 HU" in text
    assert re.search(r"one constant \((59|60|61)% of the voxels of all labelled cases\)", text)
    assert "Name the channel CT_zscore in dataset.json" in text


@pytest.mark.parametrize(("name", "labelled_hu"), [("CT", 5.0), ("CT_zscore", 131.0)])
def test_ct_that_keeps_its_soft_tissue_is_not_warned_about(data, found, name, labelled_hu):
    write_ct(data, labelled_hu)
    data.describe(channel_names={"0": name})
    assert not found()["warnings"]


@pytest.mark.parametrize("cases", [6, 1])
def test_the_picture_is_drawn_for_any_number_of_cases(data, cases, tmp_path):
    for number in range(cases, 6):
        for file in data.raw.glob(f"*/a{number}*"):
            file.unlink()
    data.write("imagesTr/a0_0001", data.array("imagesTr/a0_0001") * 10)
    data.describe(numTraining=cases, labels={"background": 0, "x": 1, "rare": 2})
    main(["-d", "906", "-np", "1", "-o", str(tmp_path / "out")])
    assert (tmp_path / "out" / "check.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_drawn_as_they_are(data, tmp_path):
    for name in ("a$\\frac$", "\u6f22"):  # no formula, and no character of matplotlib's font
        data.write(f"imagesUn/{name}_0000")
        data.write(f"imagesUn/{name}_0001")
    main(["-d", "906", "-np", "1", "-o", str(tmp_path / "out")])
    assert (tmp_path / "out" / "check.png").read_bytes().startswith(b"\x89PNG")


def test_empty_labels_are_listed_for_the_split(data, found, capsys):
    data.write("labelsTr/a5", np.zeros(SIZE[::-1], np.uint8))
    data.write("labelsTr/a4", np.full(SIZE[::-1], 9, np.uint8))  # not in dataset.json: an error, but not empty
    assert "1 of 6 labels" in found()["warnings"]["", "empty label"]
    found("--list_empty")
    assert Path("check_Dataset906_Checked/empty_labels.txt").read_text() == "a5\n"
    assert "Their Dice is undefined if the prediction is empty too" in capsys.readouterr().out
    data.write("labelsTr/a5", data.array("labelsTr/a3"))
    found()
    assert Path("check_Dataset906_Checked/empty_labels.txt").read_text() == ""
    assert "empty_labels.txt is an empty list" in capsys.readouterr().out


def test_mistakes_get_one_sentence(data, tmp_path, refused):
    (tmp_path / "file").touch()
    assert "choose another folder with -o" in refused(main, "-d", "906", "-o", str(tmp_path / "file"))
    assert "check --csv" in refused(main, "-d", "906", "--csv", "nowhere.csv")
    data.describe(labels=[1, 2])
    assert "labels is [1, 2], but it must be an object" in refused(main, "-d", "906")
    data.describe(file_ending=".nrrd")
    assert "imagesTr (only files in .gz): put them there, or correct file_ending" in refused(main, "-d", "906")
    data.describe()
    for folder in ("imagesTr", "imagesTs", "imagesUn"):
        (data.raw / folder).rename(tmp_path / folder)
    assert "There are no images such as CASE_0000.nii.gz" in refused(main, "-d", "906")


# ---------- numbers


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=20), scale=st.floats(0.1, 10))
def test_robust_scores_do_not_depend_on_units(values, scale):
    scores = robust_z(values, 1.0)
    assert np.median(scores) == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(robust_z([value * scale for value in values], scale), scores, rtol=1e-6, atol=1e-6)


def test_one_among_equal_values_stands_out_only_by_more_than_a_unit():
    assert robust_z([5, 5, 5, 5, 9], 0.5)[-1] == pytest.approx(8)
    assert robust_z([5, 5, 5, 5, 5.1], 0.5)[-1] == pytest.approx(0.2)
    assert not robust_z([5, 5, 5, 5, 5], 0.0).any()


def test_thickness_is_counted_in_bins():
    looks = [
        CaseSummary("imagesTr", str(number), geometry=Geometry((1, 1, 1), (1, 1, thickness), (0, 0, 0), ()))
        for number, thickness in enumerate([3.0, 2.999999999, 3.4, 5.0])
    ]
    assert thickness_histogram([*looks, CaseSummary("imagesTr", "unread")]) == {"3-3.5 mm": 3, "5-5.5 mm": 1}
