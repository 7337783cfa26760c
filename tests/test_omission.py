"""Contrasts taken away: the table, the images, and the command with and without nnU-Net."""

import csv
import json
import math
import os
import shutil
import sys
import sysconfig
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SHAPE, blob, read_voxels, write_case
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_vit_mae.cli import omit as omit_command
from nnunet_vit_mae.installation import trainers_folder
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.models import find_model
from nnunet_vit_mae.nnunet.omission import OmissionCase, find_channels, write_images
from nnunet_vit_mae.nnunet.omission_table import OmissionRow, omission_table
from nnunet_vit_mae.nnunet.prediction import PredictionCase
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerViTScratch
from nnunet_vit_mae.storage.files import link

# ---------- the table


def rows_of(*pairs, label="blob", left_out=""):
    numbers = count()
    return [OmissionRow(f"{left_out} {next(numbers)}", label, a, b, b - a, "FLAIR", left_out) for a, b in pairs]


def lines_of(rows):
    return omission_table(rows, ["FLAIR"]).splitlines()


def test_the_table_tests_only_cases_from_which_something_was_taken():
    rows = rows_of((0.8, 0.6), (0.7, 0.6), (0.9, 0.6), (0.6, 0.66))
    rows += rows_of((0.2, 0.2), (0.4, 0.4), left_out="nothing to omit")
    rows += rows_of((0.0, math.nan), (0.5, math.nan), left_out="no contrast would be left")
    rows += rows_of((math.nan, 0.0), (0.0, 0.0), (math.nan, math.nan), left_out="empty reference")
    _, some, every, *notes = lines_of(rows)
    assert some.split() == "blob without FLAIR 4 0.750 0.615 -0.135 0.25".split()
    assert every.split() == "blob all 6 0.600 0.510 -0.090 -".split()
    assert any("their Dice counts twice" in note for note in notes)
    assert "blob: 3 cases are left out because their reference is empty." in notes
    assert "blob: with only 4 cases that change, p cannot be below 0.125." in notes


def test_the_table_is_short_where_nothing_is_left_out_and_cases_are_enough():
    head, some, explanation = lines_of(rows_of(*((0.5, 0.4 + 0.01 * i) for i in range(8))))
    assert head.split() == "label cases n with without difference p".split()
    assert some.split()[3] == "8"
    assert "Wilcoxon" in explanation


def test_the_table_says_why_there_is_no_p():
    _, some, *notes = lines_of(rows_of((0.5, 0.5), (0.75, 0.75)))
    assert some.split()[3:] == ["2", "0.625", "0.625", "+0.000", "-"]
    assert "blob: no p, because Dice is the same with and without in all cases." in notes
    _, some, *notes = lines_of(rows_of((math.nan, math.nan), left_out="empty reference"))
    assert some.split()[3:] == ["0", "-", "-", "-", "-"]
    assert "blob: no p, because there is no case to compare." in notes


def test_the_table_has_a_line_for_each_label():
    rows = rows_of((0.5, 0.4), (0.5, 0.5), label="core") + rows_of((0.9, 0.8), (0.9, 0.7), label="whole tumour")
    _, core, whole, *notes = lines_of(rows)
    assert core.startswith("core          without FLAIR")
    assert whole.split()[-4:] == ["0.900", "0.750", "-0.150", "0.5"]
    assert "The p-values are not corrected for the number of labels." in notes
    assert "core: the test leaves out 1 of 2 cases, whose Dice does not change." in notes


# ---------- the images


