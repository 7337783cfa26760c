"""Calibration and quantification of models in nnU-Net's folders, with predictions that are made here."""

import csv
import dataclasses
import doctest
import errno
import json
import math
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SHAPE, SPACING, Poison, blob, read_voxels, write_case
from dynamic_network_architectures.architectures.primus import PrimusV2
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunet_vit_mae.calibration.cases import Classes
from nnunet_vit_mae.calibration.conformal import VolumeEstimate
from nnunet_vit_mae.calibration.record import read_calibration
from nnunet_vit_mae.calibration.shifts import segment
from nnunet_vit_mae.calibration.thresholds import Calibration, CaseVolumes, ThresholdCurve
from nnunet_vit_mae.cli import calibrate as calibrate_command
from nnunet_vit_mae.cli import quantify as quantify_command
from nnunet_vit_mae.errors import UserError, WriteError
from nnunet_vit_mae.evaluation.cases import find_evaluation_set
from nnunet_vit_mae.imaging.volumes import Geometry
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.nnunet import calibration, quantification, training_range, uncertainty
from nnunet_vit_mae.nnunet.calibrated import calibrated_head
from nnunet_vit_mae.nnunet.calibration import FittedModel, threshold_table
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.members import MemberPredictor
from nnunet_vit_mae.nnunet.models import find_model, model_hash
from nnunet_vit_mae.nnunet.plans import classes_of
from nnunet_vit_mae.nnunet.predicted_cases import PredictedCase, development_cases, training_cases
from nnunet_vit_mae.nnunet.prediction import find_prediction_cases, remove_outdated
from nnunet_vit_mae.nnunet.quantification import thresholds_of
from nnunet_vit_mae.nnunet.training_range import (
    TrainingRange,
    read_training_range,
    read_training_volumes,
    warnings_of,
)
from nnunet_vit_mae.nnunet.untrained import untrained_network
from nnunet_vit_mae.nnunet.volume_tables import COLUMNS, keep_earlier, refuse_other_content
from nnunet_vit_mae.presets import DECODERS
from nnunet_vit_mae.settings import Network
from nnunet_vit_mae.storage.csv_tables import read_rows
from nnunet_vit_mae.storage.files import file_hash, locked

TRAINER = "nnUNetTrainerBaseline"
VOXEL = math.prod(SPACING)


# ---------- the head


def u_net() -> nn.Module:
    sizes = {"features_per_stage": (4, 8), "kernel_sizes": 3, "strides": (1, 2), "n_conv_per_stage": 1}
    return PlainConvUNet(
        2, 2, **sizes, conv_op=nn.Conv3d, num_classes=3, n_conv_per_stage_decoder=1, conv_bias=True, nonlin=nn.ReLU
    )


@pytest.mark.parametrize("kind", [*DECODERS, "adaptive", "U-Net", "Primus"])
def test_every_logit_is_divided_and_shifted(kind):
    """Also for a head with an output for each voxel of a token, whose sides are unequal."""
    torch.manual_seed(0)
    if kind == "U-Net":
        network = u_net()
    elif kind == "Primus":
        network = PrimusV2(2, 24, (8, 8, 8), 3, 1, 2, input_shape=(8, 16, 16))
    else:
        adaptive = kind == "adaptive"
        chosen = Network(size="XS", token=(2, 4, 8), decoder="unetr" if adaptive else kind, adaptive=adaptive)
        network = build_segmenter(chosen, 2, 3, drop_path=0.0, unet=u_net)
    network.eval()
    shifts = [0.0, -2.5, 1.25]
    volume = torch.randn(2, 2, 8, 16 if kind == "Primus" else 12, 16)
    with torch.no_grad():
        before = network(volume)
        network.load_state_dict(calibrated_head(network.state_dict(), shifts, temperature=2.0))
        torch.testing.assert_close(network(volume), before / 2 + torch.tensor(shifts).view(3, 1, 1, 1))


def test_a_network_with_another_head_is_refused():
    with pytest.raises(UserError, match="mae3d_calibrate does not know the last layer"):
        calibrated_head({"up.head.weight": torch.zeros(2), "classifier.bias": torch.zeros(2)}, [0, 1])


# ---------- a model whose predictions are made up


LABELS = {
    "binary": {"background": 0, "blob": 1},
    "several": {"background": 0, "blob": 1, "rim": 2},
    "regions": {"background": 0, "whole": [1, 2], "core": 2},
}


@pytest.fixture
def model(in_workspace, request):
    """Fold 0 and 1 of a model with probabilities of their validation cases; a case has core and rim if asked for."""
    kind = getattr(request, "param", "binary")
    folder = in_workspace.results / f"{TRAINER}__nnUNetPlans__3d_fullres"
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text()) | {"labels": LABELS[kind]}
    if kind == "regions":
        description["regions_class_order"] = [1, 2]
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(description))
    shutil.copy(in_workspace.preprocessed / "nnUNetPlans.json", folder / "plans.json")
    channels = {"binary": 2, "several": 3, "regions": 2}[kind]
    splits = [{"train": ["train_2", "train_3", "train_4", "train_5"], "val": ["train_0", "train_1"]}]
    splits.append({"train": ["train_0", "train_1", "train_4", "train_5"], "val": ["train_2", "train_3"]})
    (in_workspace.preprocessed / "splits_final.json").write_text(json.dumps(splits))
    for fold, split in enumerate(splits):
        weights = {"decoder.seg_layers.0.bias": torch.zeros(channels), "decoder.other.bias": torch.ones(2)}
        (folder / f"fold_{fold}" / "validation").mkdir(parents=True)
        torch.save(
            {"network_weights": weights, "trainer_name": TRAINER, "optimizer_state": {"a": 1}},
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
        for name in split["val"]:
            label = labels_of(in_workspace, name, kind)
            np.savez_compressed(
                folder / f"fold_{fold}" / "validation" / f"{name}.npz", probabilities=believed(label, channels, kind)
            )
    return folder


def labels_of(workspace, name, kind):
    """The reference of a case; a half of it becomes label 2 where there is one."""
    file = workspace.preprocessed / "gt_segmentations" / f"{name}.nii.gz"
    image = sitk.ReadImage(str(file))
    label = sitk.GetArrayFromImage(image)
    if kind != "binary":
        label[: SHAPE[0] // 2] *= 2
        changed = sitk.GetImageFromArray(label)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))
    return label


def believed(label, channels, kind):
    """Probabilities that are too low by the same factor of odds everywhere."""
    random = np.random.default_rng(int(label.sum()))
    logits = random.normal(-3, 1, (channels, *label.shape))
    if kind == "regions":
        logits[0] += 3 * (label > 0)
        logits[1] += 2 * (label == 2)
        return (1 / (1 + np.exp(-logits))).astype(np.float32)
    logits[0] += 4
    for value in range(1, channels):
        logits[value] += 3 * (label == value)
    return (np.exp(logits) / np.exp(logits).sum(axis=0)).astype(np.float32)


def calibrate(*flags):
    calibrate_command.main(["-d", "901", "-tr", TRAINER, "-f", "0", "1", "-device", "cpu", *flags])


