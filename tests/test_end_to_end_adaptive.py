"""The commands for studies with any number of contrasts, on a tiny dataset and in this process."""

import json

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import SHAPE, Workspace, blob, read_voxels, write_case
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_vit_mae.nnunet.plans import settings_for, settings_of
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerAMAE
from nnunet_vit_mae.weights import read_encoder

pytestmark = pytest.mark.slow

DATASET = "Dataset902_Contrasts"
NAMES = {"0": "T1", "1": "FLAIR", "2": "T2"}
ABSENT = {"train_1": [2], "train_3": [0, 1], "train_4": [2], "train_5": [0], "test_1": [2], "pool_0": [2]}  # contrasts
TRAIN = "nnUNetv2_train 902 3d_fullres 0 -p Any -device cpu -tr"
PRETRAIN = "mae3d_pretrain -d 902 -p Any --epochs 2 --batch_size 4 -device cpu"


class Studies(Workspace):
    """The same kind of workspace with the other dataset in it."""

    dataset = DATASET


def write_study(folder, case, seed):
    channels, label = blob(seed)
    channels.append(channels[0] + 0.5 * channels[1])
    write_case(folder, case, channels, None if folder.name == "imagesUn" else label)
    for number in ABSENT.get(case, []):
        (folder / f"{case}_{number:04d}.nii.gz").unlink()


