"""Circled labels refined by threshold and component size: what stays, what is reported, and what is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Workspace, read_voxels, write_case
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nnunet_vit_mae.cli.refine_labels import main
from nnunet_vit_mae.datasets.label_refinement import refine
from nnunet_vit_mae.datasets.refinement_rule import CONNECTIVITIES, RefinementRule

SHAPE = (5, 7, 9)  # z y x


def kept(points: list[tuple[int, int, int]], **rule) -> set[tuple[int, int, int]]:
    """Which of these voxels of a dense, circled volume stay when all others are not dense."""
    image, label = np.full(SHAPE, 50.0), np.ones(SHAPE, np.uint8)
    for point in points:
        image[point] = 130
    refined, _ = refine(image, label, RefinementRule(**rule), (1,))
    return {tuple(int(index) for index in point) for point in np.argwhere(refined)}


@given(
    image=arrays(np.float32, SHAPE, elements=st.sampled_from([-1000.0, 129.0, 130.0, 900.0, float("nan")])),
    label=arrays(np.uint8, SHAPE, elements=st.integers(0, 2)),
    min_voxels=st.integers(1, 6),
    connectivity=st.sampled_from(CONNECTIVITIES),
)
def test_refined_labels_are_dense_parts_of_the_circles_and_counted(image, label, min_voxels, connectivity):
    rule = RefinementRule(min_voxels=min_voxels, connectivity=connectivity)
    refined, counts = refine(image, label, rule, (1, 2))
    assert refined.dtype == label.dtype
    inside = refined != 0
    np.testing.assert_array_equal(refined[inside], label[inside])
    assert (image[inside] >= 130).all()
    for value, (before, below, small, after, _) in zip((1, 2), counts, strict=True):
        assert before == (label == value).sum()
        assert after == (refined == value).sum() == before - below - small
    again, _ = refine(image, refined, rule, (1, 2))
    np.testing.assert_array_equal(again, refined)
    if min_voxels == 1:
        np.testing.assert_array_equal(inside, (label > 0) & (image >= 130))


def test_a_pixel_alone_in_its_slice_is_dropped_in_2d_and_stays_in_3d():
    column = [(1, 2, 3), (2, 2, 3)]
    assert kept(column, connectivity="2d") == set()
    assert kept(column, connectivity="3d") == set(column)


def test_voxels_that_touch_at_a_corner_belong_together():
    assert kept([(1, 2, 3), (1, 3, 4)]) == {(1, 2, 3), (1, 3, 4)}
    assert kept([(1, 2, 3), (1, 2, 5)]) == set()


def test_each_label_is_refined_for_itself_and_others_are_left():
    image, label = np.full(SHAPE, 200.0), np.zeros(SHAPE, np.int16)
    label[2, 2, 2:4] = (1, 2)  # neighbours of different labels are two single pixels
    label[4, 1, 1] = 3
    refined, counts = refine(image, label, RefinementRule(), (1, 2))
    assert set(np.unique(refined)) == {0, 3}
    assert counts == [(1, 0, 1, 0, 1), (1, 0, 1, 0, 1)]


# ---------- the command


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A raw dataset: case a has a circle with a dense part and a single voxel, case b nothing dense."""
    Workspace(tmp_path).use_here(monkeypatch)
    raw = tmp_path / "raw" / "Dataset904_Circled"
    image, label = np.full(SHAPE, 40.0), np.zeros(SHAPE, np.uint8)
    label[1:4, 1:6, 1:8] = 1
    write_case(raw / "imagesTr", "b", [image], label)
    image[2, 2, 2:5] = 400
    image[3, 5, 7] = 400
    write_case(raw / "imagesTr", "a", [image], label)
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "calcium": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))
    return raw


def test_the_command_writes_labels_a_report_and_says_what_has_changed(data, tmp_path, capsys):
    before = {file: file.read_bytes() for file in data.rglob("*.nii.gz")}
    main(["-d", "904", "-o", str(tmp_path / "refined")])
    said = capsys.readouterr().out
    assert "2 of 2 labels have changed" in said
    assert "(now empty)" in said
    assert {file: file.read_bytes() for file in data.rglob("*.nii.gz")} == before
    assert np.argwhere(read_voxels(tmp_path / "refined" / "a.nii.gz")).tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4]]
    assert not read_voxels(tmp_path / "refined" / "b.nii.gz").any()
    ours, theirs = (sitk.ReadImage(str(folder / "a.nii.gz")) for folder in (tmp_path / "refined", data / "labelsTr"))
    assert ours.GetSpacing() == theirs.GetSpacing()
    assert ours.GetPixelID() == theirs.GetPixelID()
    rows = list(csv.DictReader((tmp_path / "refined" / "refinement.csv").read_text().splitlines()))
    assert rows[0] == {
        "case": "a",
        "label": "1",
        "before": "105",
        "below_threshold": "101",
        "in_small_components": "1",
        "after": "3",
        "components_dropped": "1",
        "removed_mm3": "153.0",
    }