@pytest.mark.parametrize("model", LABELS, indirect=True)
@pytest.mark.parametrize("objective", ["volume", "dice"])
def test_the_record_says_what_thresholds_do(model, objective, capsys):
    calibrate("--objective", objective)
    record = json.loads((model / "calibration.json").read_text())
    dataset = find_dataset("901")
    found = find_model(
        dataset, "nnUNetPlans", "3d_fullres", trainer=TRAINER, folds=["0"], checkpoint="checkpoint_final.pth"
    )
    classes = classes_of(found.plan)
    assert list(record["thresholds"]) == list(classes.names)
    shifts = [record["shifts"][name] for name in classes.names]
    by_case = {(row["case"], row["label"]): row for row in record["cases"]}
    assert {row["fold"] for row in record["cases"]} == {"0", "1"}
    for fold, name in (("0", "train_1"), ("1", "train_2")):
        probabilities = np.load(model / f"fold_{fold}" / "validation" / f"{name}.npz")["probabilities"]
        for label, mask in zip(classes.names, segment(probabilities, classes, shifts), strict=True):
            assert by_case[name, label]["after_mm3"] == pytest.approx(mask.sum() * VOXEL)
            assert by_case[name, label]["fold"] == fold
    key = {"volume": "absolute_difference_mm3", "dice": "dice"}[objective]
    before, after, left_out = (
        np.mean([record[when][name][key] for name in classes.names]) for when in ("before", "after", "left_out")
    )
    assert after <= left_out if objective == "volume" else after >= left_out
    assert after < before if objective == "volume" else after > before
    assert "calibration.json" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["volume", "dice"])
@pytest.mark.parametrize(("after", "left_out", "told"), [(0.5, 1.0, True), (0.5, 0.9, False), (1.0, 1.0, False)])
def test_a_threshold_that_helps_no_case_that_is_left_out_is_told(objective, after, left_out, told):
    """Losses of one case; before calibration it is 1."""
    volumes = (CaseVolumes("case", "blob", 0.0, 1.0, after, left_out, 0.0, 1 - after, 1 - left_out),)
    curve = ThresholdCurve(np.array([0.5]), np.array([1.0]), np.array([0.0]))
    fitted = FittedModel(Calibration((0.5,), (curve,), volumes), objective, 1.0, {}, {})
    assert ("blob: the threshold does not help" in threshold_table(fitted)) == told


def test_folds_that_nobody_chose_are_named(model, caplog):
    told = "Fold 0 alone is used, but there are the folds 0, 1: choose with -f."
    for flags, times in (([], 1), (["-f", "0"], 0)):
        caplog.clear()
        calibrate_command.main(["-d", "901", "-tr", TRAINER, "-device", "cpu", *flags])
        assert caplog.messages.count(told) == times


@pytest.mark.parametrize("model", ["several"], indirect=True)
def test_figures_of_labels_that_look_like_paths_stay_in_their_folder(model):
    file = model / "dataset.json"
    labels = {"background": 0, "blob/../../edge": 1, "rim": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"labels": labels}))
    calibrate()
    figures = sorted(figure.name for figure in model.glob("calibration_bland_altman*"))
    assert figures == ["calibration_bland_altman_blob_.._.._edge.png", "calibration_bland_altman_rim.png"]


@pytest.mark.parametrize("model", LABELS, indirect=True)
def test_checkpoints_carry_the_shift_and_nothing_else_changes(model):
    calibrate()
    record = json.loads((model / "calibration.json").read_text())
    shifts = [*record["shifts"].values()]
    for fold in "01":
        plain, calibrated = (
            torch.load(model / f"fold_{fold}" / f"checkpoint_{name}.pth", weights_only=False)
            for name in ("final", "calibrated")
        )
        bias = calibrated["network_weights"].pop("decoder.seg_layers.0.bias")
        assert bias.tolist() == pytest.approx([0.0] * (len(bias) - len(shifts)) + shifts)
        assert torch.equal(
            calibrated["network_weights"]["decoder.other.bias"], plain["network_weights"]["decoder.other.bias"]
        )
        assert plain["optimizer_state"] == {"a": 1}
        assert calibrated["optimizer_state"] is None


@pytest.mark.parametrize("model", LABELS, indirect=True)
def test_a_temperature_changes_probabilities_and_no_segmentation(model, capsys):
    calibrate()
    plain = json.loads((model / "calibration.json").read_text())
    calibrate("--temperature")
    record = json.loads((model / "calibration.json").read_text())
    temperature = record["temperature"]
    assert plain["temperature"] == 1
    assert temperature != 1
    assert record["cases"] == plain["cases"]
    for label, shift in plain["shifts"].items():
        assert record["shifts"][label] == pytest.approx(shift / temperature)
        assert record["thresholds"][label] == pytest.approx(1 / (1 + math.exp(shift / temperature)))
        assert plain["calibration_error"][label]["before"] == record["calibration_error"][label]["before"]
    likelihood = record["negative_log_likelihood"]
    assert likelihood["after"] < likelihood["before"] == plain["negative_log_likelihood"]["after"]
    weights = torch.load(model / "fold_1" / "checkpoint_calibrated.pth", weights_only=False)["network_weights"]
    assert torch.equal(weights["decoder.other.bias"], torch.ones(2))
    assert f"at the temperature {temperature:.3g}" in capsys.readouterr().out
    assert (model / "calibration_reliability.png").stat().st_size > 0


def model_of(*folds, checkpoint="checkpoint_calibrated.pth"):
    chosen = {"trainer": TRAINER, "folds": folds, "checkpoint": checkpoint}
    return find_model(find_dataset("901"), "nnUNetPlans", "3d_fullres", **chosen)


def test_folds_that_are_calibrated_one_after_another_keep_their_records(model, in_workspace):
    for fold in "01":
        calibrate_command.main(["-d", "901", "-tr", TRAINER, "-f", fold, "-device", "cpu"])
    assert not (model / "calibration.json").exists()
    thresholds = []
    for fold in "01":
        record = json.loads((model / f"fold_{fold}" / "calibration.json").read_text())
        assert {row["fold"] for row in record["cases"]} == {fold}
        assert (model / f"fold_{fold}" / "calibration_curve.png").is_file()
        assert thresholds_of(model_of(fold)) == record["thresholds"]
        thresholds.append(record["thresholds"]["blob"])
    assert thresholds[0] != thresholds[1]
    with pytest.raises(UserError, match="run mae3d_calibrate with -f 0 1"):
        thresholds_of(model_of("0", "1"))
    with pytest.raises(UserError, match=r"give that of a fold \(.*fold_0.calibration.json"):
        read_calibration(model)

    calibrate()  # both together
    together = json.loads((model / "calibration.json").read_text())
    for folds in (("0", "1"), ("0",), ("1",)):
        assert thresholds_of(model_of(*folds)) == together["thresholds"]
    calibrate_command.main(["-d", "901", "-tr", TRAINER, "-f", "0", "-device", "cpu"])
    assert thresholds_of(model_of("0"))["blob"] == thresholds[0]
    assert thresholds_of(model_of("1")) == together["thresholds"]