def oblique_image(file: Path) -> Path:
    """An image with an origin, unequal sides and turned axes, none of which is a round number in single precision."""
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(50, 9, SHAPE).astype(np.float32))
    image.SetSpacing((0.4296875, 0.7, 5.1))
    image.SetOrigin((-91.3, 12.7, 33.1))
    turn = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.2, 0.3)
    image.SetDirection(turn.GetMatrix())
    file.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(file))
    return file


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_the_second_images_are_zeros_in_the_same_place_and_links(tmp_path, ending):
    images = tuple(oblique_image(tmp_path / "given" / f"a_{number:04d}{ending}") for number in range(3))
    write_images(
        [OmissionCase(PredictionCase("a", images), tmp_path / "a", omitted=(1,), others=True)],
        tmp_path / "new" / "images",
    )
    first, zeros, last = (tmp_path / "new" / "images" / image.name for image in images)
    assert first.samefile(images[0])
    assert last.samefile(images[2])
    assert first.is_symlink()
    read, given = sitk.ReadImage(str(zeros)), sitk.ReadImage(str(images[1]))
    assert not sitk.GetArrayFromImage(read).any()
    for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        values = [getattr(image, part)() for image in (read, given)]
        # an NRRD stores spacing and directions as products: they are rounded anew when it is read
        assert values[0] == (pytest.approx(values[1], rel=1e-14) if ending == ".nrrd" else values[1]), part
    assert zeros.stat().st_size < 2000


@pytest.mark.parametrize("possible", [{"hardlink_to"}, set()])
def test_where_links_are_not_possible_there_are_other_ways(tmp_path, monkeypatch, possible):
    def refuse(*_):
        raise OSError("a privilege is not held")

    for kind in {"symlink_to", "hardlink_to"} - possible:
        monkeypatch.setattr(Path, kind, refuse)
    (tmp_path / "given").write_text("image")
    link(tmp_path / "given", tmp_path / "new")
    assert (tmp_path / "new").read_text() == "image"
    assert not (tmp_path / "new").is_symlink()
    assert (tmp_path / "new").samefile(tmp_path / "given") == bool(possible)


# ---------- the command, with a program in the place of nnUNetv2_predict

PREDICTOR = f"""#!{sys.executable}
import os, sys
from pathlib import Path
import numpy as np, SimpleITK as sitk
print("trainers in", os.environ["nnUNet_extTrainer"])
if "images" == sys.argv[2].split("/")[-1] and os.environ.get("FAIL"): sys.exit("out of memory")
output = Path(sys.argv[4]); output.mkdir(parents=True)
(output / "plans.json").touch()
for file in sorted(Path(sys.argv[2]).glob("*_0000.nii.gz")):
    t1 = sitk.ReadImage(str(file))
    flair = sitk.GetArrayFromImage(sitk.ReadImage(str(file).replace("_0000", "_0001")))
    mask = sitk.GetArrayFromImage(t1) > (200 if flair.any() else 300)
    image = sitk.GetImageFromArray(mask.astype(np.uint8)); image.CopyInformation(t1)
    sitk.WriteImage(image, str(output / file.name.replace("_0000", "")))
"""
FOLDER = "nnUNetTrainerAMAE__nnUNetPlans__3d_fullres"


@pytest.fixture
def trained(in_workspace, tmp_path, monkeypatch):
    """A workspace with a checkpoint of nothing, and a program that needs none in the place of nnU-Net's."""
    folder = in_workspace.results / FOLDER
    (folder / "fold_0").mkdir(parents=True)
    torch.save({"network_weights": {}}, folder / "fold_0" / "checkpoint_final.pth")
    shutil.copy(in_workspace.preprocessed / "nnUNetPlans.json", folder / "plans.json")
    shutil.copy(in_workspace.preprocessed / "dataset.json", folder)
    program = tmp_path / "scripts" / "nnUNetv2_predict"
    program.parent.mkdir()
    program.write_text(PREDICTOR)
    program.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(program.parent))
    return in_workspace


def write_study(workspace, case, seed, *, t1=1, flair=1, label=1):
    """A test case with contrasts and label, or zeros in their place."""
    channels, mask = blob(seed)
    write_case(workspace.raw / "imagesTs", case, [channels[0] * t1, channels[1] * flair], mask * np.uint8(label))


def arguments(workspace, output, *, omitted=("FLAIR",), trainer="nnUNetTrainerAMAE", **changes):
    flags = {"-d": "901", "-tr": trainer, "-f": "0", "-device": "cpu", "-o": str(output)}
    flags |= {"-i": str(workspace.raw / "imagesTs"), "-r": str(workspace.raw / "labelsTs")}
    flags |= {f"-{name}": str(value) for name, value in changes.items()}
    return [*(word for pair in flags.items() for word in pair), "--omit", *omitted]


