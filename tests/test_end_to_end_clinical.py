"""From trained models to a report: calibrate, predict, evaluate and quantify, typed on a tiny data set."""

import json
import math
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import Workspace

from nnunet_vit_mae.nnunet.calibration import shift_checkpoint

pytestmark = pytest.mark.slow

MODEL = "-d 901 -c 3d_fullres -p Tiny -device cpu -tr"
TRAINERS = ("nnUNetTrainerViTScratch", "nnUNetTrainerBaseline")
BORDER = 3  # voxels: there nnU-Net's weights of a window underflow in half precision, see docs/explanation.md


@pytest.fixture(scope="module")
def trained(planned, tmp_path_factory):
    """Two folds of the ViT and of nnU-Net's own U-Net; only the U-Net's have kept their probabilities."""
    root = tmp_path_factory.mktemp("clinical") / "nnunet"
    shutil.copytree(planned.root, root)
    workspace = Workspace(root)
    workspace.type(*"mae3d_plan -d 901 -o Tiny --recipe quick --token 4 --epochs 1 --iterations 12 --lr 1e-3".split())
    for trainer in TRAINERS:
        for fold in "01":
            command = f"nnUNetv2_train 901 3d_fullres {fold} -p Tiny -device cpu -tr {trainer}".split()
            workspace.type(*command, *(["--npz"] if trainer.endswith("Baseline") else []))
    return workspace


def folder_of(workspace, trainer):
    return workspace.results / f"{trainer}__Tiny__3d_fullres"


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_calibration_writes_what_it_says(trained, trainer):
    done = trained.type(*f"mae3d_calibrate {MODEL} {trainer} -f 0 1".split())
    folder = folder_of(trained, trainer)
    record = json.loads((folder / "calibration.json").read_text())
    assert {row["case"] for row in record["cases"]} == {
        file.name.removesuffix(".nii.gz") for fold in "01" for file in (folder / f"fold_{fold}/validation").glob("*.gz")
    }
    assert record["after"]["blob"]["absolute_difference_mm3"] <= record["before"]["blob"]["absolute_difference_mm3"]
    assert (record["objective"], record["folds"], record["trainer"]) == ("volume", ["0", "1"], trainer)
    for name in ("calibration_curve.png", "calibration_curve.csv", "calibration_bland_altman.png"):
        assert (folder / name).stat().st_size > 0
    assert str(folder / "fold_1" / "checkpoint_calibrated.pth") in done.stdout


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_calibrated_checkpoint_thresholds_the_averaged_probabilities(trained, trainer, tmp_path):
    """nnU-Net's own command, with mirroring and two folds, at a threshold that parts the voxels of these cases."""
    predict = f"nnUNetv2_predict -i {trained.raw / 'imagesTs'} {MODEL} {trainer} -f 0 1 -o".split()
    trained.type(*predict, str(tmp_path / "plain"), "--save_probabilities")
    averages = {file.stem: np.load(file)["probabilities"][1] for file in (tmp_path / "plain").glob("*.npz")}
    threshold = float(np.quantile(np.concatenate([*averages.values()]), 0.8))
    for fold in "01":
        folder = folder_of(trained, trainer) / f"fold_{fold}"
        calibrated = shift_checkpoint(folder / "checkpoint_final.pth", [0, -math.log(threshold / (1 - threshold))])
        assert calibrated == folder / "checkpoint_calibrated.pth"
    trained.type(*predict, str(tmp_path / "calibrated"), "-chk", "checkpoint_calibrated.pth")
    differing = changed = 0
    for case, averaged in averages.items():
        expected = averaged > threshold
        found = read(tmp_path / "calibrated" / f"{case}.nii.gz") == 1
        inner = (slice(BORDER, -BORDER),) * 3
        assert np.array_equal(found[inner], expected[inner])
        differing += np.count_nonzero(found != expected)
        changed += np.count_nonzero(expected != (averaged > 0.5))
    assert differing < 0.01 * averaged.size
    assert changed > 20 * differing  # the threshold does something


def test_only_the_heads_bias_is_shifted(trained):
    folder = folder_of(trained, TRAINERS[0]) / "fold_0"
    plain, calibrated = (
        torch.load(folder / f"checkpoint_{name}.pth", weights_only=False)["network_weights"]
        for name in ("final", "calibrated")
    )
    threshold = json.loads((folder.parent / "calibration.json").read_text())["thresholds"]["blob"]
    (name,) = [name for name in plain if not torch.equal(plain[name], calibrated[name])]
    change = (calibrated[name] - plain[name]).reshape(2, -1)
    assert name.endswith("head.bias")
    assert change[0].abs().max() == 0
    assert torch.allclose(change[1], torch.tensor(-math.log(threshold / (1 - threshold))), atol=1e-6)