def test_probabilities_of_an_older_checkpoint_are_not_taken(model, monkeypatch):
    commands, linked = [], []

    def note(command, *_):
        commands.append(command)
        linked.extend(sorted(file.name for file in (model / "calibration_fold_1" / "images").iterdir()))

    monkeypatch.setattr("nnunet_vit_mae.nnunet.prediction._run", note)
    checkpoint = model / "fold_1" / "checkpoint_final.pth"
    newest = max(file.stat().st_mtime for file in (model / "fold_1" / "validation").iterdir())
    os.utime(checkpoint, (newest + 10, newest + 10))
    with pytest.raises(SystemExit):  # nothing was predicted, so there is nothing to read
        calibrate()
    (command,) = commands
    assert command[command.index("-f") + 1 : command.index("-chk")] == ["1"]
    assert "--save_probabilities" in command
    assert linked == [f"train_{n}_000{c}.nii.gz" for n in (2, 3) for c in (0, 1)]
    assert not (model / "calibration_fold_1" / "images").exists()


def test_probabilities_of_the_best_checkpoint_are_not_taken_for_those_of_the_final_one(model, predicted):
    """nnUNetv2_train --val_best writes them to the same place."""
    note = model / "fold_1" / "validation" / "checkpoint.json"
    note.write_text(json.dumps({"checkpoint": FINAL}))
    calibrate()
    assert not predicted
    note.write_text(json.dumps({"checkpoint": FINAL, "sha256": file_hash(model / "fold_1" / FINAL)}))
    calibrate()
    assert not predicted
    others = ({"checkpoint": "checkpoint_best.pth"}, {}, {"checkpoint": FINAL, "sha256": "of another training"})
    for number, other in enumerate(others, 1):
        note.write_text(json.dumps(other))
        with pytest.raises(SystemExit):  # what was predicted is empty
            calibrate()
        assert len(predicted) == number
        shutil.rmtree(model / "calibration_fold_1")


FINAL = "checkpoint_final.pth"


def train_again(file):
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["network_weights"]["decoder.seg_layers.0.bias"] += 1
    torch.save(checkpoint, file)


@pytest.fixture
def predicted(monkeypatch):
    """The commands that nnU-Net was asked for; each expected segmentation is there at once, empty."""
    commands = []

    def note(command, expected, _):
        commands.append(command)
        for file in expected:
            if file.is_file():  # nnU-Net is told to go on
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.Image(4, 4, 4, sitk.sitkUInt8), str(file))
            file.with_name(file.name.replace(".nii.gz", ".npz")).touch()

    monkeypatch.setattr("nnunet_vit_mae.nnunet.prediction._run", note)
    return commands


def test_predictions_of_another_model_or_folder_are_not_taken(model, in_workspace, predicted, tmp_path):
    images, labels = in_workspace.raw / "imagesTs", in_workspace.raw / "labelsTs"
    shutil.copytree(images, tmp_path / "images")

    def predict(fold, images):
        before = len(predicted)
        chosen = model_of(fold, checkpoint=FINAL)
        development_cases(chosen, images, labels, "cpu", allow_training_cases=False)
        return len(predicted) - before

    train_again(model / "fold_1" / FINAL)  # both are the same at first
    assert [predict("0", images), predict("0", images)] == [1, 0]
    assert [predict("1", images), predict("1", images)] == [1, 0]
    assert [predict("1", tmp_path / "images"), predict("0", tmp_path / "images")] == [1, 1]


def test_predictions_of_another_model_are_not_taken_from_a_folder_that_is_a_link(model, predicted, tmp_path):
    """They may lie on a larger disk, and such a folder cannot be removed as one."""
    (tmp_path / "large").mkdir()
    (model / "calibration_fold_1").mkdir()
    (model / "calibration_fold_1" / "predictions").symlink_to(tmp_path / "large")
    for number in (1, 2):
        train_again(model / "fold_1" / FINAL)
        with pytest.raises(SystemExit):  # what was predicted is empty
            calibrate()
        assert len(predicted) == number


def test_scans_that_were_replaced_are_predicted_again(model, in_workspace, predicted):
    images, labels = in_workspace.raw / "imagesTs", in_workspace.raw / "labelsTs"
    chosen = model_of("0", checkpoint=FINAL)
    development_cases(chosen, images, labels, "cpu", allow_training_cases=False)
    segmentations = model / "calibration" / "predictions"
    later = 2 * (segmentations / "test_0.nii.gz").stat().st_mtime
    os.utime(images / "test_0_0001.nii.gz", (later, later))
    development_cases(chosen, images, labels, "cpu", allow_training_cases=False)
    assert len(predicted) == 2


def test_volumes_of_scans_that_were_replaced_are_not_reported(model, scans, tmp_path, predicted):
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    quantify(scans, table)
    assert not predicted
    image = next(scans.iterdir())
    os.utime(image, (2 * time.time(), 2 * time.time()))
    quantify(scans, table)
    assert len(predicted) == 1
    with table.open() as stream:
        volumes = {row["case"]: float(row["volume_mm3"]) for row in csv.DictReader(stream)}
    assert [case for case, volume in volumes.items() if volume == 0] == [image.name[: -len("_0000.nii.gz")]]


def test_held_out_cases_are_never_calibrated_on(model, in_workspace, predicted):
    hold_out(in_workspace, "train_1")
    cases = training_cases(model_of("0", checkpoint=FINAL), "cpu")
    assert [case.name for case in cases] == [f"train_{number}" for number in (0, 2, 3, 4, 5)]


def test_a_development_set_has_no_patient_of_training_or_testing(model, in_workspace, predicted):
    """By `patients.json`, as a second scan of a patient has another name."""
    images, labels = in_workspace.raw / "imagesTs", in_workspace.raw / "labelsTs"
    chosen = model_of("0", checkpoint=FINAL)
    (in_workspace.preprocessed / "patients.json").write_text(
        json.dumps({"train_1": "A", "train_2": "B", "test_0": "A"})
    )
    assert development_cases(chosen, images, labels, "cpu", allow_training_cases=False)  # fold 0 validates on train_1
    (in_workspace.preprocessed / "patients.json").write_text(json.dumps({"train_2": "A", "test_0": "A"}))
    with pytest.raises(
        UserError, match=r"trained on 1 of the \d cases, or on other scans of their patients \(test_0\)"
    ):
        development_cases(chosen, images, labels, "cpu", allow_training_cases=False)
    assert development_cases(chosen, images, labels, "cpu", allow_training_cases=True)
    (in_workspace.preprocessed / "patients.json").unlink()
    (model / "fold_0" / "validation" / "other.nii.gz").touch()  # of another split, which does not matter here
    assert development_cases(chosen, images, labels, "cpu", allow_training_cases=False)
    (in_workspace.preprocessed / "patients.json").write_text(json.dumps({"train_2": "A", "test_0": "A"}))
    with pytest.raises(UserError, match="is not the split that"):
        development_cases(chosen, images, labels, "cpu", allow_training_cases=False)
    hold_out(in_workspace, "train_2")
    with pytest.raises(UserError, match=r"1 of the \d cases \(test_0\) are of patients that .*split.json holds out"):
        development_cases(chosen, images, labels, "cpu", allow_training_cases=True)


