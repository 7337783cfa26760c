"""The whole path from scans to predictions, on tiny datasets.

The first test lets bash run the commands of the tutorial. The others call the same commands in this process and share
what was trained; a test that changes files takes a copy.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SHAPE, Workspace, read_voxels
from forked_commands import forked_scripts
from markdown_blocks import SHELL, blocks_of

from nnunet_vit_mae.imaging.volumes import geometry_of
from nnunet_vit_mae.storage.csv_tables import read_rows
from nnunet_vit_mae.storage.files import file_hash
from nnunet_vit_mae.weights import read_encoder

pytestmark = pytest.mark.slow

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
PLAN = "mae3d_plan -d 901 -o Tiny --recipe quick --token 4 --epochs 2 --iterations 3 --batch_size 3"
PRETRAIN = "mae3d_pretrain -d 901 -p Tiny --epochs 2 --batch_size 4 -device cpu"
TRAIN = "nnUNetv2_train 901 3d_fullres 0 -p Tiny -device cpu -tr"
MODEL = "-d 901 -c 3d_fullres -f 0 -p Tiny -device cpu -tr"
TO_COMPARE = ("nnUNetTrainerViTScratch", "nnUNetTrainerBaseline")


@pytest.fixture(scope="module")
def pretrained(planned, tmp_path_factory):
    """Plans, and encoders of fold 0 and of all cases."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("pretrained"))
    workspace.call(*"mae3d_preprocess -d 901 -np 1".split())
    workspace.call(*PLAN.split())
    workspace.call(*PRETRAIN.split())
    workspace.call(*PRETRAIN.split(), "-f", "0")
    return workspace


@pytest.fixture
def copied(pretrained, tmp_path):
    """A copy for one test."""
    return pretrained.copied_to(tmp_path)


@pytest.fixture(scope="module")
def finetuned(pretrained, tmp_path_factory):
    workspace = pretrained.copied_to(tmp_path_factory.mktemp("finetuned"))
    workspace.call(*TRAIN.split(), "nnUNetTrainerViTMAE")
    return workspace


@pytest.fixture(scope="module")
def compared(pretrained, tmp_path_factory):
    """A ViT and nnU-Net's U-Net from random weights, validated with probabilities."""
    workspace = pretrained.copied_to(tmp_path_factory.mktemp("compared"))
    for trainer in TO_COMPARE:
        workspace.call(*TRAIN.split(), trainer, "--npz")
    return workspace


def pretraining_folder(workspace, plans="Tiny"):
    return workspace.results / f"mae3d_pretrain__{plans}__3d_fullres"


def training_folder(workspace, trainer, plans="Tiny", fold=0):
    return workspace.results / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"


def log_of(folder):
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log*.txt")))


def checkpoint_of(folder):
    return torch.load(folder / "checkpoint_final.pth", weights_only=False)


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def check_predictions(workspace, folder):
    for case in ("test_0", "test_1"):
        prediction = sitk.ReadImage(str(folder / f"{case}.nii.gz"))
        reference = sitk.ReadImage(str(workspace.raw / "labelsTs" / f"{case}.nii.gz"))
        assert sitk.GetArrayFromImage(prediction).shape == SHAPE
        assert np.allclose(prediction.GetSpacing(), reference.GetSpacing())


class TutorialWorkspace(Workspace):
    dataset: ClassVar[str] = "Dataset501_Head"


def without_numbers(line):
    return [word for word in line.split() if not re.search(r"\d|nan", word)]


