"""From trained models to a report: calibrate, predict, evaluate and quantify on a tiny dataset."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import blob, read_voxels
from dicom_files import write_slices
from pydicom import dcmread

from nnunet_vit_mae.nnunet.calibrated import write_calibrated

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parent.parent / "docs" / "reproduce.md"
MODEL = "-d 901 -c 3d_fullres -p S4 -device cpu -tr"
TRAINERS = ("nnUNetTrainerViTScratch", "nnUNetTrainerBaseline")
BORDER = 3  # voxels: there nnU-Net's weights of a window underflow in half precision, see docs/evaluation.md
ROUNDING = 1e-3  # of a probability: nnU-Net adds up windows and mirrored ones in half precision

# what makes the documented commands short enough, and lets them run without a GPU
SMALLER = {
    "--recipe vitiac --size S --token 4 --decoder mae": "--recipe quick --token 4 --epochs 1 --iterations 6 --lr 1e-3"
}
ON_A_CPU = ("mae3d_pretrain", "mae3d_calibrate", "nnUNetv2_train", "nnUNetv2_predict")


def documented(heading: str) -> list[str]:
    """The commands in the first block below the line of docs/reproduce.md that starts so."""
    text = DOCUMENT.read_text()
    return text[text.index(heading) :].split("```")[1].strip().splitlines()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def trained(planned, output, tmp_path_factory):
    """A workspace after the documented commands, and with a second fold of two trainers."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("clinical"))
    places = {"501": "901", "RAW": str(workspace.raw), "OUT": str(output), **SMALLER}
    _, *common = documented("Common to everything")  # the fixture is planned and preprocessed already
    for line in [*common, *documented("## ViTiac, table 2")]:
        command = line
        for old, new in places.items():
            command = command.replace(old, new)
        words = command.split()
        more = ["-device", "cpu"] if words[0] in ON_A_CPU else []
        more += ["--epochs", "1"] if words[0] == "mae3d_pretrain" else []
        workspace.call(*words, *more)
    for trainer, more in zip(TRAINERS, ([], ["--npz"]), strict=True):  # mae3d_calibrate predicts without --npz
        workspace.call(*f"nnUNetv2_train 901 3d_fullres 1 -p S4 -device cpu -tr {trainer}".split(), *more)
    return workspace


def folder_of(workspace, trainer):
    return workspace.results / f"{trainer}__S4__3d_fullres"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_calibration_writes_what_it_says(trained, trainer):
    printed = trained.call(*f"mae3d_calibrate {MODEL} {trainer} -f 0 1".split()).stdout
    folder = folder_of(trained, trainer)
    record = json.loads((folder / "calibration.json").read_text())
    assert {row["case"] for row in record["cases"]} == {
        file.name.removesuffix(".nii.gz") for fold in "01" for file in (folder / f"fold_{fold}/validation").glob("*.gz")
    }
    assert record["after"]["blob"]["absolute_difference_mm3"] <= record["before"]["blob"]["absolute_difference_mm3"]
    assert (record["objective"], record["folds"], record["trainer"]) == ("volume", ["0", "1"], trainer)
    for name in ("calibration_curve.png", "calibration_curve.csv", "calibration_bland_altman.png"):
        assert (folder / name).stat().st_size > 0
    assert f"Wrote to {folder}: fold_0/checkpoint_calibrated.pth, fold_1/checkpoint_calibrated.pth, " in printed


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


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_calibrated_checkpoint_thresholds_the_averaged_probabilities(trained, trainer, tmp_path):
    """nnU-Net's own command, with mirroring and two folds, at a threshold that parts the voxels of these cases."""
    predict = f"nnUNetv2_predict -i {trained.raw / 'imagesTs'} {MODEL} {trainer} -f 0 1 -o".split()
    trained.call(*predict, str(tmp_path / "plain"), "--save_probabilities")
    averages = {file.stem: np.load(file)["probabilities"][1] for file in (tmp_path / "plain").glob("*.npz")}
    threshold = float(np.quantile(np.concatenate([*averages.values()]), 0.8))
    for fold in "01":
        folder = folder_of(trained, trainer) / f"fold_{fold}"
        calibrated = write_calibrated(folder / "checkpoint_final.pth", [0, -math.log(threshold / (1 - threshold))])
        assert calibrated == folder / "checkpoint_calibrated.pth"
    trained.call(*predict, str(tmp_path / "calibrated"), "-chk", "checkpoint_calibrated.pth")
    differing = changed = 0
    for case, averaged in averages.items():
        expected = averaged > threshold
        found = read_voxels(tmp_path / "calibrated" / f"{case}.nii.gz") == 1
        inner = (slice(BORDER, -BORDER),) * 3
        wrong = (found != expected)[inner]
        assert np.all(np.abs(averaged - threshold)[inner][wrong] < ROUNDING)
        differing += np.count_nonzero(found != expected)
        changed += np.count_nonzero(expected != (averaged > 0.5))
    assert differing < 0.02 * sum(averaged.size for averaged in averages.values())  # all of them at the border
    assert changed > 10 * differing  # the threshold does something


