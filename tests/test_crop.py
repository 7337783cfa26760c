"""Cropping a region that is drawn on a template: known transforms are found again, and voxels stay where they are."""

import csv
import json
import math
import os
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from synthetic_head import (
    COARSE_GRID,
    CORNERS,
    SIZE,
    SPACING,
    filled,
    grid,
    head,
    moved,
    scan,
    tell_two_places,
    voxel_points,
    write_template,
)

from nnunet_vit_mae.cli.crop_roi import main
from nnunet_vit_mae.datasets.crop import cropping as module
from nnunet_vit_mae.datasets.crop.contact_sheet import write_sheets, write_thumbnail
from nnunet_vit_mae.datasets.crop.qc_table import read_qc_table
from nnunet_vit_mae.datasets.crop.region import continuous_index, find_box, read_region
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.registration import RegistrationError, map_points, register, rotation_degrees
from nnunet_vit_mae.imaging.scans import find_scans
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.storage.files import locked

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "Dataset506_MSLesions"
THICK = {"size": (60, 64, 20), "spacing": (1.5, 1.6, 5.0)}
WIDE = {"size": (40, 44, 40), "spacing": (2.4, 2.3, 2.5)}


TRANSFORMS = {
    "tilted": (moved((0.25, -0.1, 0.2), (20, -35, 60)), THICK | {"turn": (0.2, 0.1, -0.3)}),
    "smaller": (moved((-0.3, 0.1, 0.0), (-150, 40, 300), (0.9, 0.95, 1.05)), WIDE | {"flip": (-1, -1, 1)}),
    "mirrored axes": (moved((0.0, 0.2, -0.3), (5, 8, -9)), {"flip": (1, -1, -1), "turn": (0.0, 0.4, 0.1)}),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> tuple[Path, Path]:
    return write_template(tmp_path_factory.mktemp("template"))


@pytest.fixture(scope="module")
def coarse_template(tmp_path_factory) -> tuple[Path, Path]:
    return write_template(tmp_path_factory.mktemp("coarse"), **COARSE_GRID)


class Command:
    """Folders for scans and labels, and the command on them."""

    def __init__(self, folder: Path, template: tuple[Path, Path], **geometry):
        self.images, self.labels, self.output = folder / "scans", folder / "labels", folder / "Dataset901_Region"
        self.template, self.geometry = template, geometry
        self.images.mkdir()
        self.labels.mkdir()

    def add(self, name, transform, ending=".nii.gz", label=True, **geometry):
        image, mask = scan(transform, **self.geometry | geometry)
        sitk.WriteImage(image, str(self.images / f"{name}{ending}"))
        if label:
            sitk.WriteImage(mask, str(self.labels / f"{name.removesuffix('_0000')}{ending}"))
        return image

    def arguments(self, *more):
        folders = ["-i", str(self.images), "-l", str(self.labels), "-o", str(self.output), "-np", "1"]
        return [*folders, "-t", str(self.template[0]), "-r", str(self.template[1]), *more]

    def run(self, *more):
        main(self.arguments(*more))

    def rows(self):
        with (self.output / "qc.csv").open() as stream:
            return {row["case"]: row for row in csv.DictReader(stream)}


@pytest.fixture
def accurate(tmp_path, template) -> Command:
    """The command on fine grids, where registration is accurate to less than a voxel."""
    return Command(tmp_path, template)


@pytest.fixture
def command(tmp_path, coarse_template) -> Command:
    """The command on coarse grids, which are fast to register."""
    return Command(tmp_path, coarse_template, **COARSE_GRID)


# ---------- registration


def test_the_same_numbers_on_every_call(coarse_template):
    reference = sitk.ReadImage(str(coarse_template[0]))
    image = scan(TRANSFORMS["tilted"][0], **COARSE_GRID)[0]
    once, again = (register(reference, image, affine=False).transform.GetParameters() for _ in range(2))
    assert once == again


def test_what_cannot_be_registered_says_why(coarse_template):
    reference = sitk.ReadImage(str(coarse_template[0]))
    with pytest.raises(RegistrationError, match="only one grey value"):
        register(reference, grid(), affine=True)


# ---------- crops


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_known_transform_is_found_and_the_crop_has_the_voxels_of_the_scan(accurate, template, name):
    command = accurate
    to_scan, geometry = TRANSFORMS[name]
    source = command.add("case_0000", to_scan, **geometry)
    command.run("--margin", "4")
    image = sitk.ReadImage(str(command.output / "imagesTr" / "case_0000.nii.gz"))
    label = sitk.ReadImage(str(command.output / "labelsTr" / "case.nii.gz"))

    index = continuous_index(image, map_points(to_scan, read_region(*template).points))
    assert np.all(index > -0.5)
    assert np.all(index < np.array(image.GetSize()) - 0.5)
    assert image.GetNumberOfPixels() < source.GetNumberOfPixels()
    points = voxel_points(image)
    where = continuous_index(source, points)
    assert np.abs(where - where.round()).max() < 1e-3
    x, y, z = where.round().astype(int).T
    assert np.array_equal(sitk.GetArrayFromImage(source)[z, y, x], sitk.GetArrayFromImage(image).ravel())
    mask = sitk.GetArrayFromImage(label).ravel() > 0
    dark = map_points(to_scan.GetInverse(), points[mask]) - (0, 8, 0)
    assert mask.any()
    assert ((dark / (8, 13, 9)) ** 2).sum(1).max() < 1.01
    assert label.GetSize() == image.GetSize()

    stored = sitk.ReadTransform(str(command.output / "transforms" / "case.tfm"))
    index_error = np.abs(
        continuous_index(source, map_points(stored, CORNERS)) - continuous_index(source, map_points(to_scan, CORNERS))
    )
    assert index_error.max() < 1
    assert np.abs(map_points(stored, CORNERS) - map_points(to_scan, CORNERS)).max() < 4
    row = command.rows()["case"]
    assert row["status"] == "done"
    assert float(row["coverage"]) == 1
    assert float(row["correlation"]) > 0.8
    assert abs(float(row["rotation_degrees"]) - rotation_degrees(to_scan)) < 2
    distance = np.linalg.norm(map_points(to_scan, CORNERS.mean(0)[None]) - CORNERS.mean(0))
    assert abs(float(row["displacement_mm"]) - distance) < 3


def test_resampled_crops_lie_on_the_templates_grid(accurate, template):
    command = accurate
    to_scan, geometry = TRANSFORMS["tilted"]
    command.add("case_0000", to_scan, **geometry)
    command.run("--resample", "--margin", "0")
    image = sitk.ReadImage(str(command.output / "imagesTr" / "case_0000.nii.gz"))
    reference = sitk.ReadImage(str(template[0]))
    assert image.GetSpacing() == pytest.approx(SPACING)
    assert image.GetDirection() == pytest.approx(reference.GetDirection())
    there = sitk.Resample(reference, image, sitk.Transform(), sitk.sitkLinear)
    values = [sitk.GetArrayFromImage(one).ravel() for one in (image, there)]
    assert np.corrcoef(*values)[0, 1] > 0.9


# ---------- the dataset


def test_bad_scans_stop_no_other_and_nothing_is_done_twice(command, refused, monkeypatch):
    command.add("a", moved(shift=(10, 0, 0)), ".mha")
    command.add("b", moved(shift=(0, 9, 0)), ".nrrd", label=False)
    whole = command.images / "cut_0000.nii.gz"
    command.add("cut_0000", moved(shift=(0, 0, 8)), label=False)
    good = whole.read_bytes()
    whole.write_bytes(good[: len(good) // 2])
    (command.images / "text.nii.gz").write_text("no image")
    sitk.WriteImage(grid(), str(command.images / "zeros.nii.gz"))
    message = refused(main, *command.arguments("--contrasts", "CT"))
    assert all(name in message for name in ("cut: ", "text: ", "zeros: all its images are zeros"))

    rows = command.rows()
    assert {name for name, row in rows.items() if row["status"] == "done"} == {"a", "b"}
    assert "cut off" in rows["cut"]["problem"]
    assert (command.output / "imagesTr" / "a_0000.nii.gz").exists()
    assert (command.output / "imagesUn" / "b_0000.nii.gz").exists()
    description = json.loads((command.output / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "CT"}
    assert description["numTraining"] == 1
    assert description["labels"] == {"background": 0, "label_1": 1}
    assert (command.output / "contact_sheet_01.png").stat().st_size > 1000

    dates = {file: file.stat().st_mtime_ns for file in command.output.rglob("[ab]*.*") if file.is_file()}
    whole.write_bytes(good)  # repaired
    (command.images / "text.nii.gz").unlink()
    done = []
    monkeypatch.setattr(
        module, "crop_case", lambda task, real=module.crop_case: (done.append(task.scan.name), real(task))[1]
    )
    refused(main, *command.arguments())
    assert done == ["cut", "zeros"]
    assert command.rows()["cut"]["status"] == "done"
    assert {file: file.stat().st_mtime_ns for file in dates if "imagesTr" in str(file)} == {
        file: date for file, date in dates.items() if "imagesTr" in str(file)
    }
    (command.output / "transforms" / "a.tfm").unlink()  # not complete any more
    refused(main, *command.arguments())
    assert done[2:] == ["a", "zeros"]


def test_a_label_that_was_edited_outlives_another_crop(command, caplog, refused):
    """Readers correct labels where they look at them; other margins must not cost them hours."""
    for name in ("a", "b"):
        command.add(name, moved())
    command.run()
    edited = command.output / "labelsTr" / "a.nii.gz"
    edited.write_bytes(content := edited.read_bytes() + b"edited")
    command.run("--margin", "7")
    (kept,) = (command.output / "edited").iterdir()
    assert kept.read_bytes() == content
    assert re.fullmatch(r"a_until_[\d_-]+\.nii\.gz", kept.name)
    assert f"{edited} was edited after it was cropped, and is now edited/{kept.name}." in caplog.messages
    assert {file.name for file in (command.output / "labelsTr").iterdir()} == {"a.nii.gz", "b.nii.gz"}
    command.images, command.output = command.output / "imagesTr", command.output / ".." / command.output.name
    message = refused(main, *command.arguments())
    assert "holds the scans themselves" in message


def test_rejected_cases_are_moved_and_stay_so(command, tmp_path, refused):
    command.add("a", moved(shift=(10, 0, 0)))
    command.add("b", moved(shift=(0, 9, 0)))
    command.run()
    decisions = tmp_path / "reject.txt"
    decisions.write_text("b\n\n")
    main(["-o", str(command.output), "--reject", str(decisions)])
    assert not list(command.output.glob("*Tr/b*"))
    assert not list(command.output.glob("transforms/b*"))
    assert (command.output / "rejected" / "imagesTr" / "b_0000.nii.gz").exists()
    assert (command.output / "rejected" / "labelsTr" / "b.nii.gz").exists()
    assert json.loads((command.output / "dataset.json").read_text())["numTraining"] == 1
    command.run()
    assert command.rows()["b"]["status"] == "rejected"
    assert not list(command.output.glob("imagesTr/b*"))
    decisions.write_text("c")
    assert "unknown cases (c)" in refused(main, "-o", str(command.output), "--reject", str(decisions))
    with locked(command.output):  # another call crops
        assert "Another process is writing to" in refused(main, "-o", str(command.output), "--reject", str(decisions))


def test_a_rejected_case_stays_so_without_a_template(command, coarse_template, tmp_path, refused):
    """A table that lacks the case for a while does not bring it back."""
    command.add("a", moved(), label=False)
    table, columns = tmp_path / "groups.csv", ["--csv", str(tmp_path / "groups.csv"), "--template_column", "group"]
    complete = f"case,group\na,{coarse_template[0].name}\n"
    table.write_text(complete)
    (tmp_path / "reject.txt").write_text("a\n")
    command.run(*columns, "--reject", str(tmp_path / "reject.txt"))
    for content in (f"case,group\nb,{coarse_template[0].name}\n", complete):
        table.write_text(content)
        command.run(*columns, "--case", "case")
        assert command.rows()["a"]["status"] == "rejected"
    assert not (command.output / "imagesUn" / "a_0000.nii.gz").exists()


def test_a_label_along_other_axes_is_turned(command):
    command.add("a", moved())
    file = command.labels / "a.nii.gz"
    command.run()
    expected = sitk.ReadImage(str(command.output / "labelsTr" / "a.nii.gz"))
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), "RAS"), str(file))
    command.run()
    got = sitk.ReadImage(str(command.output / "labelsTr" / "a.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(got), sitk.GetArrayFromImage(expected))
    assert got.GetDirection() == pytest.approx(expected.GetDirection())
    assert got.GetOrigin() == pytest.approx(expected.GetOrigin(), abs=1e-3)


def test_lists_of_windows_are_read_and_a_wrong_folder_stays_as_it_is(command, tmp_path, refused):
    command.add("a", moved(shift=(10, 0, 0)))
    decisions = tmp_path / "reject.txt"
    decisions.write_text("\ufeffa\r\n# the only one\r\n", encoding="utf-8")
    assert "has no qc.csv" in refused(main, "-o", str(command.output), "--reject", str(decisions))
    assert not command.output.exists()
    command.run("--reject", str(decisions))
    assert command.rows()["a"]["status"] == "rejected"


def test_another_scan_of_the_same_name_takes_no_place(command, tmp_path, refused):
    command.add("a", moved(shift=(10, 0, 0)))
    command.run()
    other = tmp_path / "other"
    command.images.rename(other)
    command.images.mkdir()
    (other / "a.nii.gz").rename(command.images / "a.nii.gz")
    sitk.WriteImage(scan(moved(shift=(0, 9, 0)), **COARSE_GRID)[0], str(other / "a.nii.gz"))
    arguments = command.arguments()
    arguments[1] = str(other)
    assert "would be one case, a" in refused(main, *arguments)
    assert (command.output / "labelsTr" / "a.nii.gz").exists()


def test_years_and_running_numbers_are_names_where_nothing_is_named_like_a_channel(tmp_path):
    for name in ("CT_2019.nii.gz", "CT_2020.nii.gz", "pat_0001.nrrd"):
        (tmp_path / name).touch()
    assert [scan.name for scan in find_scans(tmp_path, None)] == ["CT_2019", "CT_2020", "pat_0001"]
    (tmp_path / "a_0000.nii.gz").touch()
    (tmp_path / "b_0001.nii.gz").touch()  # its first contrast was not acquired
    channels = {scan.name: list(scan.channels) for scan in find_scans(tmp_path, None)}
    assert channels == {"a": [0], "b": [1], "CT": [2019, 2020], "pat": [1]}


def test_names_are_written_on_the_sheet_as_they_are(tmp_path):
    write_thumbnail(np.zeros((9, 27, 3), np.uint8), tmp_path / "a.png")
    sheets = write_sheets([(tmp_path / "a.png", "a$\\frac$ \u6f22")], tmp_path)
    assert sheets[0].read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a\\b.nii.gz").touch()
    with pytest.raises(UserError, match="has a backslash in its name: rename it"):  # before anything is cropped
        find_scans(tmp_path, None)


def test_a_table_that_a_spreadsheet_saved_is_read_again(command, refused):
    command.add("007", moved(shift=(10, 0, 0)), label=False)
    command.output.mkdir()
    table = [
        ["case", "status", "folder", "region_correlation", "channels"],
        ["007", "rejected", "imagesUn", "0,98", "0"],
    ]
    for name in ("007", "7"):
        table[1][0] = name
        text = "\r\n".join(map(";".join, table))
        (command.output / "qc.csv").write_text(text, encoding="utf-8-sig")
        assert [(row.case, row.region_correlation) for row in read_qc_table(command.output)] == [(name, 0.98)]
    # it would crop the case that a reader has rejected
    assert "has 7 in the column case, but the case is 007" in refused(main, *command.arguments())
    assert (command.output / "qc.csv").read_text(encoding="utf-8-sig") == text.replace("\r", "")


def test_coverage_is_the_share_of_the_region_in_view(template):
    region = read_region(*template)
    identity = sitk.Transform(3, sitk.sitkIdentity)
    mask = sitk.GetArrayViewFromImage(region.mask)
    x = np.flatnonzero(mask.any(axis=(0, 1)))
    for size in (4, len(x) - 1):  # of the region, from its first voxel on; the last voxels of every row lie outside
        narrow = sitk.RegionOfInterest(region.template, (int(x[0]) + size, *SIZE[1:]), (0, 0, 0))
        assert find_box(region, identity, narrow, 0).coverage == pytest.approx(size / len(x))
    middle = sitk.RegionOfInterest(region.template, (len(x) - 2, *SIZE[1:]), (int(x[0]) + 1, 0, 0))
    assert find_box(region, identity, middle, 0).coverage == pytest.approx(1 - 2 / len(x))


def test_names_of_labels_outlive_another_call(command, tmp_path):
    command.add("a", moved(shift=(10, 0, 0)))
    labels = {"background": 0, "dark": 1, "ignore": 2}
    source = tmp_path / "dataset.json"
    source.write_text(json.dumps({"labels": labels, "regions_class_order": [1], "channel_names": {"0": "CT"}}))
    command.run()
    source.unlink()
    mask = sitk.ReadImage(str(command.labels / "a.nii.gz"))
    command.add("b", moved(shift=(0, 9, 0)))
    sitk.WriteImage(sitk.Cast(mask, sitk.sitkUInt8) * 5, str(command.labels / "b.nii.gz"))
    sitk.WriteImage(sitk.ReadImage(str(command.images / "a.nii.gz")), str(command.images / "b.nii.gz"))
    command.run()
    content = json.loads((command.output / "dataset.json").read_text())
    assert content["labels"] == labels | {"label_5": 5}
    assert content["channel_names"] == {"0": "CT"}
    assert content["regions_class_order"] == [1]


def test_names_that_were_edited_outlive_another_call(command, tmp_path, capsys):
    command.add("a", moved(shift=(10, 0, 0)))
    command.run()
    file, source = command.output / "dataset.json", tmp_path / "dataset.json"
    content = json.loads(file.read_text())
    assert (content["channel_names"], content["labels"]) == ({"0": "channel_0"}, {"background": 0, "label_1": 1})
    of_scans = {"labels": {"background": 0, "dark": 1}, "channel_names": {"0": "CT"}}
    source.write_text(json.dumps(of_scans))
    command.run()  # default names give way
    content = json.loads(file.read_text())
    assert {key: content[key] for key in of_scans} == of_scans
    edited = {"labels": {"background": 0, "carotid": 1}, "channel_names": {"0": "CT_zscore"}, "licence": "CC0"}
    file.write_text(json.dumps(content | edited))
    source.write_text(
        json.dumps({"labels": {"background": 0, "dark": 1, "both": [1, 2]}, "channel_names": {"0": "CT"}})
    )
    capsys.readouterr()
    command.run()
    content = json.loads(file.read_text())
    assert content == content | edited | {"labels": edited["labels"] | {"both": [1, 2]}}
    assert "keeps its own names of what the dataset of the scans calls CT, dark: edit it" in capsys.readouterr().out
    command.run("--contrasts", "HU")
    assert json.loads(file.read_text())["channel_names"] == {"0": "HU"}


def test_a_case_that_fails_leaves_nothing_behind(command, coarse_template, tmp_path, refused):
    command.add("a", moved(shift=(10, 0, 0)))
    table = tmp_path / "table.csv"
    table.write_text("case,group\na,young\nb,young\n")
    flags = ("--csv", str(table), "--template_column", "group")
    command.run(*flags)
    table.write_text("case,group\na,elsewhere\nb,young\n")
    assert "elsewhere was not given" in refused(main, *command.arguments(*flags))
    assert not list(command.output.glob("*Tr/a*"))


def test_labels_must_be_whole_numbers_and_the_crop_says_what_it_cuts_off(command, refused, capsys):
    command.add("half", moved(shift=(10, 0, 0)))
    image = command.add("wide", moved(shift=(10, 0, 0)))
    sitk.WriteImage(image * 0 + 0.5, str(command.labels / "half.nii.gz"))
    sitk.WriteImage(sitk.Cast(image * 0 + 1, sitk.sitkUInt8), str(command.labels / "wide.nii.gz"))
    assert "half: its label has values that are not integers" in refused(main, *command.arguments())
    assert not list(command.output.glob("*Tr/half*"))
    cropped = sitk.ReadImage(str(command.output / "labelsTr" / "wide.nii.gz"))
    share = cropped.GetNumberOfPixels() / image.GetNumberOfPixels()
    assert float(command.rows()["wide"]["label_inside"]) == pytest.approx(share, abs=1e-4)


def test_voxels_beside_a_header_are_part_of_a_scan(command):
    image = command.add("a", moved(shift=(10, 0, 0)), ending=".mhd", label=False)
    command.run()
    before = command.rows()["a"]["made_of"]
    header = (command.images / "a.mhd").stat()
    sitk.WriteImage(image + 1, str(command.images / "a.mhd"))
    os.utime(command.images / "a.mhd", ns=(header.st_atime_ns, header.st_mtime_ns))
    command.run()
    assert command.rows()["a"]["made_of"] != before


def test_templates_by_column_or_by_similarity(command, coarse_template, tmp_path, refused):
    old = tmp_path / "old.nii.gz"
    image = sitk.ReadImage(str(coarse_template[0]))
    values = head(voxel_points(image)[:, [1, 0, 2]] * (1, 1, -1))  # other anatomy, which no affine map makes the same
    noise = np.random.default_rng(1).normal(0, 3, len(values))
    sitk.WriteImage(filled(image, (values + noise).astype(np.float32)), str(old))
    command.add("a", moved(shift=(10, 0, 0)), label=False)
    both = ["-t", str(coarse_template[0]), str(old), "-r", str(coarse_template[1]), str(coarse_template[1])]
    command.run(*both)
    assert command.rows()["a"]["template"] == "young"
    table = tmp_path / "table.csv"
    table.write_text("scan,age_group\na,old.nii.gz\nc,young\n")
    (command.images / "b.nii.gz").write_text("never read")
    arguments = command.arguments(*both, "--csv", str(table), "--case", "scan", "--template_column", "age_group")
    assert "b: it has no row in the table" in refused(main, *arguments)
    assert command.rows()["a"]["template"] == "old"


def test_a_dicom_folder_and_channels_of_one_grid(command):
    command.add("a_0000", moved(shift=(10, 0, 0)), label=False)
    sitk.WriteImage(scan(moved(shift=(10, 0, 0)), noise=5, **COARSE_GRID)[0], str(command.images / "a_0001.nii.gz"))
    folder = command.images / "series"
    folder.mkdir()
    volume = sitk.Cast(scan(moved(shift=(0, 12, 0)), **COARSE_GRID)[0], sitk.sitkInt16)
    for number in range(volume.GetSize()[2]):
        one = volume[:, :, number]
        tags = {"0020|000e": "1.2.3", "0020|000d": "1.2", "0008|0060": "CT", "0020|0013": str(number)}
        tags["0020|0032"] = "\\".join(f"{x:.4f}" for x in volume.TransformIndexToPhysicalPoint((0, 0, number)))
        tags["0020|0037"] = "1\\0\\0\\0\\1\\0"
        for key, value in tags.items():
            one.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number * 7 % 18:03d}.dcm"))
        writer.Execute(one)
    command.run()
    first, second = (sitk.ReadImage(str(command.output / "imagesUn" / f"a_000{n}.nii.gz")) for n in (0, 1))
    assert first.GetSize() == second.GetSize()
    assert first.GetOrigin() == second.GetOrigin()
    assert command.rows()["series"]["status"] == "done"


def test_mistakes_are_one_sentence(command, coarse_template, tmp_path, refused):
    assert "Dataset501_Skull" in refused(main, "-o", str(tmp_path / "crops"))
    assert "give -i, -t and -r" in refused(main, "-o", str(command.output))
    assert "no scans" in refused(main, *command.arguments())
    command.add("a", moved(), label=False)
    assert "2 templates and 1 regions" in refused(main, *command.arguments("-t", str(coarse_template[0]), "old.nii.gz"))
    assert "go together" in refused(main, *command.arguments("--csv", "x.csv"))
    assert "is empty" in refused(main, *command.arguments("-r", write_empty(tmp_path, coarse_template[0])))
    (tmp_path / "file").touch()
    nowhere = ["-o", str(tmp_path / "file" / "Dataset901_Region")]
    assert "cannot be created" in refused(main, *command.arguments(*nowhere))


def write_empty(folder: Path, like: Path) -> str:
    sitk.WriteImage(sitk.ReadImage(str(like)) < -1e6, str(folder / "empty.nii.gz"))
    return str(folder / "empty.nii.gz")


def doubled(number: int) -> int:
    if number == 1:
        os._exit(1)  # as when memory is out
    return 2 * number


def test_a_process_that_is_killed_stops_no_other():
    assert dict(run_each(doubled, [0, 1, 2], 2)) == {0: 0, 1: None, 2: 4}


# ---------- real images


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="needs the MS dataset beside the repository")
@pytest.mark.parametrize("case", ["LJ19_1", "P39_1"])
def test_known_moves_of_real_images_are_found(case):
    """The same image twice, once with a header that is turned and moved: both must be found at the same place."""
    reference = sitk.ReadImage(str(REAL / "imagesTr" / "LJ07_1_0000.nii.gz"))
    image = sitk.ReadImage(str(REAL / "imagesTr" / f"{case}_0000.nii.gz"))
    move = moved((0.3, -0.2, 0.25), (40, -70, 90))
    elsewhere = sitk.Image(image)
    rotation = np.array(move.GetMatrix()).reshape(3, 3)
    elsewhere.SetDirection((rotation @ np.array(image.GetDirection()).reshape(3, 3)).ravel().tolist())
    elsewhere.SetOrigin(move.TransformPoint(image.GetOrigin()))
    corners = np.array(list(product((-35, 35), (-40, 45), (-5, 35))), float)
    before, after = (map_points(register(reference, one, affine=True).transform, corners) for one in (image, elsewhere))
    assert np.abs(map_points(move, before) - after).max() < 2  # mm, a voxel


def test_a_scan_that_was_moved_is_the_same_and_no_path_is_kept(command, tmp_path):
    command.add("a", moved(shift=(10, 0, 0)))
    command.add("b", moved(shift=(10, 0, 0)))
    (command.images / "b.nii.gz").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        command.run()
    assert command.rows()["b"]["problem"]
    for file in command.output.glob("*.[cj]s*"):
        assert str(tmp_path) not in file.read_text()
    command.images = command.images.rename(tmp_path / "moved")
    with pytest.raises(SystemExit):
        command.run()
    assert command.rows()["a"]["status"] == "done"


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_nan_in_an_image_is_a_problem_of_its_case(ending, command):
    """ITK turns NaN in a NIfTI file into zeros without a word."""
    image = command.add("a", moved(shift=(10, 0, 0)), ending=ending)
    image[1, 2, 3] = math.nan
    sitk.WriteImage(image, str(command.images / f"a{ending}"))
    with pytest.raises(SystemExit):
        command.run()
    row = command.rows()["a"]
    assert (row["status"], "a" + ending in row["problem"]) == ("failed", True)
    assert "NaN" in row["problem"]


# ---------- what the dataset of the scans knows


@pytest.fixture
def dataset(command, tmp_path) -> Command:
    """Scans in a dataset of three contrasts: the second is empty where the region lies, the third was filled."""
    command.images = command.images.rename(tmp_path / "imagesTr")
    for case in ("a", "b"):
        image = command.add(f"{case}_0000", moved(shift=(10, 0, 0)))
        corner, filled_here = image * 0, image * 0
        corner[0, 0, 0] = 1
        sitk.WriteImage(corner, str(command.images / f"{case}_0001.nii.gz"))
        sitk.WriteImage(filled_here, str(command.images / f"{case}_0002.nii.gz"))
    names = {"0": "T1", "1": "T1_post", "2": "FLAIR"}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": names}))
    record = {"present": ["T1", "T1_post"], "filled": ["FLAIR"], "blank": []}
    other = {"present": [], "filled": [], "blank": ["FLAIR"]}
    content = {"imagesTr": {"a": record, "b": record, "c": record}, "imagesUn": {"a": other}}
    (tmp_path / "contrasts.json").write_text(json.dumps(content))
    rows = [f"{case},P0001,T1;T1_post,T1,0.75,0.5 0.5 1,0.6 0.6 3" for case in "abc"]
    columns = "case,patient,contrasts,reference,slice_thickness_mm,T1_spacing_mm,T1_post_spacing_mm"
    (tmp_path / "scans.csv").write_text("\n".join([columns, *rows]))
    return command


def scans_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "scans.csv").open() as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def test_records_of_the_scans_go_with_their_crops(dataset, capsys):
    dataset.run("--contrasts", "T1_post", "CE", "FLAIR")  # the new name of one is the old name of another
    assert "where the scan is not: CE of a, CE of b." in capsys.readouterr().out
    crop = {"present": ["T1_post"], "filled": ["FLAIR"], "blank": ["CE"]}
    assert json.loads((dataset.output / "contrasts.json").read_text()) == {"imagesTr": {"a": crop, "b": crop}}
    rows = scans_of(dataset.output)
    assert list(rows) == ["a", "b"]
    assert rows["a"] == {
        "case": "a",
        "patient": "P0001",
        "contrasts": "T1_post",
        "reference": "T1_post",
        "slice_thickness_mm": "0.75",
        "T1_post_spacing_mm": "0.5 0.5 1",
        "CE_spacing_mm": "0.6 0.6 3",
    }