def rows_in(folder):
    with (folder / "omission.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_command_compares_what_can_be_compared(trained, tmp_path, capsys):
    for number in range(3):
        write_study(trained, f"test_{number}", 20 + number)
    write_study(trained, "bare", 30, flair=0)
    write_study(trained, "healthy", 31, label=0)
    write_study(trained, "lone", 32, t1=0)
    omit_command.main(arguments(trained, tmp_path / "out", omitted=["flair"]))
    shown = capsys.readouterr().out
    assert "There is something to omit in 5 of 6 cases: FLAIR in 5." in shown
    assert "Left out, because no contrast would be left to segment with: lone." in shown
    assert "p cannot be below 0.25" in shown

    out = tmp_path / "out"
    again = ["healthy", "test_0", "test_1", "test_2"]
    for folder, cases in {"with_all": sorted([*again, "bare", "lone"]), "without_FLAIR": again}.items():
        assert [file.name for file in sorted((out / folder / "predictions").glob("*.nii.gz"))] == [
            f"{case}.nii.gz" for case in cases
        ]
    images = sorted((out / "without_FLAIR" / "images").iterdir())
    assert [image.name for image in images] == [f"{case}_000{i}.nii.gz" for case in again for i in (0, 1)]
    rows = {row["case"]: row for row in rows_in(out)}
    for case in again[1:]:
        assert (rows[case]["omitted"], rows[case]["left_out"], rows[case]["dice_with"]) == ("FLAIR", "", "1.0")
        assert 0.5 < float(rows[case]["dice_without"]) < 0.8
        assert float(rows[case]["difference"]) == float(rows[case]["dice_without"]) - 1
    reasons = {case: rows[case]["left_out"] for case in ("bare", "healthy", "lone")}
    assert reasons == {"bare": "nothing to omit", "healthy": "empty reference", "lone": "no contrast would be left"}
    assert rows["bare"]["dice_with"] == rows["bare"]["dice_without"] != ""
    assert rows["lone"]["dice_without"] == rows["lone"]["difference"] == ""
    mean = np.mean([float(rows[case]["dice_without"]) for case in again[1:]])
    assert f"3   1.000    {mean:.3f}" in shown
    log = (out / "log.txt").read_text()
    assert log.count("$ nnUNetv2_predict -i ") == 2
    for place in (str(trainers_folder()), "nnUNetTrainerAMAE -f 0 -chk checkpoint_final.pth -device cpu"):
        assert place in log


def test_one_case_is_predicted_without_worker_processes(trained, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, processes in enumerate((2, 0)):  # flags in the log: of one case, and of two
        for file in (trained.raw / "imagesTs").glob(f"test_{number}_*"):
            shutil.copy(file, images)
        omit_command.main(arguments(trained, tmp_path / str(number), i=images))
        assert (tmp_path / str(number) / "log.txt").read_text().count("-npp 0 -nps 0") == processes


def test_regions_and_the_ignore_label_are_treated_as_nnunet_does(trained, tmp_path):
    channels, mask = blob(20)
    reference = mask.copy()
    reference[:, :, 11:] *= 2
    reference[0] = 3  # ignored
    write_case(trained.raw / "imagesTs", "test_0", channels, reference)
    write_study(trained, "test_1", 21)
    file = trained.results / FOLDER / "dataset.json"
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    change_json(file, labels=labels, regions_class_order=[1, 2])
    omit_command.main(arguments(trained, tmp_path / "out"))
    found = {(row["case"], row["label"]): row for row in rows_in(tmp_path / "out")}
    assert list(found) == [(case, label) for case in ("test_0", "test_1") for label in ("whole", "core")]
    assert float(found["test_0", "whole"]["dice_with"]) == 1
    assert float(found["test_0", "core"]["dice_with"]) == 0
    assert found["test_1", "core"]["left_out"] == "empty reference"
    assert found["test_1", "core"]["dice_with"] == ""


def test_a_failed_prediction_names_the_log(trained, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("FAIL", "1")
    message = refused(omit_command.main, *arguments(trained, tmp_path / "out"))
    assert f"0 of 2 predictions and ended with exit code 1: see {tmp_path / 'out' / 'log.txt'}" in message
    assert "out of memory" in (tmp_path / "out" / "log.txt").read_text()
    assert not (tmp_path / "out" / "omission.csv").exists()
    assert "ended with exit code 1" in refused(omit_command.main, *arguments(trained, tmp_path / "out"))  # it can go on


def test_other_trainers_stay_findable(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    omit_command.main(arguments(trained, tmp_path / "out"))
    both = f"trainers in {tmp_path}{os.pathsep}{trainers_folder()}\n"
    assert both in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"omitted": ["T2"]}, "--omit T2: Dataset901_Tiny has only T1, FLAIR."),
        ({"omitted": ["FLAIR", "t1w"]}, "would leave none of T1, FLAIR"),
        ({"trainer": "nnUNetTrainer"}, "run nnUNetv2_train 901 3d_fullres 0 -p nnUNetPlans -tr nnUNetTrainer first"),
        ({"f": "1"}, "run nnUNetv2_train 901 3d_fullres 1"),
        ({"chk": "checkpoint_best.pth"}, "checkpoint_best.pth"),
        ({"i": "nowhere"}, "There are no images such as CASE_0000.nii.gz in"),
        ({"r": "nowhere"}, "The case test_0 has no reference segmentation"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(trained, tmp_path, refused, changes, reason):
    assert reason in refused(omit_command.main, *arguments(trained, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_unfit_images_are_refused_before_anything_is_written(trained, tmp_path, refused):
    images, labels = trained.raw / "imagesTs", trained.raw / "labelsTs"

    def reason():
        return refused(omit_command.main, *arguments(trained, tmp_path / "out"))

    (images / "test_0_0001.nii.gz").rename(images / "test_0_0002.nii.gz")
    assert "test_0 has the channels 0000, 0002, but Dataset901_Tiny has 0000, 0001 (T1, FLAIR)" in reason()
    (images / "test_0_0002.nii.gz").rename(images / "test_0.nii.gz")
    assert "test_0.nii.gz is not named as nnU-Net expects" in reason()
    (images / "test_0.nii.gz").unlink()
    write_study(trained, "test_0", 20, flair=0)
    write_study(trained, "test_1", 21, flair=0)
    assert "None of the 2 cases has FLAIR: these channels hold only zeros" in reason()
    write_study(trained, "test_1", 21, t1=0)
    assert "No case that has FLAIR has another contrast to segment with" in reason()
    shutil.copy(oblique_image(tmp_path / "other.nii.gz"), images / "test_1_0001.nii.gz")
    assert "test_1 cannot be read (its files differ in size or spacing)" in reason()
    (images / "test_1_0001.nii.gz").write_text("no image")
    assert "test_1_0001.nii.gz cannot be read" in reason()
    write_study(trained, "test_1", 21)
    label = sitk.ReadImage(str(labels / "test_1.nii.gz"))
    sitk.WriteImage(label[:, :, 1:], str(labels / "test_1.nii.gz"))
    assert "test_1.nii.gz differ in size (22 18 14 and 22 18 13 voxels): resample the reference" in reason()
    sitk.WriteImage(sitk.Flip(label, (True, False, False)), str(labels / "test_1.nii.gz"))
    assert "test_1.nii.gz differ in direction" in reason()
    assert not (tmp_path / "out").exists()


def change_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def model_in(workspace):
    chosen = {"trainer": "nnUNetTrainerAMAE", "folds": ["0"], "checkpoint": "checkpoint_final.pth"}
    return find_model(find_dataset("901"), "nnUNetPlans", "3d_fullres", **chosen)


def test_contrasts_are_found_by_other_spellings_and_in_the_order_of_the_channels(trained):
    file = trained.results / FOLDER / "dataset.json"
    change_json(file, channel_names={"0": "T1w", "1": "Fluid-attenuated inversion recovery", "2": "T1 post"})
    plans = json.loads((file.parent / "plans.json").read_text())
    plans["configurations"]["3d_fullres"] |= {
        "normalization_schemes": ["ZScoreNormalization", "CTNormalization", "NoNormalization"],
        "use_mask_for_norm": [True, False, False],
    }
    plans["foreground_intensity_properties_per_channel"]["2"] = {}
    (file.parent / "plans.json").write_text(json.dumps(plans))
    plan = model_in(trained).plan
    assert find_channels(plan, ["t1 POST", "T1"]) == [0, 2]
    with pytest.raises(ValueError, match="CTNormalization turns zeros into other values"):
        find_channels(plan, ["FLAIR"])


def test_a_cascade_and_other_kinds_of_files_are_refused(trained):
    folder = trained.results / FOLDER
    change_json(folder / "dataset.json", file_ending=".tif")
    with pytest.raises(ValueError, match=r"Dataset901_Tiny has \.tif files, but only \.nii\.gz"):
        find_channels(model_in(trained).plan, ["FLAIR"])
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match="needs the segmentation of the first stage"):
        model_in(trained)


@pytest.mark.parametrize("masked", [False, True])
def test_zeros_are_zeros_after_nnunets_preprocessing(trained, tmp_path, masked):
    plans = json.loads((trained.results / FOLDER / "plans.json").read_text())
    plans["configurations"]["3d_fullres"] |= {"use_mask_for_norm": [masked, masked], "spacing": [1.2, 1.4, 0.8]}
    (trained.results / FOLDER / "plans.json").write_text(json.dumps(plans))
    plan = model_in(trained).plan
    channels, _ = blob(20)
    write_case(tmp_path / "images", "a", [channels[0] * (channels[0] > 90), channels[1]])
    images = tuple(sorted((tmp_path / "images").iterdir()))
    write_images([OmissionCase(PredictionCase("a", images), tmp_path, omitted=(1,), others=True)], tmp_path / "zeros")
    preprocessor = plan.configuration.preprocessor_class(verbose=False)
    files = [str(file) for file in sorted((tmp_path / "zeros").iterdir())]
    volume, *_ = preprocessor.run_case(files, None, plan.plans, plan.configuration, plan.dataset_json)
    assert volume.shape[1:] != SHAPE
    assert volume[0].any()
    assert not volume[1].any()


# ---------- the command with nnU-Net itself


@pytest.mark.slow
def test_a_network_is_compared_by_nnunets_own_prediction(workspace, tmp_path):
    """One with random weights, which segments something, whatever it sees."""
    trainer = nnUNetTrainerViTScratch.__name__
    folder = workspace.results / f"{trainer}__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    shutil.copy(workspace.preprocessed / "dataset.json", folder)
    plans = json.loads((workspace.preprocessed / "nnUNetPlans.json").read_text())
    network = {"size": "XS", "token": [4, 4, 4], "decoder": "upscale"}
    plans["configurations"]["3d_fullres"]["vit_mae"] = {"network": network}
    (folder / "plans.json").write_text(json.dumps(plans))
    manager = PlansManager(plans)
    torch.manual_seed(0)
    built = nnUNetTrainerViTScratch.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 2, 2)
    content = {"network_weights": built.state_dict(), "trainer_name": trainer}
    content |= {"init_args": {"configuration": "3d_fullres"}, "inference_allowed_mirroring_axes": None}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    out = tmp_path / "taken away"
    write_study(workspace, "bare", 30, flair=0)
    printed = workspace.call("mae3d_omit", *arguments(workspace, out, trainer=trainer)).stdout
    assert "There is something to omit in 2 of 3 cases" in printed
    assert "blob   without FLAIR     2" in printed
    rows = {row["case"]: row for row in rows_in(out)}
    assert list(rows) == ["bare", "test_0", "test_1"]
    assert rows["bare"]["left_out"] == "nothing to omit"
    for case in ("test_0", "test_1"):
        pair = [out / folder / "predictions" / f"{case}.nii.gz" for folder in ("with_all", "without_FLAIR")]
        first, second = (read_voxels(file) for file in pair)
        assert (first != second).any(), case
        reference = blob(20 + int(case[-1]))[1]
        for name, prediction in (("dice_with", first), ("dice_without", second)):
            overlap = 2 * (reference * prediction).sum() / (reference.sum() + prediction.sum())
            assert float(rows[case][name]) == pytest.approx(overlap)
    assert not (out / "without_FLAIR" / "predictions" / "bare.nii.gz").exists()
    assert "Predicting test_0" in (out / "log.txt").read_text()
