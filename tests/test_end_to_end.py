"""The issue's commands, typed one after the other on a tiny data set: each test goes on where the one before ended."""

import json

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
    import shutil

    root = tmp_path_factory.mktemp("path") / "nnunet"
    shutil.copytree(planned.root, root)
    workspace = Workspace(root)
    workspace.type(*"mae3d_preprocess -d 901 -np 1".split())
    workspace.type(
        *"mae3d_plan -d 901 -o Tiny --recipe quick --token 4 --epochs 2 --iterations 3 --batch_size 3".split()
    )
    return workspace


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
    [("--token 8", "token [4, 4, 4] there, [8, 8, 8] in the plans"), ("--size S", "size XS there, S in the plans")],
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