def test_the_documented_commands_end_in_a_report(trained, output):
    models = ("nnU-Net", "scratch", "uncalibrated", "calibrated")
    with (output / "report" / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["model"], row["case"]) for row in rows] == [
        (model, case) for model in models for case in ("test_0", "test_1")
    ]
    for row in rows:
        mask = read_voxels(output / row["model"] / f"{row['case']}.nii.gz") == 1
        assert float(row["predicted_mm3"]) == pytest.approx(1.5 * mask.sum())
    page = (output / "report" / "index.html").read_text()
    assert all(model in page for model in models)


def test_quantification_gives_volumes_and_warnings_and_goes_on(trained, output, tmp_path):
    """A scan with thick slices is marked, one that cannot be read stops nothing, and nothing is predicted twice."""
    images = tmp_path / "scans"
    shutil.copytree(trained.raw / "imagesTs", images)
    for channel in range(2):
        file = f"test_1_000{channel}.nii.gz"
        thick = sitk.ReadImage(str(images / file))
        thick.SetSpacing((1, 1, 5))
        sitk.WriteImage(thick, str(images / file))
        shutil.copy(images / f"test_0_000{channel}.nii.gz", images / f"broken_000{channel}.nii.gz")
    content = (images / "broken_0001.nii.gz").read_bytes()
    (images / "broken_0001.nii.gz").write_bytes(content[: len(content) // 2])
    for channel in range(2):  # not even a header
        (images / f"empty_000{channel}.nii.gz").touch()

    table = tmp_path / "out" / "volumes.csv"
    command = f"mae3d_quantify -i {images} -o {table} {MODEL} nnUNetTrainerViTMAE -f 0 --cutoffs 100".split()
    trained.call(*command)
    with table.open() as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["broken", "empty", "test_0", "test_1"]
    assert rows["broken"]["volume_mm3"] == ""
    assert "broken_0001.nii.gz cannot be read" in rows["broken"]["warnings"]
    assert "empty_0000.nii.gz cannot be read" in rows["empty"]["warnings"]
    mask = read_voxels(output / "calibrated" / "test_0.nii.gz") == 1
    assert float(rows["test_0"]["volume_mm3"]) == pytest.approx(1.5 * mask.sum())
    assert rows["test_0"]["risk_group"] == f"group {1 + (1.5 * mask.sum() > 100)}"
    assert "slice thickness" not in rows["test_0"]["warnings"]
    assert "slice thickness 5 mm, trained on 1.5 mm" in rows["test_1"]["warnings"]
    assert len({row["model"] for row in rows.values()}) == 1

    segmentation = table.with_name("volumes_segmentations") / "test_0.nii.gz"
    before = segmentation.stat().st_mtime_ns
    trained.call(*command)
    assert segmentation.stat().st_mtime_ns == before
    message = trained.call(*command, "-tr", "nnUNetTrainerViTScratch", code=2).stderr
    assert "segmentations of another model" in message


def test_a_dicom_study_becomes_a_dicom_segmentation_and_a_report(trained, tmp_path):
    """What nnU-Net segments lies in the DICOM files, on the slices that it was made on."""
    study, table = tmp_path / "study", tmp_path / "volumes.csv"
    tags = {"FrameOfReferenceUID": "1.9.7", "PatientName": "A^B"}
    for number, (contrast, array) in enumerate(zip(("T1", "FLAIR"), blob(20)[0], strict=True)):
        write_slices(
            study, uid=f"1.9.1.{number}", array=array.astype(np.int16), SeriesDescription=f"{contrast} tra", **tags
        )
    flags = f"-i {study} -o {table} {MODEL} nnUNetTrainerViTMAE -f 0 --dicom --contrast T1=t1* --contrast FLAIR=flair*"
    trained.call("mae3d_quantify", *flags.split())
    with table.open() as stream:
        (row,) = csv.DictReader(stream)
    expected = read_voxels(tmp_path / "volumes_segmentations" / f"{row['case']}.nii.gz")
    found, folder = np.zeros_like(expected), tmp_path / "volumes_dicom" / row["case"]
    if expected.any():
        dataset = dcmread(folder / "segmentation.dcm")
        planes = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
        for groups, plane in zip(dataset.PerFrameFunctionalGroupsSequence, planes, strict=True):
            z = groups.PlanePositionSequence[0].ImagePositionPatient[2]
            found[round((z - 100) / 2)] = plane  # see dicom_files.position
    assert np.array_equal(found, expected)
    assert (folder / "segmentation.dcm").exists() == expected.any()
    report = dcmread(folder / "report.dcm")
    assert report.PatientName == "A^B"
    assert str(float(row["volume_mm3"])) in str(report)