@pytest.fixture(scope="module")
def planned_studies(tmp_path_factory):
    """Studies after planning and preprocessing, with plans for an adaptive network."""
    studies = Studies(tmp_path_factory.mktemp("studies") / "nnunet")
    for number in range(6):
        write_study(studies.raw / "imagesTr", f"train_{number}", number)
    for number in range(2):
        write_study(studies.raw / "imagesUn", f"pool_{number}", 10 + number)
        write_study(studies.raw / "imagesTs", f"test_{number}", 20 + number)
    for file in studies.raw.glob("*/train_4*"):  # one that nnU-Net has to resample
        image = sitk.ReadImage(str(file))
        image.SetSpacing((1.3, 0.8, 2.1))
        sitk.WriteImage(image, str(file))
    description = {
        "channel_names": NAMES,
        "labels": {"background": 0, "blob": 1},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (studies.raw / "dataset.json").write_text(json.dumps(description))
    assert "Wrote 7 images of zeros" in studies.call(*"mae3d_fill_contrasts -d 902".split()).stdout
    plan = "nnUNetv2_plan_and_preprocess -d 902 -c 3d_fullres -np 1 -npfp 1 --verify_dataset_integrity"
    assert "WARNING" not in studies.call(*plan.split()).stdout
    studies.call(*"mae3d_preprocess -d 902 -np 1".split())
    flags = "--recipe quick --adaptive --token 4 --epochs 1 --iterations 2 --batch_size 2"
    studies.call(*f"mae3d_plan -d 902 -o Any {flags} --decoder unetr".split())
    return studies


@pytest.fixture(scope="module")
def pretrained(planned_studies, tmp_path_factory):
    """An adaptive encoder of all cases."""
    studies = planned_studies.copied_to(tmp_path_factory.mktemp("pretrained"))
    studies.call(*PRETRAIN.split())
    return studies


@pytest.fixture(scope="module")
def trained(pretrained, tmp_path_factory):
    """Both routes: the adaptive network and the one that stacks its channels, from the same encoder."""
    studies = pretrained.copied_to(tmp_path_factory.mktemp("trained"))
    for trainer in ("nnUNetTrainerAMAE", "nnUNetTrainerViTMAE"):
        studies.call(*TRAIN.split(), trainer)
    return studies


def encoder_of(studies, plans="Any"):
    return studies.results / f"mae3d_pretrain__{plans}__3d_fullres" / "fold_all" / "encoder.safetensors"


def log_of(studies, trainer, plans="Any"):
    folder = studies.results / f"{trainer}__{plans}__3d_fullres" / "fold_0"
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log*.txt")))


def test_nnunet_takes_filled_studies_and_leaves_absent_contrasts_at_zero(planned_studies):
    for number in range(6):
        volume = blosc2.open(str(planned_studies.preprocessed / f"nnUNetPlans_3d_fullres/train_{number}.b2nd"))[:]
        absent = [channel for channel in range(3) if not volume[channel].any()]
        assert absent == ABSENT.get(f"train_{number}", [])


def test_without_an_encoder_training_names_the_command_that_makes_an_adaptive_one(planned_studies, tmp_path):
    studies = planned_studies.copied_to(tmp_path)
    done = studies.call(*TRAIN.split(), "nnUNetTrainerAMAE", code=2)
    assert "mae3d_pretrain -d 902 -c 3d_fullres -p Any --adaptive first" in done.stderr
    assert "-tr nnUNetTrainerAMAEScratch" in done.stderr


def test_adaptive_pretraining_writes_an_encoder_that_knows_its_contrasts(pretrained):
    file = encoder_of(pretrained)
    tensors, card = read_encoder(file)
    assert card.adaptive
    assert card.channel_names == ["T1", "FLAIR", "T2"]
    assert tensors["tokenizer.factors.weight"].shape == (2 * 96, 3)
    assert len(list((file.parent / "reconstructions").iterdir())) == 2


def test_the_flag_alone_makes_pretraining_adaptive(planned_studies, tmp_path):
    studies = planned_studies.copied_to(tmp_path)
    studies.call(*"mae3d_plan -d 902 -o Plain --recipe quick --token 4".split())
    studies.call(*"mae3d_pretrain -d 902 -p Plain --adaptive --epochs 1 --batch_size 4 -device cpu".split())
    assert read_encoder(encoder_of(studies, "Plain"))[1].adaptive


def test_both_routes_start_from_the_same_encoder(trained):
    assert "tensors; pre-trained on 8 cases" in log_of(trained, "nnUNetTrainerAMAE")
    log = log_of(trained, "nnUNetTrainerViTMAE")
    assert "the pre-trained one takes one contrast at a time, this network does not" in log
    assert "50 of 52 tensors" in log


@pytest.mark.parametrize("trainer", ["nnUNetTrainerAMAE", "nnUNetTrainerViTMAE"])
def test_both_routes_predict_a_study_that_lacks_a_contrast(trained, trainer, tmp_path):
    arguments = f"-i {trained.raw / 'imagesTs'} -o {tmp_path} -d 902 -c 3d_fullres -f 0 -p Any -device cpu"
    trained.call("nnUNetv2_predict", *arguments.split(), "-tr", trainer)
    predictions = {file.name: read_voxels(file) for file in tmp_path.glob("*.nii.gz")}
    assert set(predictions) == {"test_0.nii.gz", "test_1.nii.gz"}  # the second one lacks a contrast
    assert {prediction.shape for prediction in predictions.values()} == {SHAPE}


def test_the_adaptive_network_trains_from_random_weights_too(planned_studies, tmp_path):
    studies = planned_studies.copied_to(tmp_path)
    studies.call(*TRAIN.split(), "nnUNetTrainerAMAEScratch")
    folder = studies.results / "nnUNetTrainerAMAEScratch__Any__3d_fullres" / "fold_0"
    assert (folder / "checkpoint_final.pth").is_file()


def test_a_trained_network_does_not_mind_the_order_of_the_contrasts(trained):
    """Channels and modality vectors in another order: the same segmentation of the same study."""
    folder = trained.results / "nnUNetTrainerAMAE__Any__3d_fullres"
    plans = PlansManager(json.loads((folder / "plans.json").read_text()))
    configuration = plans.get_configuration("3d_fullres")
    weights = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    order = [2, 0, 1]
    shuffled = {name: tensor[:, order] if "factors.weight" in name else tensor for name, tensor in weights.items()}
    volume = torch.randn(2, 3, *configuration.patch_size)
    volume[1, 2] = 0
    logits = []
    for state, images in ((weights, volume), (shuffled, volume[:, order])):
        network = nnUNetTrainerAMAE.build_network_architecture(plans, configuration, 3, 2, False).double().eval()
        network.load_state_dict(state)
        with torch.no_grad():
            logits.append(network(images.double()))
    assert any(not torch.equal(weights[name], shuffled[name]) for name in weights)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    assert torch.equal(logits[0].argmax(1), logits[1].argmax(1))


def test_a_task_with_fewer_and_other_contrasts_starts_from_the_encoder(planned_studies, pretrained, tmp_path):
    other = planned_studies.copied_to(tmp_path)
    file = other.preprocessed / "dataset.json"
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | {"channel_names": {"0": "flair", "1": "T1w", "2": "SWI"}}))
    flags = "--epochs 1 --iterations 1 --batch_size 2"
    done = other.call(*f"mae3d_plan -d 902 -o From {flags} --encoder {encoder_of(pretrained)}".split())
    assert "flair, T1w by name; SWI from the mean" in done.stdout
    other.call(*"nnUNetv2_train 902 3d_fullres 0 -p From -device cpu -tr nnUNetTrainerAMAE".split())
    assert "SWI from the mean" in log_of(other, "nnUNetTrainerAMAE", "From")


def test_pretraining_and_fine_tuning_agree_on_plans_that_say_nothing(planned_studies):
    plans = PlansManager(json.loads((planned_studies.preprocessed / "nnUNetPlans.json").read_text()))
    configuration = plans.get_configuration("3d_fullres")
    adaptive, stacked = (settings_for(configuration, 3, adaptive=choice).network for choice in (True, False))
    assert (adaptive.adaptive, adaptive.decoder) == (True, "unetr")
    protocol = settings_for(configuration, 3, adaptive=True).pretraining
    assert (protocol.mask_ratio, protocol.norm_pix) == (0.7, False)  # AMAE, section 2.4
    assert stacked == settings_of(configuration).network
    assert np.prod(adaptive.token) >= np.prod(stacked.token)
