"""`mae3d_evaluate`: the whole command on small volumes, what it says, and every mistake that it refuses."""

import csv
import json
import math
import pickle
import re
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_vit_mae.cli import evaluate as command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.evaluation import cases
from nnunet_vit_mae.evaluation.by_token import differ_in_network, read_trained_vit
from nnunet_vit_mae.evaluation.cases import find_evaluation_set, labels_in, measure_cases
from nnunet_vit_mae.evaluation.headline import headline_text
from nnunet_vit_mae.evaluation.results import MEASURES, EvaluationOptions
from nnunet_vit_mae.evaluation.summary import Measurements, paired_tests, summarise, write_tables
from nnunet_vit_mae.imaging.grids import distance_mm, turned_like
from nnunet_vit_mae.imaging.labels import as_labels, read_mask
from nnunet_vit_mae.imaging.volumes import geometry_of
from nnunet_vit_mae.statistics import mean_interval
from nnunet_vit_mae.storage.files import locked

pytestmark = pytest.mark.usefixtures("no_garbage_of_imports")

SHAPE = (6, 11, 13)  # z y x
LABELS = {"background": 0, "core": 1, "rim": 2}
THICK = (1.5, 1.5, 3.0, 3.0, 5.0, 5.0)  # mm, of each case


def write(file, array, spacing=(1.5, 0.8, 0.9), origin=(0.0, 0.0, 0.0)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def volume(size, shift=0):
    """A core of `size` voxels along x with a rim beside it; nothing for a size of 0."""
    array = np.zeros(SHAPE, np.uint8)
    array[2:4, 3 + shift : 7 + shift, 2 : 2 + size] = 1
    array[2:4, 3 + shift : 7 + shift, 2 + size : 3 + 2 * size][:, :, : 2 * bool(size)] = 2
    return array


@pytest.fixture
def data(tmp_path):
    """Six cases and two models; one reference is empty, one prediction of each model too."""
    for number, thickness in enumerate(THICK):
        spacing = (thickness, 0.8, 0.9)
        size = number  # case_0 has no label
        write(tmp_path / "labelsTs" / f"case_{number}.nii.gz", volume(size), spacing)
        write(tmp_path / "imagesTs" / f"case_{number}_0000.nii.gz", volume(size).astype(np.float32), spacing)
        write(tmp_path / "vit" / f"case_{number}.nii.gz", volume(0 if number == 3 else size, shift=1), spacing)
        write(tmp_path / "unet" / f"case_{number}.nii.gz", volume(max(1, size - 1), shift=2), spacing)
    for folder in ("vit", "unet"):
        (tmp_path / folder / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    return tmp_path


def arguments(data, *more, out="report", references="labelsTs", resamples=50):
    words = ["-r", data / references, "-p", f"ViT={data / 'vit'}", "-p", f"nnU-Net={data / 'unet'}"]
    return [str(word) for word in (*words, "-o", data / out, "-np", 1, "--resamples", resamples, *more)]


@pytest.fixture
def no_report(monkeypatch):
    """The command without its figures, which take most of its time."""
    monkeypatch.setattr("nnunet_vit_mae.evaluation.report.write_report", lambda *_, **__: [])


def rewrite(file, change=lambda array: array, **geometry):
    image = sitk.ReadImage(str(file))
    chosen = {"spacing": image.GetSpacing()[::-1], "origin": image.GetOrigin()} | geometry
    write(file, change(sitk.GetArrayFromImage(image)), **chosen)


def rows_in(folder):
    with (folder / "cases.csv").open(encoding="utf-8") as stream:
        return {(row["model"], row["case"], row["label"]): row for row in csv.DictReader(stream)}


# ---------- the command


def model_folder(folder, trainer, **network):
    plans = {"configurations": {"3d_fullres": {"vit_mae": {"network": network}}}}
    folder = folder / f"{trainer}__P__3d_fullres"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    return folder


def test_the_command_writes_what_it_measures(data, capsys):
    small = model_folder(data / "a", "nnUNetTrainerViTMAE", size="S", token=[4, 4, 8], decoder="mae")
    large = model_folder(data / "b", "nnUNetTrainerViTScratch", size="M", token=[8, 8, 8], decoder="upscale")
    flags = ["--model_folder", f"ViT={small}", "--model_folder", f"nnU-Net={large}"]
    command.main(arguments(data, "-i", data / "imagesTs", *flags, resamples=200))
    shown = capsys.readouterr().out
    report = data / "report"
    written = {"README.txt", "index.html", "cases.csv", "summary.json", "figures"}
    assert written <= {file.name for file in report.iterdir()}
    rows = rows_in(report)
    names = [f"case_{number}" for number in range(6)]
    assert list(rows) == [(m, c, label) for m in ("ViT", "nnU-Net") for c in names for label in ("core", "rim")]

    summary = json.loads((report / "summary.json").read_text())
    assert "NaN" not in (report / "summary.json").read_text()
    means = {(mean["model"], mean["label"], mean["measure"]): mean for mean in summary["means"]}
    assert len(means) == 2 * 2 * len(MEASURES)
    for (model, label, measure), mean in means.items():
        values = [row[measure] for (m, _, known), row in rows.items() if (m, known) == (model, label)]
        numbers = [float(value) for value in values if value]
        assert (mean["n"], mean["left_out"]) == (len(numbers), 6 - len(numbers))
        assert mean["mean"] == pytest.approx(np.mean(numbers))
        assert mean["low"] <= mean["mean"] + 1e-12
        assert mean["mean"] <= mean["high"] + 1e-12
    dice = means["ViT", "core", "dice"]
    assert f"{dice['mean']:.3f} [{dice['low']:.3f}, {dice['high']:.3f}] n=5" in shown
    assert "core: Dice, nnU-Net minus ViT" in shown
    assert rows["ViT", "case_0", "core"]["dice"] == ""  # rightly empty
    assert rows["nnU-Net", "case_0", "core"]["dice"] == "0.0"
    assert rows["ViT", "case_3", "core"]["hd95_mm"] == ""
    assert rows["ViT", "case_5", "core"]["slice_thickness_mm"] == "5.0"
    assert "core: the reference is empty in 1 of 6 cases" in shown
    assert "core: ViT predicts nothing in 1 of 6 cases with a reference" in shown
    assert summary["notes"] == [note for note in summary["notes"] if note in shown]
    assert "Wrote index.html, cases.csv, summary.json and figures to" in shown

    assert {row["reference_group"] for row in rows.values()} == {"no", "low", "moderate", "high"}
    risk = next(risk for risk in summary["risks"] if (risk["model"], risk["label"]) == ("ViT", "core"))
    own = [row for (model, _, label), row in rows.items() if (model, label) == ("ViT", "core")]
    assert risk["correct"] == sum(row["reference_group"] == row["predicted_group"] for row in own) == 5
    agreement = next(entry for entry in summary["agreements"] if (entry["model"], entry["label"]) == ("ViT", "core"))
    differences = [float(row["difference_mm3"]) for row in own]
    assert agreement["bias"] == pytest.approx(np.mean(differences))
    assert agreement["upper"] == pytest.approx(np.mean(differences) + 1.96 * np.std(differences, ddof=1))
    thickness = [entry for entry in summary["bins"] if entry["quantity"] == "slice_thickness_mm"]
    ranges = {(entry["low"], entry["high"]) for entry in thickness}
    assert ranges == {(1.5, 1.875), (1.875, 3), (4.5, 5)}  # no case lies from 3 to 4.5
    assert set(summary["versions"]) >= {"monai", "scipy", "statsmodels", "nnunet-vit-mae"}

    assert 'id="tokens"' in (report / "index.html").read_text()
    drawing = (report / "figures" / "by_token_1_core.svg").read_text()
    assert all(text in drawing for text in ("4 x 4 x 8", "S, pre-trained", "M, random weights", "upscale"))
    assert not differ_in_network([read_trained_vit(small)] * 2)


def test_the_slice_thickness_is_the_one_that_scans_csv_records(data, no_report, capsys):
    (data / "scans.csv").write_text("case,slice_thickness_mm\ncase_0,0.75\ncase_1,\nother,3\n")
    command.main(arguments(data))
    thickness = {case: row["slice_thickness_mm"] for (_, case, _), row in rows_in(data / "report").items()}
    assert thickness == {"case_0": "0.75", "case_1": "1.5"} | {f"case_{n}": str(THICK[n]) for n in range(2, 6)}
    assert "scans.csv has no slice thickness of case_1, case_2, case_3" in capsys.readouterr().out

    (data / "own.csv").write_text("scan;slice_thickness_mm\n" + "".join(f"case_{n};{n + 1}\n" for n in range(6)))
    command.main(arguments(data, "--csv", data / "own.csv", out="second"))
    thickness = [
        row["slice_thickness_mm"] for (_, _, label), row in rows_in(data / "second").items() if label == "core"
    ]
    assert thickness == ["1.0", "2.0", "3.0", "4.0", "5.0", "6.0"] * 2
    assert "has no slice thickness" not in capsys.readouterr().out


def test_scans_of_one_patient_count_once_in_tests_and_intervals(data, no_report, refused, capsys):
    (data / "scans.csv").write_text("case,patient\n" + "".join(f"case_{n},P{n // 2}\n" for n in range(6)))
    command.main(arguments(data))
    said = capsys.readouterr().out
    assert "The 6 cases are of 3 patients." in said
    assert "With so few patients (3), p cannot be below 0.25." in said
    assert "slice thickness of" not in said
    summary = json.loads((data / "report" / "summary.json").read_text())
    assert {test["n"] for test in summary["tests"] if test["measure"] == "difference_mm3"} == {3}
    assert {mean["n"] + mean["left_out"] for mean in summary["means"]} == {6}
    assert {row["patient"] for row in rows_in(data / "report").values()} == {"P0", "P1", "P2"}
    (data / "scans.csv").write_text("case,patient\n" + "".join(f"case_{n},P\n" for n in range(4)))
    command.main(arguments(data, out="incomplete"))
    said = capsys.readouterr().out
    assert "scans.csv has no patient of case_4, case_5: each counts as a patient of its own." in said
    assert "The 6 cases are of 3 patients." in said
    (data / "scans.csv").rename(data / "own.csv")
    chosen = arguments(data, "--patient", "person", out="second")
    assert "--patient person names a column of a table" in refused(command.main, *chosen)
    message = refused(command.main, *chosen, "--csv", str(data / "own.csv"))
    assert "own.csv has no column person, only case, patient: check --patient" in message


def test_a_table_of_scans_without_cases_is_refused_without_a_flag_that_is_not_there(data, no_report, refused):
    (data / "scans.csv").write_text("scan,patient\ncase_0,P0\n")
    message = refused(command.main, *arguments(data))
    assert "scans.csv has no column case, only scan, patient: name the column of the cases case." in message


@pytest.mark.parametrize("text", ["1.25 mm", "0", "-1", "inf"])
def test_a_slice_thickness_that_is_no_length_is_refused(data, no_report, refused, text):
    (data / "scans.csv").write_text(f"case,slice_thickness_mm\ncase_0,{text}\n")
    message = refused(command.main, *arguments(data))
    assert f"has the slice_thickness_mm '{text}' for case_0: give a number above 0" in message
    assert not (data / "report").exists()


def test_a_folder_that_is_of_no_vit_is_refused(data, refused):
    unet = model_folder(data / "a", "nnUNetTrainerBaseline", size="S")
    other = model_folder(data / "b", "nnUNetTrainerViTMAE", size="S")
    (other / "plans.json").write_text("{}")
    for value, sentence in {
        f"ViT={unet}": "trains no ViT",
        f"ViT={data}": "is not the folder of a model",
        f"ViT={other}": "plans.json cannot be used, because it has no configurations: give the folder of a model",
        f"other={unet}": "there is no model other",
        "ViT": "write NAME=PATH",
    }.items():
        assert sentence in refused(command.main, *arguments(data, "--model_folder", value))
    assert not (data / "report").exists()


def test_dice_is_nnunets_with_regions_and_the_ignore_label(data):
    description = {"labels": {"background": 0, "whole": [1, 2], "rim": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    for folder in ("vit", "unet"):
        (data / folder / "dataset.json").write_text(json.dumps(description))

    def ignore(array):
        array[:, 4] = 3
        return array

    for number in range(6):
        rewrite(data / "labelsTs" / f"case_{number}.nii.gz", ignore)
    evaluation_set = find_evaluation_set(data / "labelsTs", {"ViT": data / "vit"})
    table, _ = measure_cases(evaluation_set, EvaluationOptions())
    for row in table.to_dict("records"):
        files = [str(data / folder / f"{row['case']}.nii.gz") for folder in ("labelsTs", "vit")]
        expected = compute_metrics(*files, SimpleITKIO(), [(1, 2), (2,)], 3)["metrics"]
        expected = expected[{"whole": (1, 2), "rim": (2,)}[row["label"]]]
        assert row["dice"] == pytest.approx(float(expected["Dice"]), nan_ok=True)
        assert (row["reference_voxels"], row["predicted_voxels"]) == (expected["n_ref"], expected["n_pred"])


def test_other_processes_give_the_same_table_in_whatever_order_they_finish(data, monkeypatch):
    """What they take and give is pickled here as it is for them, each of which would have to import torch first."""

    def elsewhere(function, jobs, processes, initializer):
        function, _ = pickle.loads(pickle.dumps((function, initializer)))
        return [(job, pickle.loads(pickle.dumps(function(pickle.loads(pickle.dumps(job)))))) for job in jobs[::-1]]

    evaluation_set = find_evaluation_set(
        data / "labelsTs", {"ViT": data / "vit", "U": data / "unet"}, data / "imagesTs"
    )
    expected, _ = measure_cases(evaluation_set, EvaluationOptions())
    monkeypatch.setattr(cases, "run_each", elsewhere)
    pd.testing.assert_frame_equal(measure_cases(evaluation_set, EvaluationOptions(), 2)[0], expected)


def test_chosen_groups_and_bins(data, capsys, no_report):
    """Cutoffs between 8 and 24 voxels of the core, and one thickness."""
    voxel = 1.5 * 0.8 * 0.9
    more = [
        "--cutoffs",
        10 * voxel,
        100 * voxel,
        "--thickness_bins",
        "2",
        "--min_lesion_voxels",
        "3",
        "-p",
        data / "vit",
    ]
    command.main(arguments(data, *more, out="new/report"))
    summary = json.loads((data / "new" / "report" / "summary.json").read_text())
    assert summary["models"] == ["ViT", "nnU-Net", "vit"]
    assert summary["settings"]["min_lesion_voxels"] == 3
    assert {tuple(risk["groups"]) for risk in summary["risks"]} == {("group 1", "group 2", "group 3")}
    ranges = {(e["low"], e["high"]) for e in summary["bins"] if e["quantity"] == "slice_thickness_mm"}
    assert ranges == {(1.5, 2.0), (2.0, 5.0)}
    tests = [test for test in summary["tests"] if test["measure"] == "dice"]
    assert len(tests) == 3 * 2
    assert {test["p"] for test in tests if {test["first"], test["second"]} == {"ViT", "vit"}} == {None}
    assert "after Holm" not in capsys.readouterr().out


def test_surplus_predictions_and_small_shifts_are_noted(data, capsys, no_report):
    write(data / "vit" / "case_9.nii.gz", volume(2))
    rewrite(data / "unet" / "case_1.nii.gz", origin=(0.4, 0.0, 0.0))
    command.main(arguments(data))
    shown = capsys.readouterr().out
    assert "ViT: predictions without a reference are left out (case_9)." in shown
    assert "nnU-Net: predictions lie up to a voxel beside their references, and are compared voxel by voxel" in shown
    assert "(case_1)" in shown


ORIENTATIONS = ("RAS", "LPS", "SAR", "PIL")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_stored_along_other_axes_are_compared_in_their_places(orientation, data, no_report):
    command.main(arguments(data, out="before"))
    for number, folder in enumerate(("vit", "imagesTs", "labelsTs")):
        for file in (data / folder).glob("*.nii.gz"):
            other = ORIENTATIONS[(ORIENTATIONS.index(orientation) + number) % 4]
            sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(file)), other), str(file))
    command.main(arguments(data, "-i", data / "imagesTs", out="after"))
    before, after = rows_in(data / "before"), rows_in(data / "after")
    for key, row in before.items():
        for column, value in row.items():
            if column in ("case", "label", "model") or not value or not value[0].isdigit():
                assert after[key][column] == value
            else:
                assert float(after[key][column]) == pytest.approx(float(value), rel=1e-4)


def test_a_voxel_keeps_its_place_when_a_volume_is_turned():
    array = np.random.default_rng(0).integers(0, 9, (4, 5, 6))
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((0.5, 0.7, 3.0))
    image.SetOrigin((10, -20, 30))
    image.SetDirection(sitk.VersorTransform((0, 0.1, 0.99), 0.3).GetMatrix())
    geometry = geometry_of(image)
    for orientation in ("LPS", "RAS", "SAR", "ASL", "IRP"):
        other = sitk.DICOMOrient(image, orientation)
        turned, found = turned_like(sitk.GetArrayFromImage(other), geometry_of(other), geometry)
        assert (turned == array).all()
        assert distance_mm(found, geometry) < 1e-4
        assert found.difference(geometry) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
@pytest.mark.parametrize("folder", ["vit", "labelsTs", "imagesTs"])
def test_nan_is_refused_with_the_name_of_the_file(value, ending, folder, data, refused, no_report):
    """ITK turns NaN in a NIfTI file into zeros without a word."""
    for other in ("vit", "unet", "labelsTs", "imagesTs"):
        for file in (data / other).glob("*.nii.gz"):
            image = sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkFloat32)
            file.unlink()
            sitk.WriteImage(image, str(file.with_name(file.name.replace(".nii.gz", ending))))
        (data / other / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ending}))
    (file,) = (data / folder).glob("case_2*.*")
    image = sitk.ReadImage(str(file))
    image[0, 0, 0] = value
    sitk.WriteImage(image, str(file))
    message = refused(command.main, *arguments(data, "-i", data / "imagesTs"))
    assert re.search(
        re.escape(str(file)) + " holds (voxels that are NaN|numbers that are not integers, or NaN)", message
    )
    assert not (data / "report" / "cases.csv").exists()