def test_the_tutorial_runs_from_dicom_to_a_report(tmp_path):
    """Bash runs all lines of the page; every line of output that it shows is printed, but for its numbers."""
    workspace, blocks = TutorialWorkspace(tmp_path), blocks_of(TUTORIAL)
    (drawing,) = (text for language, text in blocks if language == "python")
    with contextlib.chdir(tmp_path):
        exec(drawing, {})
    to_be_exported = dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_extTrainer"), "")
    scripts = {"PATH": os.pathsep.join([str(forked_scripts()), os.environ["PATH"]]), "nnUNet_n_proc_DA": "0"}
    done = subprocess.run(
        ["bash", "-e", "-c", "".join(text for language, text in blocks if language == SHELL)],
        cwd=tmp_path,
        env={**workspace.environment, **to_be_exported, **scripts},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    shown = [line for language, text in blocks if language == "text" for line in text.splitlines() if line != "..."]
    printed = [without_numbers(line) for line in done.stdout.splitlines()]
    assert len(shown) > 10
    assert [line for line in shown if without_numbers(line) not in printed] == []

    encoder = pretraining_folder(workspace, "Quick") / "fold_all" / "encoder.safetensors"
    assert f"Loaded the encoder {encoder}: " in log_of(training_folder(workspace, "nnUNetTrainerViTMAE", "Quick"))
    later = workspace.root / "raw" / "Dataset502_Later"
    for reference in (later / "labelsTr").iterdir():
        for model in ("ViT", "U-Net"):
            prediction = sitk.ReadImage(str(tmp_path / "out" / model / reference.name))
            assert geometry_of(prediction).difference(geometry_of(sitk.ReadImage(str(reference)))) is None
    scores = read_rows(tmp_path / "report" / "cases.csv")
    assert [score["model"] for score in scores] == ["ViT"] * 3 + ["U-Net"] * 3
    assert len(read_rows(tmp_path / "volumes.csv")) == 3
    assert "ViT" in (tmp_path / "report" / "index.html").read_text()


# ---------- pre-training


def test_pretraining_writes_an_encoder_with_its_card(pretrained):
    folder = pretraining_folder(pretrained) / "fold_all"
    _, card = read_encoder(folder / "encoder.safetensors")
    assert card.channel_names == ["T1", "FLAIR"]
    assert (card.dataset, card.data_licence, card.epochs) == ("Dataset901_Tiny", "CC0", 2)
    assert card.seen([f"train_{i}" for i in range(6)]) == [f"train_{i}" for i in range(6)]
    assert (folder / "progress.png").stat().st_size > 0
    assert len(list((folder / "reconstructions").iterdir())) == 2


def test_an_earlier_run_is_moved_aside_and_a_finished_one_is_not_repeated(copied):
    command = [*PRETRAIN.split(), "-f", "0"]
    folder = pretraining_folder(copied) / "fold_0"
    first = (folder / "encoder.safetensors").read_bytes()
    copied.call(*command, "--c")
    assert (folder / "log.txt").read_text().count("epoch 1:") == 1
    assert (folder / "encoder.safetensors").read_bytes() == first
    said = copied.call(*command, "--seed", "1").stderr
    (moved,) = folder.parent.glob("fold_0_until_*")
    assert f"An earlier run was moved to {moved}, and this one makes a new encoder in its place" in said
    assert (moved / "encoder.safetensors").read_bytes() == first
    second = (folder / "encoder.safetensors").read_bytes()
    assert second != first
    moved.rename(folder.with_name("first"))  # two runs within a second would be moved to the same name
    (folder / "state.pt").unlink()  # nothing to continue from: the finished encoder must not be overwritten
    copied.call(*command, "--c", "--seed", "2")
    (moved,) = folder.parent.glob("fold_0_until_*")
    assert (moved / "encoder.safetensors").read_bytes() == second


# ---------- fine-tuning


def test_without_an_encoder_training_stops_with_the_command_to_type(copied):
    shutil.rmtree(copied.results)
    other = copied.results / "mae3d_pretrain__Other__3d_fullres" / "fold_all" / "encoder.safetensors"
    other.parent.mkdir(parents=True)
    other.touch()
    done = copied.call(*TRAIN.split(), "nnUNetTrainerViTMAE", code=2)
    assert "(those of Other have one: check -p): run mae3d_pretrain -d 901 -c 3d_fullres -p Tiny" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(copied.results.rglob("checkpoint*"))


def test_fine_tuning_says_what_it_loaded_and_whether_it_saw_the_validation_images(finetuned):
    folder = training_folder(finetuned, "nnUNetTrainerViTMAE")
    log = log_of(folder)
    assert "fold_0/encoder.safetensors: " in log.replace("\\", "/")
    assert "tensors; pre-trained on 7 cases" in log
    assert "seen the images (not the labels) of 0 of the 2 validation cases" in log
    checkpoint = checkpoint_of(folder)
    assert checkpoint["current_epoch"] == 2
    assert len(checkpoint["logging"]["train_losses"]) == 2


def test_fine_tuning_starts_from_the_encoder(copied):
    """With a learning rate near zero, the encoder in the checkpoint is the pre-trained one."""
    copied.call(*"mae3d_plan -d 901 -p Tiny -o Still --epochs 1 --iterations 1 --lr 1e-12".split())
    source = pretraining_folder(copied).rename(pretraining_folder(copied, "Still"))
    copied.call(*"nnUNetv2_train 901 3d_fullres 1 -p Still -device cpu -tr nnUNetTrainerViTMAE".split())
    folder = training_folder(copied, "nnUNetTrainerViTMAE", "Still", fold=1)
    weights = checkpoint_of(folder)["network_weights"]
    tensors, _ = read_encoder(source / "fold_all" / "encoder.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(weights[f"encoder.{name}"], tensor, atol=1e-7, rtol=0)
    log = log_of(folder)
    assert "of 1 of the 1 validation cases." in log
    assert "run mae3d_pretrain with -f 1" in log


def test_validation_and_continuing_need_no_encoder_file(finetuned, tmp_path):
    workspace = finetuned.copied_to(tmp_path)
    shutil.rmtree(pretraining_folder(workspace))
    folder = training_folder(workspace, "nnUNetTrainerViTMAE")
    for flag in ("--val", "--c"):
        shutil.rmtree(folder / "validation")
        workspace.call(*TRAIN.split(), "nnUNetTrainerViTMAE", flag)
        assert 0 <= json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] <= 1
        assert json.loads((folder / "validation" / "checkpoint.json").read_text()) == {
            "checkpoint": "checkpoint_final.pth",
            "sha256": file_hash(folder / "checkpoint_final.pth"),
        }


def test_scratch_and_baseline_get_the_same_schedule(compared):
    plans = json.loads((compared.preprocessed / "nnUNetPlans.json").read_text())
    planned_size = plans["configurations"]["3d_fullres"]["batch_size"]
    for trainer, batch_size in zip(TO_COMPARE, ("3", str(planned_size)), strict=True):
        debug = json.loads((training_folder(compared, trainer) / "debug.json").read_text())
        assert debug["batch_size"] == batch_size
        names = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
        assert [debug[name] for name in names] == ["2", "3", "1"]


def test_a_frozen_encoder_stays_as_it_was_while_the_decoder_learns(copied, tmp_path):
    recipe = tmp_path / "frozen.json"
    recipe.write_text(json.dumps({"finetuning": {"freeze_epochs": 1, "epochs": 1, "iterations": 2, "batch_size": 2}}))
    encoder = pretraining_folder(copied) / "fold_all" / "encoder.safetensors"
    copied.call(*f"mae3d_plan -d 901 -o Frozen --recipe {recipe} --decoder upscale --encoder {encoder}".split())
    copied.call(*"nnUNetv2_train 901 3d_fullres 0 -p Frozen -device cpu -tr nnUNetTrainerViTMAE".split())
    checkpoint = checkpoint_of(training_folder(copied, "nnUNetTrainerViTMAE", "Frozen"))
    tensors, _ = read_encoder(encoder)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint["network_weights"][f"encoder.{name}"], tensor), name
    moved = checkpoint["optimizer_state"]["param_groups"][0]["lr"]
    assert moved > 0
    head_bias = next(v for k, v in checkpoint["network_weights"].items() if k.endswith("decoder.head.bias"))
    assert head_bias.any()  # it starts at zero