def test_folders_do_instead_of_a_dataset_and_flags_change_the_rule(data, tmp_path, capsys):
    folders = ["-i", str(data / "imagesTr"), "-l", str(data / "labelsTr"), "-o", str(tmp_path / "refined")]
    main([*folders, "--min_voxels", "1", "--threshold", "30", "--connectivity", "3d", "--labels", "1"])
    assert "0 of 2 labels have changed" in capsys.readouterr().out


def test_labels_to_ignore_are_left(data, tmp_path):
    description = json.loads((data / "dataset.json").read_text())
    description["labels"] = {"background": 0, "calcium": 2, "ignore": 1}
    (data / "dataset.json").write_text(json.dumps(description))
    main(["-d", "904", "-o", str(tmp_path / "refined")])
    np.testing.assert_array_equal(
        read_voxels(tmp_path / "refined" / "a.nii.gz"), read_voxels(data / "labelsTr" / "a.nii.gz")
    )


def test_a_bad_case_is_named_and_stops_no_other(data, tmp_path, refused):
    (data / "labelsTr" / "b.nii.gz").write_bytes(b"no image")
    assert "Not refined: b cannot be read" in refused(main, "-d", "904", "-o", str(tmp_path / "refined"))
    assert (tmp_path / "refined" / "a.nii.gz").is_file()
    image = sitk.GetImageFromArray(np.ones((5, 7, 8), np.uint8))
    sitk.WriteImage(image, str(data / "labelsTr" / "b.nii.gz"))
    assert "differ in size" in refused(main, "-d", "904", "-o", str(tmp_path / "second"))
    write_case(data / "imagesTr", "b", [np.full(SHAPE, 40.0)], np.full(SHAPE, 0.5, np.float32))
    assert "not integers" in refused(main, "-d", "904", "-o", str(tmp_path / "third"))
    write_case(data / "imagesTr", "b", [np.full(SHAPE, np.nan)], np.ones(SHAPE, np.uint8))
    assert "b has an image that holds voxels that are NaN" in refused(main, "-d", "904", "-o", str(tmp_path / "fourth"))


def test_labels_of_a_call_that_was_stopped_do_not_stay(data, tmp_path, refused, monkeypatch):
    arguments = ["-d", "904", "-o", str(tmp_path / "refined")]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_vit_mae.datasets.label_refinement.write_instances", stop)
        with pytest.raises(SystemExit):
            main(arguments)
    assert sorted(file.name for file in (tmp_path / "refined").glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
    (data / "labelsTr" / "a.nii.gz").unlink()
    (data / "labelsTr" / "b.nii.gz").write_bytes(b"no image")
    assert "Not refined: b" in refused(main, *arguments)
    assert not list((tmp_path / "refined").glob("*.nii.gz"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("-o {new}", "nothing to refine"),
        ("-d 904 -l {raw}/labelsTr -o {new}", "either a dataset or two folders"),
        ("-d 904 -o {raw}/labelsTr", "already exists"),
        ("-d 904 -o {new} --labels 3", "lists only 1"),
        ("-d 904 -o {new} --channel 1", "a_0001.nii.gz is missing"),
        ("-d 904 -o {new} --threshold nan", "give a number"),
        ("-i {raw}/nowhere -l {raw}/labelsTr -o {new}", "nowhere is not a folder: check -i"),
        ("-i {raw}/imagesTr -l {raw}/nowhere -o {new}", "nowhere is not a folder: check -l"),
        ("-i {raw}/imagesTr -l {raw} -o {new}", "must hold images of one format"),
    ],
)
def test_mistakes_get_one_sentence(data, tmp_path, refused, arguments, sentence):
    message = refused(main, *arguments.format(raw=data, new=tmp_path / "new").split())
    assert sentence in message
    assert message.count("\n") == 1


def test_a_folder_that_the_dataset_lacks_is_told_by_the_flag_that_was_given(data, tmp_path, refused):
    (data / "labelsTr").rename(tmp_path / "gone")
    message = refused(main, "-d", "904", "-o", str(tmp_path / "new"))
    assert f"{data / 'labelsTr'} is missing: check -d" in message