@pytest.mark.parametrize("finished", [True, False])
def test_splits_that_changed_since_the_training_are_refused(model, in_workspace, refused, finished):
    """Fold 0 was validated on train_0 and train_1, which nnU-Net has left in its folder."""
    validation = model / "fold_0" / "validation"
    for name in ("train_0", "train_1"):
        shutil.copy(in_workspace.preprocessed / "gt_segmentations" / f"{name}.nii.gz", validation)
    if finished:
        (validation / "summary.json").touch()
    calibrate()
    file = in_workspace.preprocessed / "splits_final.json"
    splits = json.loads(file.read_text())
    for val in (["train_0", "train_2"], ["train_0"], ["train_0", "train_1", "train_2"]):
        file.write_text(json.dumps([{"train": ["train_3", "train_4"], "val": val}, splits[1]]))
        if finished or "train_1" not in val:
            assert "splits_final.json is not the split that" in refused(lambda flags: calibrate(*flags))
    file.write_text(json.dumps(splits))
    calibrate()


def test_a_reference_along_other_axes_than_its_image_is_refused(model, in_workspace, predicted):
    images, labels = in_workspace.raw / "imagesTs", in_workspace.raw / "labelsTs"
    file = labels / "test_0.nii.gz"
    sitk.WriteImage(sitk.Flip(sitk.ReadImage(str(file)), [False, True, False]), str(file))
    with pytest.raises(UserError, match=r"test_0_0000.nii.gz and .*test_0.nii.gz differ in direction"):
        development_cases(model_of("0", checkpoint=FINAL), images, labels, "cpu", allow_training_cases=False)
    assert not predicted


def test_a_threshold_of_a_checkpoint_that_was_trained_again_is_refused(model):
    calibrate()
    assert thresholds_of(model_of("0", "1"))
    train_again(model / "fold_1" / FINAL)
    with pytest.raises(UserError, match=r"fold_1.checkpoint_final.pth is not the checkpoint that .* was made from"):
        thresholds_of(model_of("0", "1"))
    assert thresholds_of(model_of("0"))  # which has not changed


def test_mistakes_in_calibrating_get_a_sentence(model, in_workspace, refused, tmp_path):
    def refuse(*flags, folds=("0",)):
        return refused(calibrate_command.main, *f"-d 901 -tr {TRAINER} -device cpu -f".split(), *folds, *flags)

    assert "-i and -l go together" in refuse("-i", str(tmp_path))
    assert "already has a threshold" in refuse("-chk", "checkpoint_calibrated.pth")
    assert "There is no checkpoint" in refuse(folds=["3"])
    (model / "fold_all").mkdir()
    shutil.copy(model / "fold_0" / "checkpoint_final.pth", model / "fold_all")
    assert "-f all was trained on every labelled case" in refuse(folds=["all"])
    raw = in_workspace.raw
    message = refuse("-i", str(raw / "imagesTr"), "-l", str(raw / "labelsTr"))
    assert "on 4 of the 6 cases, or on other scans of their patients (train_2, train_3, train_4 and 1 more)" in message
    message = refuse("-i", str(raw / "imagesTs"), "-l", str(tmp_path))
    assert "The case test_0 has no reference segmentation" in message
    file = model / "fold_0" / "validation" / "train_0.npz"
    np.savez(file, probabilities=np.zeros((2, 3, 4, 5), np.float32))
    assert "has (3, 4, 5) voxels" in refuse()
    file.write_bytes(b"half a file")
    assert "train_0.npz cannot be read" in refuse()
    assert not [*model.rglob("calibration.json"), *model.rglob("checkpoint_calibrated.pth")]


# ---------- the members of a prediction


@pytest.fixture
def with_networks(model):
    """The same model with networks of random weights, whose probabilities are not all near a half."""
    for fold in "01":
        plan = model_of(fold, checkpoint="checkpoint_final.pth").plan
        torch.manual_seed(int(fold))
        network = untrained_network(plan, TRAINER, "model")
        file = model / f"fold_{fold}" / "checkpoint_final.pth"
        weights = calibrated_head(network.state_dict(), [0.0, 0.1], temperature=0.2)
        mirrored = {"inference_allowed_mirroring_axes": (0, 2), "trainer_name": TRAINER, "init_args": {}}
        torch.save({"network_weights": weights, **mirrored}, file)
        os.utime(file, (1, 1))  # older than the probabilities
    return model


def predicted_by_nnunet(model, images, mirrored_axes):
    """Segmentation and probabilities of a case as nnU-Net's own predictor gives them."""
    plan, weights = model.plan, [torch.load(file)["network_weights"] for file in model.files]
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    network = untrained_network(plan, TRAINER, "model")
    predictor.manual_initialization(
        network, plan.plans, plan.configuration, weights, plan.dataset_json, TRAINER, mirrored_axes
    )
    files = [[str(image) for image in images]]
    return predictor.predict_from_files_sequential(files, None, save_probabilities=True)[0]


def test_members_are_those_that_nnunet_averages(with_networks, in_workspace):
    """The mean as nnU-Net's own predictor gives it, and each fold and mirroring counted one by one."""
    images = [in_workspace.raw / "imagesTs" / f"test_0_000{channel}.nii.gz" for channel in range(2)]
    models = {
        name: model_of(*folds, checkpoint="checkpoint_final.pth")
        for name, folds in {"0": "0", "1": "1", "together": "01"}.items()
    }
    shift = 0.7  # the weights are taken for calibrated ones, and soft Dice is that before calibration
    found = MemberPredictor(models["together"], [shift], torch.device("cpu")).predict(images)
    assert list(found.estimates) == list(models)
    for name, estimates in found.estimates.items():
        segmentation, probabilities = predicted_by_nnunet(models[name], images, (0, 2))
        assert 0.02 < segmentation.mean() < 0.98
        assert estimates["blob"].volume_mm3 == pytest.approx(VOXEL * segmentation.sum(), rel=0.01)
        assert estimates["blob"].voxel_mm3 == VOXEL
    inner = (slice(2, -2),) * 3  # nnU-Net's weights of a window underflow at the border
    assert np.mean(found.segmentation[inner] != segmentation[inner]) < 2e-3
    mask = found.segmentation == 1
    unshifted = probabilities[1] * np.exp(-shift)
    unshifted /= probabilities[0] + unshifted
    soft = 2 * unshifted[mask].sum() / (mask.sum() + unshifted.sum())
    assert found.soft_dice["blob"] == pytest.approx(soft, abs=2e-3)
    assert found.estimates["0"]["blob"].spread_mm3 > 0
    assert found.disagreement.shape == SHAPE
    # two folds that are not mirrored are two of the eight members: where both differ, a quarter disagrees at least
    unmirrored = [predicted_by_nnunet(models[fold], images, None)[0] for fold in "01"]
    both = np.all([own != found.segmentation for own in unmirrored], axis=0)[inner]
    assert both.any()
    assert found.disagreement[inner][both].min() >= 25
    assert found.disagreement[inner].mean() < 50  # most members agree with their mean


def test_the_spread_of_a_volume_is_that_of_the_members_counts_in_voxels_of_the_network():
    """Here a crop of 240 voxels of 1 mm3 has 30 voxels in the network: 8 mm3 each."""
    classes = Classes(("whole", "core"), ((1, 2), (2,)), painted=(1, 2))
    segmentation = np.zeros((4, 6, 12), int)
    segmentation[0, 0, :3], segmentation[1, 1, :2] = 1, 2
    properties = {"spacing": (2.0, 1.0, 0.5), "shape_after_cropping_and_before_resampling": (4, 6, 10)}
    counts = np.array([[3, 1], [5, 1]])  # of two members
    found = MemberPredictor._estimates(SimpleNamespace(classes=classes), segmentation, counts, 30, properties)
    assert found == {"whole": VolumeEstimate(5.0, 8.0, 1.0), "core": VolumeEstimate(2.0, 0.0, 1.0)}