def test_a_foreign_encoder_is_adapted_to_another_patch_and_other_channels(planned, pretrained, tmp_path):
    """Its plans have another patch, its dataset other channel names; the log says what became of it."""
    elsewhere = planned.copied_to(tmp_path)
    encoder = pretraining_folder(pretrained) / "fold_all" / "encoder.safetensors"
    change_json(elsewhere.preprocessed / "dataset.json", lambda d: d["channel_names"].update({"0": "SWI"}))
    change_json(
        elsewhere.preprocessed / "nnUNetPlans.json",
        lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[11, 13, 18]),
    )
    flags = "--epochs 1 --iterations 1 --batch_size 2 --decoder unetr"
    done = elsewhere.call(*f"mae3d_plan -d 901 -o Foreign {flags} --encoder {encoder}".split())
    assert "SWI from the mean over its channels" in done.stdout
    plans = json.loads((elsewhere.preprocessed / "Foreign.json").read_text())
    block = plans["configurations"]["3d_fullres"]["vit_mae"]
    assert (block["network"]["size"], block["network"]["token"]) == ("XS", [4, 4, 4])
    assert block["encoder"] == {"file": str(encoder), "sha256": hashlib.sha256(encoder.read_bytes()).hexdigest()}

    elsewhere.call(*"nnUNetv2_train 901 3d_fullres 0 -p Foreign -device cpu -tr nnUNetTrainerViTMAE".split())
    log = log_of(training_folder(elsewhere, "nnUNetTrainerViTMAE", "Foreign"))
    assert f"Loaded the encoder {encoder}: " in log
    assert "positions are rebuilt for it" in log
    assert "used for SWI, FLAIR; FLAIR by name; SWI from the mean" in log