def test_two_calls_do_not_write_to_one_folder(data, refused):
    with locked(data / "report"):
        assert "Another process is writing to" in refused(command.main, *arguments(data))
    assert not (data / "report").exists()


def test_without_a_description_labels_are_those_of_the_references(data):
    for folder in ("vit", "unet"):
        (data / folder / "dataset.json").unlink()
    evaluation_set = find_evaluation_set(data / "labelsTs", {"ViT": data / "vit"})
    assert evaluation_set.labels.values == {"1": (1,), "2": (2,)}
    (data / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "core": 1, "rim": 2}}))
    assert find_evaluation_set(data / "labelsTs", {"ViT": data / "vit"}).labels.values == {"core": (1,), "rim": (2,)}
    with pytest.raises(UserError, match="are empty"):
        labels_in([data / "labelsTs" / "case_0.nii.gz"])


def test_integers_may_be_stored_as_numbers_with_a_point(data):
    file = data / "labelsTs" / "case_2.nii.gz"
    before = read_mask(file)
    rewrite(file, lambda array: array.astype(np.float64))
    assert (read_mask(file) == before).all()


def test_labels_take_few_bytes(tmp_path):
    for value, size in ((255, 1), (256, 2), (-1, 2)):
        labels = np.zeros((2, 3, 4), np.float32)
        labels[1, 2, 3] = value
        found = as_labels(labels, tmp_path / "case.mha")
        assert (found.dtype.kind in "iu", found.dtype.itemsize) == (True, size)
        assert (found == labels).all()