@pytest.mark.usefixtures("with_networks")
def test_the_network_of_members_is_on_its_device_before_nnunet_moves_it_in_inference_mode():
    batch_norm = nn.BatchNorm3d(2)
    with torch.inference_mode():
        batch_norm.to(torch.double)  # as a move to a GPU
    with pytest.raises(RuntimeError, match="inference tensor"):
        batch_norm.load_state_dict(nn.BatchNorm3d(2).state_dict())
    predictor = MemberPredictor(model_of("0", checkpoint="checkpoint_final.pth"), [0.0], torch.device("meta"))
    assert {parameter.device.type for parameter in predictor.network.parameters()} == {"meta"}


def test_from_validation_cases_to_the_intervals_of_new_ones(with_networks, in_workspace, tmp_path, capsys, refused):
    model, table = with_networks, tmp_path / "volumes.csv"
    flags = f"-d 901 -tr {TRAINER} -device cpu -f 0 --uncertainty".split()
    calibrate_command.main(flags)
    assert "intervals at level 0.9 hold the reference volume: none" in capsys.readouterr().out
    file = model / "fold_0" / "calibration.json"
    record = json.loads(file.read_text())
    rows = record["uncertainty"]["cases"]
    assert [row["case"] for row in rows] == ["train_0", "train_1"]
    for row in rows:
        assert row["reference_mm3"] == VOXEL * blob(int(row["case"][-1]))[1].sum()
        assert 0 < row["soft_dice"] < 1
    assert record["uncertainty"]["expected_dice"] == {"blob": None}  # from two cases

    new = [*flags, "-i", str(in_workspace.raw / "imagesTs"), "-o", str(table)]
    quantify_command.main([*new, "--coverage", "0.5"])
    found, maps = read_rows(table), table.with_name("volumes_uncertainty")
    errors = [
        abs(row["volume_mm3"] - row["reference_mm3"])
        / (row["spread_mm3"] + 0.05 * row["volume_mm3"] + row["voxel_mm3"])
        for row in rows
    ]
    for row in found:
        said = json.loads((maps / f"{row['case']}.json").read_text())["estimates"]["0"]["blob"]
        assert float(row["volume_mm3"]) == pytest.approx(said["volume_mm3"])
        scale = said["spread_mm3"] + 0.05 * said["volume_mm3"] + VOXEL
        assert float(row["volume_high_mm3"]) == pytest.approx(said["volume_mm3"] + scale * max(errors), abs=1e-3)
        assert row["expected_dice"] == ""
        assert float(row["threshold"]) == pytest.approx(record["thresholds"]["blob"], abs=1e-6)
        assert read_voxels(maps / f"{row['case']}.nii.gz").max() <= 100
    references = shutil.copytree(in_workspace.raw / "labelsTs", tmp_path / "references")  # without a dataset.json
    segmentations = {"ViT": table.with_name("volumes_segmentations")}
    assert list(find_evaluation_set(references, segmentations).labels.values) == [row["label"] for row in found[:1]]
    written = {file: file.stat().st_mtime_ns for file in maps.iterdir()}
    quantify_command.main(new)  # at the level 0.9, for which two cases are too few
    assert {file: file.stat().st_mtime_ns for file in maps.iterdir()} == written  # nothing is predicted twice
    assert {row["volume_high_mm3"] for row in read_rows(table)} == {""}
    for key, reason in {"shifts": "has no shift of blob", "uncertainty": "has no entry for uncertainty"}.items():
        file.write_text(json.dumps({name: value for name, value in record.items() if name != key}))
        message = refused(quantify_command.main, *new)
        assert reason in message
        assert "run mae3d_calibrate with -f 0 --uncertainty" in message


def test_what_members_said_of_images_that_were_replaced_is_forgotten(model, in_workspace, monkeypatch):
    calibrate_command.main(["-d", "901", "-tr", TRAINER, "-device", "cpu", "-f", "0"])
    images, work = in_workspace.raw / "imagesTr", model / "calibration_fold_0" / "members"
    cases = [PredictedCase(name, "0", images, images) for name in ("train_0", "train_1")]
    remove_outdated(model_of("0").plan, find_prediction_cases(model_of("0").plan, images), work)  # which notes them
    for case in cases:
        for file in (f"{case.name}.nii.gz", f"uncertainty/{case.name}.nii.gz", f"uncertainty/{case.name}.json"):
            (work / file).parent.mkdir(exist_ok=True)
            (work / file).touch()
    os.utime(images / "train_0_0001.nii.gz", (1, 1))  # as a copy of a backup

    def left(*_):
        found = {file.name for file in [*work.glob("*.nii.gz"), *(work / "uncertainty").iterdir()]}
        assert found == {"train_1.nii.gz", "train_1.json"}
        raise KeyboardInterrupt

    monkeypatch.setattr(uncertainty, "predict_members", left)
    with pytest.raises(KeyboardInterrupt):
        uncertainty.add_uncertainty(model_of("0"), cases, images, "cpu")


# ---------- quantification


TRAINING = TrainingRange(
    spacings=np.sort([[3.0, 0.5, 0.5], [1.5, 0.4, 0.5]], axis=1), volumes={"blob": np.array([100.0, 200.0, 900.0])}
)


