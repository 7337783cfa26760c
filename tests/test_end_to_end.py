"""The issue's commands, typed one after the other on a tiny data set: each test goes on where the one before ended."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SHAPE, Workspace

from nnunet_vit_mae.weights import load_encoder

pytestmark = pytest.mark.slow

TRAIN = ("901", "3d_fullres", "0", "-p", "Tiny", "-device", "cpu", "-tr")


@pytest.fixture(scope="module")
def typed(planned, tmp_path_factory):
    """A workspace in which the whole path is typed; tests look at what each command left."""
    root = tmp_path_factory.mktemp("path") / "nnunet"
    shutil.copytree(planned.root, root)
    workspace = Workspace(root)
    workspace.type(*"mae3d_preprocess -d 901 -np 1".split())
    workspace.type(
        *"mae3d_plan -d 901 -o Tiny --recipe quick --token 4 --epochs 2 --iterations 3 --batch_size 3".split()
    )
    return workspace


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def log_of(workspace, trainer):
    folder = workspace.results / f"{trainer}__Tiny__3d_fullres" / "fold_0"
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log*.txt")))


def test_without_an_encoder_training_stops_with_the_command_to_type(typed):
    done = typed.type("nnUNetv2_train", *TRAIN, "nnUNetTrainerViTMAE", code=2)
    assert "mae3d_pretrain -d 901 -c 3d_fullres -p Tiny" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(typed.results.rglob("checkpoint*"))


def test_pretraining_writes_an_encoder_with_its_card(typed):
    done = typed.type(*"mae3d_pretrain -d 901 -p Tiny --epochs 2 --batch_size 4 -device cpu".split())
    folder = typed.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_all"
    assert str(folder / "encoder.safetensors") in done.stdout
    _, card = load_encoder(folder / "encoder.safetensors")
    assert card.channel_names == ["T1", "FLAIR"]
    assert (card.dataset, card.data_licence, card.epochs) == ("Dataset901_Tiny", "CC0", 2)
    assert card.seen([f"train_{i}" for i in range(6)]) == [f"train_{i}" for i in range(6)]
    assert (folder / "progress.png").stat().st_size > 0
    assert len(list((folder / "reconstructions").iterdir())) == 2


def test_an_earlier_run_is_moved_aside_and_a_finished_one_is_not_repeated(typed):
    command = "mae3d_pretrain -d 901 -p Tiny --epochs 1 --batch_size 4 -device cpu -f 0".split()
    typed.type(*command)
    folder = typed.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_0"
    first = (folder / "encoder.safetensors").read_bytes()
    typed.type(*command, "--c")
    assert (folder / "log.txt").read_text().count("epoch 1:") == 1
    assert (folder / "encoder.safetensors").read_bytes() == first
    typed.type(*command, "--seed", "1")
    (moved,) = folder.parent.glob("fold_0_until_*")
    assert (moved / "encoder.safetensors").read_bytes() == first
    assert (folder / "encoder.safetensors").read_bytes() != first
    (folder / "state.pt").unlink()  # nothing to continue from: the finished encoder must not be overwritten
    typed.type(*command, "--c", "--seed", "2")
    assert len(list(folder.parent.glob("fold_0_until_*"))) == 2


def test_fine_tuning_says_what_it_loaded_and_whether_it_saw_the_validation_images(typed):
    typed.type("nnUNetv2_train", *TRAIN, "nnUNetTrainerViTMAE")
    log = log_of(typed, "nnUNetTrainerViTMAE")
    assert "fold_0/encoder.safetensors: " in log.replace("\\", "/")
    assert "tensors; pre-trained on 7 cases" in log
    assert "seen the images (not the labels) of 0 of the 2 validation cases" in log
    checkpoint = torch.load(
        typed.results / "nnUNetTrainerViTMAE__Tiny__3d_fullres" / "fold_0" / "checkpoint_final.pth", weights_only=False
    )
    assert checkpoint["current_epoch"] == 2
    assert len(checkpoint["logging"]["train_losses"]) == 2


def test_fine_tuning_starts_from_the_encoder(typed):
    """With a learning rate near zero, the encoder in the checkpoint is the pre-trained one."""
    typed.type(*"mae3d_plan -d 901 -p Tiny -o Still --epochs 1 --iterations 1 --lr 1e-12".split())
    source = typed.results / "mae3d_pretrain__Tiny__3d_fullres"
    source.rename(still := typed.results / "mae3d_pretrain__Still__3d_fullres")
    typed.type(
        "nnUNetv2_train", "901", "3d_fullres", "1", "-p", "Still", "-device", "cpu", "-tr", "nnUNetTrainerViTMAE"
    )
    still.rename(source)
    folder = typed.results / "nnUNetTrainerViTMAE__Still__3d_fullres" / "fold_1"
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    tensors, _ = load_encoder(source / "fold_all" / "encoder.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(weights[f"encoder.{name}"], tensor, atol=1e-7, rtol=0)
    log = next(folder.glob("training_log*.txt")).read_text()
    assert "of 1 of the 1 validation cases." in log
    assert "run mae3d_pretrain with -f 1" in log


def test_validation_and_continuing_need_no_encoder_file(typed):
    source = typed.results / "mae3d_pretrain__Tiny__3d_fullres"
    source.rename(hidden := typed.results / "hidden")
    typed.type("nnUNetv2_train", *TRAIN, "nnUNetTrainerViTMAE", "--val")
    typed.type("nnUNetv2_train", *TRAIN, "nnUNetTrainerViTMAE", "--c")
    hidden.rename(source)
    folder = typed.results / "nnUNetTrainerViTMAE__Tiny__3d_fullres" / "fold_0"
    assert 0 <= json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] <= 1


def test_prediction_rebuilds_the_network_from_the_plans(typed, tmp_path):
    arguments = f"-i {typed.raw / 'imagesTs'} -o {tmp_path} -d 901 -c 3d_fullres -f 0 -p Tiny -device cpu"
    typed.type("nnUNetv2_predict", *arguments.split(), "-tr", "nnUNetTrainerViTMAE")
    for case in ("test_0", "test_1"):
        prediction = sitk.ReadImage(str(tmp_path / f"{case}.nii.gz"))
        reference = sitk.ReadImage(str(typed.raw / "labelsTs" / f"{case}.nii.gz"))
        assert sitk.GetArrayFromImage(prediction).shape == SHAPE
        assert np.allclose(prediction.GetSpacing(), reference.GetSpacing())


def test_scratch_and_baseline_get_the_same_schedule(typed):
    for trainer in ("nnUNetTrainerViTScratch", "nnUNetTrainerBaseline"):
        typed.type("nnUNetv2_train", *TRAIN, trainer)
        debug = json.loads((typed.results / f"{trainer}__Tiny__3d_fullres" / "fold_0" / "debug.json").read_text())
        assert (debug["num_epochs"], debug["num_iterations_per_epoch"], debug["num_val_iterations_per_epoch"]) == (
            "2",
            "3",
            "1",
        )
        assert debug["batch_size"] == (
            "3"
            if "ViT" in trainer
            else str(
                json.loads((typed.preprocessed / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"][
                    "batch_size"
                ]
            )
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [("--token 8", "token [4, 4, 4] there, [8, 8, 8] here"), ("--size S", "size XS there, S here")],
)
def test_an_encoder_that_does_not_fit_is_refused_before_training(typed, change, reason):
    typed.type(*f"mae3d_plan -d 901 -p Tiny -o Other {change}".split())
    source = typed.results / "mae3d_pretrain__Tiny__3d_fullres"
    source.rename(other := typed.results / "mae3d_pretrain__Other__3d_fullres")
    command = "nnUNetv2_train 901 3d_fullres 0 -p Other -device cpu -tr nnUNetTrainerViTMAE"
    message = typed.type(*command.split(), code=2).stderr
    other.rename(source)
    assert reason in message
    assert "Traceback" not in message


def test_a_foreign_encoder_is_adapted_to_another_patch_and_other_channels(typed, tmp_path):
    """Its plans have another patch, its data set other channel names; the log says what became of it."""
    root = tmp_path / "nnunet"
    shutil.copytree(typed.root, root)
    elsewhere = Workspace(root)
    encoder = typed.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_all" / "encoder.safetensors"
    shutil.rmtree(elsewhere.results)
    change_json(elsewhere.preprocessed / "dataset.json", lambda d: d["channel_names"].update({"0": "SWI"}))
    change_json(
        elsewhere.preprocessed / "nnUNetPlans.json",
        lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[11, 13, 18]),
    )
    flags = "--epochs 1 --iterations 1 --batch_size 2 --decoder unetr"
    done = elsewhere.type(*f"mae3d_plan -d 901 -o Foreign {flags} --encoder".split(), str(encoder))
    assert "SWI from the mean over its channels" in done.stdout
    plans = json.loads((elsewhere.preprocessed / "Foreign.json").read_text())
    block = plans["configurations"]["3d_fullres"]["vit_mae"]
    assert (block["network"]["size"], block["network"]["token"]) == ("XS", [4, 4, 4])
    assert block["encoder"] == {"file": str(encoder), "sha256": hashlib.sha256(encoder.read_bytes()).hexdigest()}

    elsewhere.type(*"nnUNetv2_train 901 3d_fullres 0 -p Foreign -device cpu -tr nnUNetTrainerViTMAE".split())
    folder = elsewhere.results / "nnUNetTrainerViTMAE__Foreign__3d_fullres" / "fold_0"
    log = next(folder.glob("training_log*.txt")).read_text()
    assert f"Loaded the encoder {encoder}: " in log
    assert "positions are rebuilt for it" in log
    assert "used for SWI, FLAIR; FLAIR by name; SWI from the mean" in log


def test_a_frozen_encoder_stays_as_it_was_while_the_decoder_learns(typed, tmp_path):
    recipe = tmp_path / "frozen.json"
    recipe.write_text(json.dumps({"finetuning": {"freeze_epochs": 1, "epochs": 1, "iterations": 2, "batch_size": 2}}))
    encoder = typed.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_all" / "encoder.safetensors"
    typed.type(*"mae3d_plan -d 901 -o Frozen --recipe".split(), str(recipe), "--encoder", str(encoder))
    typed.type(*"nnUNetv2_train 901 3d_fullres 0 -p Frozen -device cpu -tr nnUNetTrainerViTMAE".split())
    folder = typed.results / "nnUNetTrainerViTMAE__Frozen__3d_fullres" / "fold_0"
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    tensors, _ = load_encoder(encoder)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint["network_weights"][f"encoder.{name}"], tensor), name
    moved = checkpoint["optimizer_state"]["param_groups"][0]["lr"]
    assert moved > 0
    head_bias = next(v for k, v in checkpoint["network_weights"].items() if k.endswith("decoder.head.bias"))
    assert head_bias.any()  # it starts at zero


def test_a_u_net_and_a_vit_are_compared_and_ensembled_by_nnunets_own_commands(typed, tmp_path):
    """Hybrid ensembling, which ViTiac's discussion proposes."""
    trainers = ("nnUNetTrainerViTScratch", "nnUNetTrainerBaseline")
    outputs = []
    for trainer in trainers:
        typed.type("nnUNetv2_train", *TRAIN, trainer, "--val", "--npz")
        outputs.append(str(tmp_path / trainer))
        arguments = f"-i {typed.raw / 'imagesTs'} -o {outputs[-1]} -d 901 -c 3d_fullres -f 0 -p Tiny -device cpu"
        typed.type("nnUNetv2_predict", *arguments.split(), "-tr", trainer, "--save_probabilities")
    find = "nnUNetv2_find_best_configuration 901 -p Tiny -c 3d_fullres -f 0 -np 1 -tr".split()
    typed.type(*find, *trainers)
    found = json.loads((typed.results / "inference_information.json").read_text())
    assert len(found["considered_models"]) == 2
    ensembles = [name for name in found["all_results"] if name.startswith("ensemble")]
    assert len(ensembles) == 1
    typed.type("nnUNetv2_ensemble", "-i", *outputs, "-o", str(tmp_path / "hybrid"), "-np", "1")
    for case in ("test_0", "test_1"):
        mean = np.mean([np.load(Path(output) / f"{case}.npz")["probabilities"] for output in outputs], axis=0)
        hybrid = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "hybrid" / f"{case}.nii.gz")))
        clear = np.abs(mean[1] - mean[0]) > 1e-3  # probabilities are stored in half precision
        assert np.array_equal(hybrid[clear], mean.argmax(axis=0)[clear])


def test_a_damaged_encoder_is_refused_before_training(typed):
    file = typed.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_0" / "encoder.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    message = typed.type("nnUNetv2_train", *TRAIN, "nnUNetTrainerViTMAE", code=2).stderr
    file.write_bytes(whole)
    assert "damaged" in message
    assert "Traceback" not in message


def test_a_wrong_key_in_the_plans_is_refused_by_name(typed):
    file = typed.preprocessed / "Typo.json"
    plans = json.loads((typed.preprocessed / "Tiny.json").read_text())
    plans["configurations"]["3d_fullres"]["vit_mae"]["finetuning"]["epoch"] = 5
    file.write_text(json.dumps(plans | {"plans_name": "Typo"}))
    command = "nnUNetv2_train 901 3d_fullres 0 -p Typo -device cpu -tr nnUNetTrainerViTScratch"
    message = typed.type(*command.split(), code=2).stderr
    assert "epoch" in message
    assert "Traceback" not in message