def test_what_is_no_number_is_no_label(tmp_path):
    write(tmp_path / "mask.mha", np.full(SHAPE, math.nan))  # ITK reads zeros from a NIfTI
    with pytest.raises(UserError, match="not integers"):
        read_mask(tmp_path / "mask.mha")


# ---------- mistakes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-p", "=x"], "-p =x: write NAME=FOLDER"),
        (["-p", "a/b=x"], "write NAME=FOLDER"),
        (["-p", "ViT=other"], "there is another model named ViT; give every model its own name"),
        (["-p", "other=nowhere"], "nowhere is not a folder: check -p."),
        (["-i", "nowhere"], "nowhere is not a folder: check -i."),
        (["--cutoffs", "5", "5"], "--cutoffs 5 5: give ascending numbers."),
        (["--thickness_bins", "3", "1"], "--thickness_bins 3 1: give ascending numbers."),
        (["--calibration", "x"], "--calibration x: write NAME=PATH"),
        (["--calibration", "other=x"], "there is no model other, only ViT, nnU-Net."),
        (["--calibration", "ViT=nowhere"], "nowhere is missing: run mae3d_calibrate"),
    ],
)
def test_wrong_words_are_refused(data, refused, words, reason):
    assert reason in refused(command.main, *arguments(data, *words))
    assert not (data / "report").exists()