@pytest.mark.parametrize(
    ("spacing", "volume", "expected"),
    [
        ((0.5, 0.5, 2.0), 150, []),
        ((0.5, 2.0, 0.5), 150, []),  # slices along another axis
        ((0.5, 0.5, 5.0), 150, ["slice thickness 5 mm, trained on 1.5 to 3 mm"]),
        ((0.5, 0.5, 3.001), 150, []),
        ((5.0, 0.5, 5.0), 150, ["slice thickness 5 mm, trained on 1.5 to 3 mm"]),
        ((0.9, 0.9, 2.0), 150, ["spacing 0.9 mm, trained on 0.4 to 0.5 mm"]),
        ((0.5, 0.5, 2.0), 0, ["nothing found"]),
        ((0.5, 0.5, 2.0), 1000, ["volume outside the 100 to 900 mm3 of the training cases"]),
    ],
)
def test_warnings(spacing, volume, expected):
    geometry = Geometry((9, 9, 9), spacing, (0, 0, 0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    assert warnings_of(geometry, {"blob": volume}, TRAINING) == {"blob": expected}


def test_other_axes_than_those_of_the_training_cases_are_told():
    training = dataclasses.replace(TRAINING, axes={"LPS"})
    for direction, expected in (((1, 0, 0, 0, 1, 0, 0, 0, 1), []), ((-1, 0, 0, 0, 1, 0, 0, 0, 1), ["axes RPS"])):
        geometry = Geometry((9, 9, 9), (0.5, 0.5, 2.0), (0, 0, 0), direction)
        told = warnings_of(geometry, {"blob": 150}, training)["blob"]
        assert [text[: len("axes RPS")] for text in told] == expected


@pytest.mark.parametrize(("reader", "axes"), [("SimpleITKIO", {"LPS"}), ("SimpleITKIOWithReorient", set())])
def test_axes_do_not_matter_where_nnunet_turns_images(model, in_workspace, reader, axes):
    shutil.copy(in_workspace.preprocessed / "dataset_fingerprint.json", model)
    plans = json.loads((model / "plans.json").read_text())
    (model / "plans.json").write_text(json.dumps(plans | {"image_reader_writer": reader}))
    assert set(read_training_range(model_of("0", checkpoint="checkpoint_final.pth")).axes) == axes


@pytest.fixture
def scans(tmp_path):
    """Four scans to quantify."""
    for number in range(4):
        write_case(tmp_path / "images", f"scan_{number}", blob(30 + number)[0])
    return tmp_path / "images"


def pretend_to_predict(table, scans):
    """Put the segmentations where `mae3d_quantify` looks for them, as a run before left them."""
    dataset = find_dataset("901")
    found = find_model(
        dataset, "nnUNetPlans", "3d_fullres", trainer=TRAINER, folds=["0"], checkpoint="checkpoint_final.pth"
    )
    work = table.with_name(f"{table.stem}_segmentations")
    for number in range(len(list(scans.iterdir())) // 2):
        write_case(table.parent / "images", f"scan_{number}", [], blob(30 + number)[1])
    remove_outdated(found.plan, find_prediction_cases(found.plan, scans), work)  # which notes the images
    for file in (table.parent / "labels").iterdir():
        shutil.move(file, work)
    (work / "model.json").write_text(json.dumps({"model": model_hash(found)}))


def quantify(scans, table, *flags):
    quantify_command.main(["-d", "901", "-tr", TRAINER, "-device", "cpu", "-i", str(scans), "-o", str(table), *flags])


def test_the_example_in_the_docstring(model, in_workspace, scans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretend_to_predict(tmp_path / "volumes.csv", scans)
    assert doctest.testmod(quantification) == doctest.TestResults(failed=0, attempted=5)


def test_volumes_are_those_of_the_segmentations(model, in_workspace, scans, tmp_path):
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    quantify(scans, table)
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    training = sorted(VOXEL * blob(number)[1].sum() for number in range(6))
    for number, row in enumerate(rows):
        volume = VOXEL * blob(30 + number)[1].sum()
        assert row["case"] == f"scan_{number}"
        assert float(row["volume_mm3"]) == pytest.approx(volume, abs=1e-3)
        assert row["threshold"] == "0.5"
        assert float(row["slice_thickness_mm"]) == max(SPACING)
        quartile = np.searchsorted(np.quantile(training, [0.25, 0.5, 0.75]), volume)
        assert row["risk_group"] == ("no", "low", "moderate", "high")[quartile]
        outside = not training[0] <= volume <= training[-1]
        assert ("volume outside" in row["warnings"]) == outside
    assert json.loads((model / "training_volumes.json").read_text())["volumes"]["blob"] == pytest.approx(
        [VOXEL * blob(number)[1].sum() for number in range(6)]
    )


def test_scans_that_hold_nothing_to_measure_get_no_volume(model, in_workspace, scans, tmp_path, caplog):
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    images, _ = blob(40)
    write_case(scans.parent / "images", "nan", [np.where(images[0] > images[0].mean(), images[0], np.nan), images[1]])
    write_case(scans.parent / "images", "zeros", [image * 0 for image in images])
    write_case(scans.parent / "images", "damaged", [image.astype(np.uint8) for image in images])
    write_case(scans.parent / "images", "moved", images)
    moved = sitk.ReadImage(str(scans / "moved_0001.nii.gz"))
    moved.SetOrigin((0.0, 0.0, 0.5))
    sitk.WriteImage(moved, str(scans / "moved_0001.nii.gz"))
    damaged = scans / "damaged_0001.nii.gz"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-200] + bytes(100) + content[-100:])  # with a whole header and trailer
    quantify(scans, table)
    assert "4 of 8 cases have no volume (damaged, moved, nan and 1 more)" in caplog.text
    with table.open() as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert {rows[name]["volume_mm3"] for name in ("nan", "zeros", "moved")} == {""}
    assert "nan_0000.nii.gz holds voxels that are NaN or infinite" in rows["nan"]["warnings"]
    assert "all its images are zeros" in rows["zeros"]["warnings"]
    assert "moved_0001.nii.gz and moved_0000.nii.gz differ in origin" in rows["moved"]["warnings"]
    assert "damaged_0001.nii.gz is cut off or damaged, copy it again" in rows["damaged"]["warnings"]
    assert "axes" not in rows["scan_0"]["warnings"]


def test_no_segmentation_stays_of_a_scan_whose_new_file_cannot_be_predicted(model, in_workspace, scans, tmp_path):
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    write_case(scans, "scan_1", [image * np.nan for image in blob(40)[0]])
    gone = scans / "scan_2_0001.nii.gz"
    gone.unlink()
    gone.symlink_to("nowhere.nii.gz")
    quantify(scans, table)
    assert [row["case"] for row in read_rows(table) if not row["volume_mm3"]] == ["scan_1", "scan_2"]
    left = sorted(file.name for file in (tmp_path / "volumes_segmentations").glob("*.nii.gz"))
    assert left == ["scan_0.nii.gz", "scan_3.nii.gz"]


def training_volumes():
    return read_training_volumes(model_of("0", checkpoint="checkpoint_final.pth"))


def expected_volumes(*numbers):
    return {"blob": pytest.approx([VOXEL * blob(number)[1].sum() for number in numbers])}


def hold_out(workspace, *names):
    record = {"test": list(names), "left_out": []}
    (workspace.preprocessed / "split.json").write_text(json.dumps(record))


def test_cases_held_out_for_testing_say_nothing_about_training(model, in_workspace):
    hold_out(in_workspace, "train_1", "train_4")
    assert training_volumes() == expected_volumes(0, 2, 3, 5)
    hold_out(in_workspace, "train_0", "train_5")  # as many, but others
    assert training_volumes() == expected_volumes(1, 2, 3, 4)
    hold_out(in_workspace, *(f"train_{number}" for number in range(6)))
    assert training_volumes() == expected_volumes(1, 2, 3, 4)  # no labels, so what is known stays
    (model / "training_volumes.json").unlink()
    assert training_volumes() == {}


def test_training_volumes_are_read_again_when_cases_are_added(model, in_workspace):
    assert training_volumes() == expected_volumes(*range(6))
    file = model / "training_volumes.json"
    written = file.stat().st_mtime_ns
    training_volumes()
    assert file.stat().st_mtime_ns == written
    references = in_workspace.preprocessed / "gt_segmentations"
    shutil.copy(references / "train_2.nii.gz", references / "train_6.nii.gz")
    assert training_volumes() == expected_volumes(*range(6), 2)
    shutil.copy(references / "train_3.nii.gz", references / "train_6.nii.gz")  # a label that was corrected
    assert training_volumes() == expected_volumes(*range(6), 3)


def test_training_volumes_are_read_each_time_where_nothing_can_be_written(model, monkeypatch, caplog):
    def refuse(*_):
        raise WriteError(errno.EROFS, "Read-only file system", "training_volumes.json")

    monkeypatch.setattr(training_range, "write_json", refuse)
    caplog.set_level("INFO")
    assert training_volumes() == expected_volumes(*range(6))
    assert "will be read from the labels again: " in caplog.text


def test_training_volumes_of_earlier_versions_are_read(model):
    """They do not say of which cases they are: if there are as many, they stay."""
    file = model / "training_volumes.json"
    for known in ([1.0] * 6, [1.0] * 5):
        file.write_text(json.dumps({"blob": known}))
        found = training_volumes()
        assert found == ({"blob": known} if len(known) == 6 else expected_volumes(*range(6)))
    file.write_text(json.dumps({"blob": [1.0, 2.0]}))
    (model / "card.json").write_text("{}")  # as mae3d_import leaves it: the labels here are not those of the model
    assert training_volumes() == {"blob": [1.0, 2.0]}


def test_parts_together_are_the_whole(model, in_workspace, scans, tmp_path):
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    quantify(scans, table)
    whole = table.read_text()
    table.unlink()
    for part in "201":
        assert not table.exists()
        quantify(scans, table, "-num_parts", "3", "-part_id", part)
    assert table.read_text() == whole


def test_calls_with_other_numbers_of_parts_keep_their_links_apart(model, scans, tmp_path, monkeypatch):
    """Each removes the links of an earlier call, which may be one that is at work."""
    table, places = tmp_path / "volumes.csv", []
    pretend_to_predict(table, scans)
    monkeypatch.setattr(quantification, "predict_cases", lambda *_, links, **__: places.append(links))
    for parts in "123":
        quantify(scans, table, "-num_parts", parts)
    assert len({*places}) == 3


def test_parts_of_two_models_are_not_joined(model, in_workspace, scans, tmp_path, caplog):
    table, part = tmp_path / "volumes.csv", ("-num_parts", "2", "-part_id")
    pretend_to_predict(table, scans)
    for number in "01":
        quantify(scans, table, *part, number)
    table.unlink()
    shutil.rmtree(tmp_path / "volumes_segmentations")
    file = model / "fold_0" / "checkpoint_final.pth"
    torch.save(torch.load(file) | {"inference_allowed_mirroring_axes": (0,)}, file)
    pretend_to_predict(table, scans)
    quantify(scans, table, *part, "0")
    assert not table.exists()
    assert "volumes_part1of2.csv: made with another model" in caplog.text
    quantify(scans, table, *part, "1")
    assert {row["model"] for row in read_rows(table)} == {model_hash(model_of("0", checkpoint="checkpoint_final.pth"))}


def test_parts_of_other_cases_or_options_are_not_joined(model, in_workspace, scans, tmp_path, caplog):
    """A new case moves others to another part."""
    table, part = tmp_path / "volumes.csv", ("-num_parts", "2", "-part_id")
    pretend_to_predict(table, scans)
    for number in "01":
        quantify(scans, table, *part, number)
    before = table.read_text()
    for image in scans.glob("scan_1_*"):
        image.unlink()
    quantify(scans, table, *part, "0")
    assert "volumes_part1of2.csv: made with another model, for other cases or with other options" in caplog.text
    assert table.read_text() == before
    quantify(scans, table, *part, "1")
    assert [row["case"] for row in read_rows(table)] == ["scan_0", "scan_2", "scan_3"]
    caplog.clear()
    few = tmp_path / "few.csv"
    shutil.copytree(tmp_path / "volumes_segmentations", tmp_path / "few_segmentations")
    for number in "0123":  # one more part than cases
        quantify(scans, few, "-num_parts", "4", "-part_id", number)
    assert [row["case"] for row in read_rows(few)] == ["scan_0", "scan_2", "scan_3"]
    quantify(scans, table, *part, "1", "--cutoffs", "1", "2")
    assert "volumes_part0of2.csv: made with another model, for other cases or with other options" in caplog.text


def test_maps_of_segmentations_that_are_gone_do_not_stay(model, in_workspace, scans, tmp_path):
    """A call with --uncertainty would take them for those of the next segmentations."""
    table, maps = tmp_path / "volumes.csv", tmp_path / "volumes_uncertainty"
    pretend_to_predict(table, scans)
    maps.mkdir()
    for name in ("scan_0.json", "scan_0.nii.gz", "gone.json", "gone.nii.gz", "notes.txt", ".123.gone.json"):
        (maps / name).touch()
    quantify(scans, table)
    assert {file.name for file in maps.iterdir()} == {"scan_0.json", "scan_0.nii.gz", "notes.txt", ".123.gone.json"}


def test_images_with_another_ending_are_named(model, in_workspace, scans, caplog):
    for name in ("scan_8_0000.nii", "SCAN_9_0000.NII.GZ", "notes.txt"):
        (scans / name).touch()
    found = quantification.find_scans_to_quantify(model_of("0", checkpoint="checkpoint_final.pth"), scans)
    assert len(found.cases) == 4
    assert "do not end with .nii.gz and are left out (SCAN_9_0000.NII.GZ, scan_8_0000.nii)" in caplog.text


@pytest.mark.parametrize("replace", ["of another folder", "older, of the same name"])
def test_segmentations_of_other_images_are_predicted_again(model, in_workspace, scans, tmp_path, caplog, replace):
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    plan, work = model_of("0", checkpoint="checkpoint_final.pth").plan, tmp_path / "volumes_segmentations"
    remove_outdated(plan, find_prediction_cases(plan, scans), work)
    kept = {file.name for file in work.glob("*.nii.gz")}
    assert len(kept) == 4
    if replace == "of another folder":
        scans = shutil.copytree(scans, tmp_path / "other site")  # with the times of the first
        gone = kept
    else:
        write_case(scans, "scan_2", blob(40)[0])
        for image in scans.glob("scan_2_*"):
            os.utime(image, (1, 1))
        gone = {"scan_2.nii.gz"}
    caplog.set_level("INFO")
    remove_outdated(plan, find_prediction_cases(plan, scans), work)
    assert {file.name for file in work.glob("*.nii.gz")} == kept - gone
    assert caplog.text.count("it may be of images that have changed") == len(gone)


@pytest.mark.parametrize(
    ("content", "more"),
    [
        ("case,label,warnings,model\na,blob,,0\ngone,blob,,0\n", "gone"),
        ("seen by;case;label;warnings;model\nDr. A;a;blob;;0\n;;;;\n", "seen by"),
        ("case,label,warnings,model,,\na,blob,,0,,\n", ""),
    ],
)
def test_a_table_that_has_more_than_the_next_one_is_moved_aside(tmp_path, caplog, content, more):
    table = tmp_path / "volumes.csv"
    keep_earlier(table, ["a", "new"], COLUMNS)
    table.write_text(content)
    keep_earlier(table, ["a", "new"], COLUMNS)
    assert table.is_file() == (not more)
    (kept,) = tmp_path.glob("volumes*.csv")
    assert kept.read_text() == content
    assert (f"({more}), and was moved to {kept}" in caplog.text) == bool(more)


def test_a_part_that_is_writing_its_note_does_not_stop_another(tmp_path):
    refuse_other_content(tmp_path / "none", {"model": "a"}, "others")
    (tmp_path / ".123.model.json").touch()
    refuse_other_content(tmp_path, {"model": "a"}, "others")


def test_mistakes_in_quantifying_get_a_sentence(model, in_workspace, scans, refused, tmp_path):
    def refuse(*flags, output="volumes.csv", images=scans):
        call = f"-d 901 -tr {TRAINER} -device cpu -i {images} -o {tmp_path / output}"
        return refused(quantify_command.main, *call.split(), *flags)

    assert "is not a file name that ends in .csv" in refuse(output="volumes.xlsx")
    assert "-part_id 2 is not one of the parts 0 to 1" in refuse("-num_parts", "2", "-part_id", "2")
    assert "There are no images" in refuse(images=tmp_path / "nowhere")
    assert "--coverage is for intervals of volumes: add --uncertainty" in refuse("--coverage", "0.9")
    (tmp_path / "patients.csv").write_text("case,patient\nscan_0,A\n")
    assert "patients.csv is there already, and is not a table of mae3d_quantify" in refuse(output="patients.csv")
    assert (tmp_path / "patients.csv").read_text() == "case,patient\nscan_0,A\n"
    work = tmp_path / "volumes_segmentations"
    assert not work.exists()
    work.mkdir()
    (work / "something").touch()
    assert f"{work} is not empty" in refuse()
    (work / "model.json").write_text(json.dumps({"model": "another"}))
    assert "segmentations of another model" in refuse()


def test_volumes_of_labels_that_leave_voxels_out_are_not_compared_with(model, in_workspace, scans, tmp_path, caplog):
    description = json.loads((model / "dataset.json").read_text())
    description["labels"]["ignore"] = 2
    (model / "dataset.json").write_text(json.dumps(description))
    shutil.copy(in_workspace.preprocessed / "dataset_fingerprint.json", model)
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    quantify(scans, table)
    assert {row["risk_group"] for row in read_rows(table)} == {row["warnings"] for row in read_rows(table)} == {""}
    assert "Their labels leave voxels out (ignore)" in caplog.text
    assert training_volumes() == {}


def test_a_model_that_was_installed_elsewhere_quantifies(model, in_workspace, scans, tmp_path, caplog):
    """nnU-Net's own archive has the fingerprint, but no volumes of the training cases; neither raw data nor labels."""
    shutil.copy(in_workspace.preprocessed / "dataset_fingerprint.json", model)
    shutil.rmtree(in_workspace.root / "raw" / in_workspace.dataset)
    shutil.rmtree(in_workspace.root / "preprocessed" / in_workspace.dataset)
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    quantify(scans, table)
    rows = read_rows(table)
    assert [float(row["volume_mm3"]) for row in rows] == pytest.approx(
        [VOXEL * blob(30 + number)[1].sum() for number in range(4)], abs=1e-3
    )
    assert {row["risk_group"] for row in rows} == {row["warnings"] for row in rows} == {""}
    assert "The volumes of the training cases are not known here" in caplog.text
    table.unlink()
    quantify(scans, table, "--cutoffs", "100")
    assert {row["risk_group"] for row in read_rows(table)} <= {"group 1", "group 2"}
    (model / "training_volumes.json").write_text(json.dumps({"blob": [1.0, 2.0]}))
    quantify(scans, table)
    assert all("volume outside the 1 to 2 mm3" in row["warnings"] for row in read_rows(table))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("training_volumes.json", {}, "has other labels than the model"),
        ("training_volumes.json", {"blob": ["x"]}, "blob[0] is 'x'"),
        ("dataset_fingerprint.json", [], "dataset_fingerprint.json"),
        ("dataset_fingerprint.json", {"spacings": [[1, 1]]}, "spacings[0]"),
    ],
)
def test_damaged_records_of_training_cases_are_named(model, scans, refused, tmp_path, file, content, reason):
    (model / file).write_text(json.dumps(content))
    table = tmp_path / "volumes.csv"
    pretend_to_predict(table, scans)
    message = refused(
        quantify_command.main, *f"-d 901 -tr {TRAINER} -device cpu -i {scans} -o {tmp_path}/volumes.csv".split()
    )
    assert reason in message
    assert not table.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_probabilities_that_are_no_numbers_are_refused(model, refused, value):
    file = model / "fold_0" / "validation" / "train_0.npz"
    with np.load(file) as stored:
        probabilities = stored["probabilities"]
    probabilities[0, 1, 2, 3] = value
    np.savez_compressed(file, probabilities=probabilities)
    message = refused(calibrate_command.main, "-d", "901", "-tr", TRAINER, "-f", "0", "-device", "cpu")
    assert f"{file} cannot be read (it holds NaN or infinite values" in message
    assert not [*model.rglob("calibration.json")]