# ---------- refused before any training


@pytest.mark.parametrize(
    ("change", "reason"),
    [("--token 8", "token [4, 4, 4] there, [8, 8, 8] here"), ("--size S", "size XS there, S here")],
)
def test_an_encoder_that_does_not_fit_is_refused(copied, change, reason):
    copied.call(*f"mae3d_plan -d 901 -p Tiny -o Other {change}".split())
    pretraining_folder(copied).rename(pretraining_folder(copied, "Other"))
    command = "nnUNetv2_train 901 3d_fullres 0 -p Other -device cpu -tr nnUNetTrainerViTMAE"
    message = copied.call(*command.split(), code=2).stderr
    assert reason in message
    assert "Traceback" not in message


def test_a_damaged_encoder_is_refused(copied):
    file = pretraining_folder(copied) / "fold_0" / "encoder.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    message = copied.call(*TRAIN.split(), "nnUNetTrainerViTMAE", code=2).stderr
    assert "damaged" in message
    assert "Traceback" not in message


def test_a_wrong_key_in_the_plans_is_refused_by_name(copied):
    plans = json.loads((copied.preprocessed / "Tiny.json").read_text())
    plans["configurations"]["3d_fullres"]["vit_mae"]["finetuning"]["epoch"] = 5
    (copied.preprocessed / "Typo.json").write_text(json.dumps(plans | {"plans_name": "Typo"}))
    command = "nnUNetv2_train 901 3d_fullres 0 -p Typo -device cpu -tr nnUNetTrainerViTScratch"
    message = copied.call(*command.split(), code=2).stderr
    assert "epoch" in message
    assert "Traceback" not in message


# ---------- prediction


def test_prediction_rebuilds_the_network_from_the_plans(finetuned, tmp_path):
    predict = f"nnUNetv2_predict -i {finetuned.raw / 'imagesTs'} -o {tmp_path} {MODEL} nnUNetTrainerViTMAE"
    finetuned.call(*predict.split())
    check_predictions(finetuned, tmp_path)