def test_records_of_crops_keep_what_was_added_and_lose_what_is_rejected(dataset, tmp_path):
    dataset.run("--resample")
    rows = scans_of(dataset.output)
    assert {row["reference"] for row in rows.values()} == {""}  # they are on the grid of the template
    rows["a"]["age"], rows["new"] = "61", {"case": "new", "age": "7"}
    with (dataset.output / "scans.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows["a"]))
        writer.writeheader()
        writer.writerows(rows.values())
    (tmp_path / "reject.txt").write_text("b")
    dataset.run("--resample", "--reject", str(tmp_path / "reject.txt"))
    assert list(json.loads((dataset.output / "contrasts.json").read_text())["imagesTr"]) == ["a"]
    assert [(case, row["age"]) for case, row in scans_of(dataset.output).items()] == [
        ("a", "61"),
        ("b", ""),
        ("new", "7"),
    ]


def test_images_that_were_filled_are_rejected_too(command, tmp_path):
    image = command.add("a", moved(shift=(10, 0, 0)))
    command.run("--contrasts", "T1", "T2")
    sitk.WriteImage(image * 0, str(command.output / "imagesTr" / "a_0001.nii.gz"))
    (tmp_path / "reject.txt").write_text("a")
    main(["-o", str(command.output), "--reject", str(tmp_path / "reject.txt")])
    assert not list((command.output / "imagesTr").iterdir())
    assert (command.output / "rejected" / "imagesTr" / "a_0001.nii.gz").exists()


def test_records_that_cannot_be_read_are_refused_before_the_work(dataset, tmp_path, refused):
    (tmp_path / "scans.csv").write_text("case,patient\na,P0001\na,P0002\n")
    assert "two different rows for a" in refused(main, *dataset.arguments())
    assert not (dataset.output / "qc.csv").exists()


def test_a_header_that_programs_read_differently_is_told(command, capsys):
    command.add("a", moved(shift=(10, 0, 0)))
    file = command.images / "a.nii.gz"
    tell_two_places(file)
    (command.images / "gone.nii.gz").symlink_to("nowhere")  # is a problem of its case
    with pytest.raises(SystemExit):
        command.run()
    assert "Warning: 1 x NIfTI that has a qform and an sform that differ" in capsys.readouterr().out