def test_the_record_of_a_calibration_holds_no_path(model, tmp_path):
    calibrate()
    content = (model / "calibration.json").read_text()
    assert str(tmp_path) not in content
    assert list(json.loads(content)["checkpoints"]) == [f"fold_{n}/checkpoint_calibrated.pth" for n in (0, 1)]


def test_two_calls_do_not_write_to_one_place(model, refused, scans, tmp_path):
    flags = f"-d 901 -tr {TRAINER} -device cpu".split()
    with locked(model):
        assert "Another process is writing to" in refused(calibrate_command.main, *flags, "-f", "0")
    with locked(tmp_path / "volumes.csv"):
        call = ["-i", str(scans), "-o", str(tmp_path / "volumes.csv")]
        assert "Another process is writing to" in refused(quantify_command.main, *flags, *call)
    assert not [*model.rglob("calibration.json")]
    assert not (tmp_path / "volumes_segmentations").exists()


def test_a_checkpoint_that_a_training_replaces_meanwhile_is_not_calibrated(model, refused, monkeypatch):
    """A best checkpoint, for instance, while its training goes on."""

    def fit_meanwhile(*arguments, real=calibration.fit, **options):
        train_again(model / "fold_1" / FINAL)
        return real(*arguments, **options)

    monkeypatch.setattr(calibration, "fit", fit_meanwhile)
    message = refused(calibrate_command.main, *f"-d 901 -tr {TRAINER} -f 0 1 -device cpu".split())
    assert f"{FINAL} has been written anew while its predictions were calibrated" in message
    assert not [*model.rglob("*calibrated*"), *model.rglob("calibration.json")]


def test_a_checkpoint_with_code_is_not_given_to_nnunet(model, scans, refused, tmp_path):
    file, marker = model / "fold_0" / "checkpoint_final.pth", tmp_path / "marker"
    torch.save(torch.load(file, weights_only=True) | {"logging": Poison(marker)}, file)
    flags = f"-d 901 -tr {TRAINER} -device cpu -i {scans} -o {tmp_path}/volumes.csv".split()
    message = refused(quantify_command.main, *flags)
    assert str(file) in message
    assert "only weights and plain values are unpickled" in message
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # as nnU-Net would have done


def test_plans_that_name_a_command_are_refused(model, scans, refused, tmp_path):
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "os.system"
    (model / "plans.json").write_text(json.dumps(plans))
    flags = f"-d 901 -tr {TRAINER} -device cpu -i {scans} -o {tmp_path}/volumes.csv".split()
    assert "names 'os.system' as network_class_name, which is not a part of any network" in refused(
        quantify_command.main, *flags
    )