def test_folders_that_do_not_fit_are_refused(data, refused):
    def reason(*more, **changes):
        message = refused(command.main, *arguments(data, *more, **changes))
        assert message.count("\n") == 1
        assert not (data / "report").exists()
        return message

    assert "is not a folder: check -r." in reason(references="nowhere")
    (data / "empty").mkdir()
    assert "but has none: check -r." in reason(references="empty")
    assert "labelsTs already exists: give a new folder with -o" in reason(out="labelsTs")
    file = data / "unet" / "case_4.nii.gz"
    assert f"{file} cannot be created" in reason(out="unet/case_4.nii.gz/report")
    (data / "imagesTs" / "case_5_0000.nii.gz").unlink()
    assert "The case case_5 has no image" in reason("-i", data / "imagesTs")
    write(data / "unet" / "case_4.nrrd", read_mask(file))
    file.unlink()
    assert "case_4.nrrd has another format than the references (.nii.gz)" in reason()
    (data / "unet" / "case_4.nrrd").unlink()
    assert f"nnU-Net has no prediction of the case case_4: predict it to {file}" in reason()
    write(data / "labelsTs" / "case_7.nrrd", volume(1))
    assert "but has .nii.gz and .nrrd: check -r." in reason()


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"background": 0, "core": 1}, "have different labels: compare models that segment the same labels"),
        ({"background": 0}, "lists no label except the background"),
        ([1, 2], "labels is [1, 2], but it must be an object"),
        ({"core": "one"}, "must be a whole number"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(data, refused, labels, reason):
    (data / "unet" / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert reason in refused(command.main, *arguments(data))


def test_files_that_do_not_fit_are_refused(data, refused):
    file, reference = data / "vit" / "case_2.nii.gz", data / "labelsTs" / "case_2.nii.gz"
    intact = file.read_bytes()

    def reason(change=None, *more, of=file, **geometry):
        if change or geometry:
            rewrite(of, change or (lambda array: array), **geometry)
        message = refused(command.main, *arguments(data, *more))
        file.write_bytes(intact)
        assert not (data / "report" / "cases.csv").exists()
        return message.splitlines()[-1]

    assert f"{file} does not fit {reference}: they differ in size (13 11 5 and 13 11 6 voxels)" in reason(
        lambda array: array[1:]
    )
    assert "they differ in spacing (0.9 0.8 2 and 0.9 0.8 3 mm)" in reason(spacing=(2, 0.8, 0.9))
    assert f"{file} does not fit {reference}: their voxels lie up to 50 mm apart (origin (50 0 0" in reason(
        origin=(50.0, 0.0, 0.0)
    )
    assert f"{file} holds the unknown label 7, 14; known labels are 0, 1, 2." in reason(lambda array: array * 7)
    assert "holds numbers that are not integers" in reason(lambda array: array * 0.5)
    file.write_bytes(intact[:100])
    assert f"{file} cannot be read (" in reason()
    file.write_text("no image")
    assert f"{file} cannot be read (" in reason()
    image = data / "imagesTs" / "case_2_0000.nii.gz"
    rewrite(image, spacing=(4, 0.8, 0.9))
    assert "they differ in spacing (0.9 0.8 3 and 0.9 0.8 4 mm)" in reason(None, "-i", data / "imagesTs")
    image.write_text("no image")
    assert f"{image} cannot be read (" in reason(None, "-i", data / "imagesTs")


# ---------- the sums


def table_of(values, label="blob"):
    """Cases of which nothing but the Dice and volumes of each model matters."""
    rows = defaultdict(list)
    for model, numbers in values.items():
        for number, value in enumerate(numbers):
            row = {measure.column: value for measure in MEASURES} | {
                "model": model,
                "case": str(number),
                "label": label,
            }
            row |= {"reference_mm3": 10.0 + number, "predicted_mm3": 10.0 + value, "slice_thickness_mm": 1.0}
            row |= {"reference_voxels": 10, "predicted_voxels": 10}
            for key, entry in row.items():
                rows[key].append(entry)
    return pd.DataFrame(rows)


def test_tests_are_scipys_with_holms_correction_by_hand():
    random = np.random.default_rng(0)
    values = {model: random.uniform(size=14).tolist() for model in "abc"}
    values["b"][3] = math.nan
    values["c"] = [value + 0.3 for value in values["c"]]
    tests = paired_tests(Measurements(table_of(values), list("abc"), ["blob"]), "dice")
    assert [(test.first, test.second, test.n) for test in tests] == [("a", "b", 13), ("a", "c", 14), ("b", "c", 13)]
    kept = [number for number in range(14) if number != 3]
    first, second = (np.array(values[model])[kept] for model in "ab")
    assert tests[0].p == pytest.approx(scipy.stats.wilcoxon(second, first).pvalue)
    assert tests[0].difference == pytest.approx((second - first).mean())
    ordered = sorted(tests, key=lambda test: test.p)
    expected = np.maximum.accumulate([test.p * times for test, times in zip(ordered, (3, 2, 1), strict=True)]).clip(
        max=1
    )
    assert [test.p_holm for test in ordered] == pytest.approx(expected.tolist())


def test_agreement_by_hand():
    found = summarise(table_of({"a": [1.0, 3.0, 5.0]}), ["a"], ["blob"], EvaluationOptions(resamples=10)).agreements[0]
    assert (found.n, found.bias) == (3, 3)
    assert (found.lower, found.upper) == (pytest.approx(3 - 1.96 * 2), pytest.approx(3 + 1.96 * 2))


@pytest.mark.parametrize("patients", [None, [*"AABBBC"]])
def test_the_interval_of_a_mean_is_the_chosen_one(patients):
    values, chosen = [0.1, 0.5, 0.6, 0.9, 0.3, 0.8], {"resamples": 60, "confidence": 0.6, "seed": 3}
    table = table_of({"a": values}) if patients is None else table_of({"a": values}).assign(patient=patients)
    means = summarise(table, ["a"], ["blob"], EvaluationOptions(**chosen)).means
    assert {(mean.low, mean.high) for mean in means if mean.measure == "dice"} == {
        mean_interval(values, groups=patients, **chosen)
    }


def test_one_case_has_means_and_no_more(tmp_path):
    found = summarise(table_of({"a": [0.5], "b": [0.75]}), ["a", "b"], ["blob"], EvaluationOptions())
    assert [mean.mean for mean in found.means if mean.measure == "dice"] == [0.5, 0.75]
    assert all(math.isnan(mean.low) for mean in found.means)
    assert found.risks == ()
    assert "blob: no risk groups, because 1 case cannot fill 4 groups." in found.notes
    assert "There is only one case, so there are no confidence intervals and no limits of agreement." in found.notes
    of_one = summarise(table_of({"a": [0.5, 0.6]}).assign(patient="P"), ["a"], ["blob"], EvaluationOptions())
    assert "All cases are of one patient, so there are no confidence intervals." in of_one.notes
    assert "nan" not in headline_text(of_one)
    write_tables(found, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["means"][0]["low"] is None
    assert summary["agreements"][0]["lower"] is None
    assert rows_in(tmp_path)["a", "0", "blob"]["reference_group"] == ""
    assert "0.500  " in headline_text(found)


def test_a_measure_that_is_nowhere_defined_is_a_dash_and_null(tmp_path):
    found = summarise(table_of({"a": [math.nan] * 5}), ["a"], ["blob"], EvaluationOptions())
    assert {(mean.n, mean.left_out) for mean in found.means} == {(0, 5)}
    assert headline_text(found).splitlines()[1].split() == ["blob", "a", "5", "-", "-", "-"]
    write_tables(found, tmp_path)
    assert {mean["mean"] for mean in json.loads((tmp_path / "summary.json").read_text())["means"]} == {None}


def test_equal_inputs_give_equal_files(tmp_path):
    table = table_of({"a": [0.1, 0.5, 0.6, 0.9, 0.3], "b": [0.2, 0.5, 0.1, 0.8, 0.4]})
    for folder in ("one", "two"):
        write_tables(summarise(table, ["a", "b"], ["blob"], EvaluationOptions()), tmp_path / folder)
    for name in ("cases.csv", "summary.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert "\r" not in (tmp_path / "one" / "cases.csv").read_bytes().decode()