EXPORT = "-d 901 -c 3d_fullres -p Tiny -tr nnUNetTrainerViTMAE -f 0"
INSTALL = "nnUNetv2_install_pretrained_model_from_zip"  # nnU-Net's own


@pytest.mark.parametrize(
    ("export", "install"),
    [
        (f"mae3d_export {EXPORT}", "mae3d_import"),
        (
            f"nnUNetv2_export_model_to_zip {EXPORT} -chk checkpoint_final.pth",
            "nnUNetv2_install_pretrained_model_from_zip",
        ),
    ],
)
def test_a_model_predicts_and_quantifies_at_another_site(export, install, finetuned, tmp_path):
    """Neither the raw dataset nor its preprocessed files are there."""
    elsewhere = Workspace(tmp_path / "elsewhere")
    for name in ("raw", "preprocessed", "results"):
        (elsewhere.root / name).mkdir(parents=True)
    images = finetuned.raw / "imagesTs"
    (training_folder(finetuned, "nnUNetTrainerViTMAE") / "progress.png").touch()  # these tests draw none
    finetuned.call(*export.split(), "-o", str(tmp_path / "model.zip"))
    elsewhere.call(install, str(tmp_path / "model.zip"))
    for workspace in (finetuned, elsewhere):
        output = str(tmp_path / workspace.root.name)
        workspace.call(*f"nnUNetv2_predict -i {images} -o {output} {MODEL} nnUNetTrainerViTMAE".split())
    first, second = (
        {file.name: read_voxels(file) for file in folder.glob("*.nii.gz")}
        for folder in (tmp_path / finetuned.root.name, tmp_path / elsewhere.root.name)
    )
    assert sorted(first) == sorted(second) == ["test_0.nii.gz", "test_1.nii.gz"]
    assert all(np.array_equal(first[name], second[name]) for name in first)
    elsewhere.call(*f"mae3d_quantify -i {images} -o {tmp_path / 'v.csv'} {MODEL} nnUNetTrainerViTMAE".split())
    rows = read_rows(tmp_path / "v.csv")
    assert [row["case"] for row in rows] == ["test_0", "test_1"]
    assert all(bool(row["risk_group"]) == (install == "mae3d_import") for row in rows)


def test_a_u_net_and_a_vit_are_compared_and_ensembled_by_nnunets_own_commands(compared, tmp_path):
    """Hybrid ensembling, which ViTiac's discussion proposes."""
    outputs = [str(tmp_path / trainer) for trainer in TO_COMPARE]
    for trainer, output in zip(TO_COMPARE, outputs, strict=True):
        predict = f"nnUNetv2_predict -i {compared.raw / 'imagesTs'} -o {output} {MODEL} {trainer}"
        compared.call(*predict.split(), "--save_probabilities")
    find = "nnUNetv2_find_best_configuration 901 -p Tiny -c 3d_fullres -f 0 -np 1 -tr".split()
    compared.call(*find, *TO_COMPARE)
    found = json.loads((compared.results / "inference_information.json").read_text())
    assert len(found["considered_models"]) == 2
    ensembles = [name for name in found["all_results"] if name.startswith("ensemble")]
    assert len(ensembles) == 1
    compared.call("nnUNetv2_ensemble", "-i", *outputs, "-o", str(tmp_path / "hybrid"), "-np", "1")
    for case in ("test_0", "test_1"):
        mean = np.mean([np.load(Path(output) / f"{case}.npz")["probabilities"] for output in outputs], axis=0)
        hybrid = read_voxels(tmp_path / "hybrid" / f"{case}.nii.gz")
        clear = np.abs(mean[1] - mean[0]) > 1e-3  # probabilities are stored in half precision
        assert np.array_equal(hybrid[clear], mean.argmax(axis=0)[clear])
