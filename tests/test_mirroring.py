"""Which axes crops are mirrored along: never from left to right where labels name sides."""

import itertools
import json
import pickle

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_vit_mae.cli import plan
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.sides import label_with_side
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.nnunet.mirroring import left_right_axis, mirroring_of
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline, nnUNetTrainerViTScratch
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.settings import Settings

SIDED = ["background", "brainstem", "right_parotid", "left_parotid"]
ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (SIDED, "right_parotid"),
        (["background", "leftBreast"], "leftBreast"),
        (["background", "Left-Thalamus", "Right-Thalamus"], "Left-Thalamus"),
        (["background", "kidney_L", "kidney_R"], "kidney_L"),
        (["background", "rh cortex", "lh cortex"], "rh cortex"),
        (["background", "L", "R"], "L"),
        (["background", "L", "lesion"], None),  # no R
        (["background", "kidney_L", "spleen_R"], None),
        (["background", "cleft", "bright spot"], None),
        (["background", "L1", "L2", "R2D2"], None),
    ],
)
def test_labels_that_name_a_side_are_found(labels, found):
    assert label_with_side(labels) == found


def properties(direction):
    return {"sitk_stuff": {"direction": tuple(np.asarray(direction, float).ravel())}}


@given(
    order=st.sampled_from(ORDERS), transpose=st.sampled_from(ORDERS), signs=st.tuples(*[st.sampled_from((-1, 1))] * 3)
)
def test_the_axis_is_that_of_the_preprocessed_volume(order, transpose, signs):
    direction = np.zeros((3, 3))
    for axis in range(3):  # axis x, y or z of the image leads along the patient's axis order[axis]
        direction[order[axis], axis] = signs[axis]
    marked = np.zeros((3, 4, 5))  # z y x, which grows from left to right alone
    side = 2 - order.index(0)
    marked += np.arange(marked.shape[side]).reshape([-1 if axis == side else 1 for axis in range(3)])
    found = left_right_axis(properties(direction), transpose)
    assert np.ptp(marked.transpose(transpose), axis=found).any()


def test_an_oblique_axis_is_the_nearest_one():
    turned = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    assert left_right_axis(properties(turned), (0, 1, 2)) == 2
    assert left_right_axis(properties(turned[:, [1, 0, 2]]), (0, 1, 2)) == 1


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("orientation", ["LPS", "PIR", "SRA"])
def test_all_of_nnunets_readers_of_medical_images_agree(tmp_path, reader, orientation):
    """The voxels say where the patient's left is: they grow towards it."""
    image = sitk.GetImageFromArray(np.zeros((4, 5, 6), np.float32) + np.arange(6, dtype=np.float32))
    image.SetSpacing((0.5, 2.0, 3.0))  # anisotropic, so that an affine is more than its directions
    sitk.WriteImage(sitk.DICOMOrient(image, orientation), file := tmp_path / "case.nii.gz")
    array, stated = reader().read_images([str(file)])
    assert np.ptp(array[0], axis=left_right_axis(stated, (0, 1, 2))).any()


def test_2d_images_and_formats_without_a_patient():
    assert left_right_axis(properties(np.eye(2)), (0, 1, 2)) == 2
    assert left_right_axis(properties([[0, 1], [1, 0]]), (0, 1, 2)) == 1
    assert left_right_axis({"spacing": (1, 1, 1)}, (0, 1, 2)) is None


def folder_of(path, *cases):
    for number, stated in enumerate(cases):
        (path / f"case{number}.pkl").write_bytes(pickle.dumps(stated))
    return path


def test_what_auto_stands_for(tmp_path):
    x, y = properties(np.eye(3)), properties(np.eye(3)[:, [1, 0, 2]])

    def found(name, *cases, choice="auto", labels=SIDED):
        (tmp_path / name).mkdir()
        return mirroring_of(choice, labels, folder_of(tmp_path / name, *cases), (0, 1, 2))

    assert found("no sides", x, labels=["background", "lesion"]).axes == (0, 1, 2)
    assert found("along x", x, x).axes == (0, 1)
    assert found("mixed", x, y, x).axes == (0,)
    assert found("unknown", x, {"spacing": (1, 1, 1)}).axes == ()
    assert "no case is preprocessed" in str(found("nothing"))
    assert found("given", x, choice="xz").axes == (0, 2)
    assert found("none", x, choice="none").axes == ()
    assert str(found("said", x)) == (
        "Crops are mirrored along z, y: the label right_parotid names a side, and x leads from left to right."
    )


@pytest.mark.parametrize("section", ["pretraining", "finetuning"])
@pytest.mark.parametrize("value", ["", "zq", "all", "Auto"])
def test_other_values_are_refused(section, value):
    with pytest.raises(UserError, match=rf"{section}\.mirroring is '{value}'"):
        Settings.from_dict({section: {"mirroring": value}})


def test_pretraining_flips_along_these_axes_alone(workspace):
    files = sorted(workspace.preprocessed.glob("nnUNetPlans_3d_fullres/*[0-9].b2nd"))
    drawing = MaskDrawing(masking=Masking(mask_ratio=0.6), token=(4, 4, 4))
    some, every = (
        RandomCrops(files, (12, 16, 8), drawing, 3, mirror_axes=axes)[range(40)] for axes in ((0, 2), (0, 1, 2))
    )
    assert torch.equal(some.crops, every.crops)
    assert every.flips.any(dim=0).all()
    assert torch.equal(some.flips, every.flips & torch.tensor([True, False, True]))


@pytest.fixture
def sided(in_workspace):
    """A workspace whose labels name a side."""
    for file in (in_workspace.raw / "dataset.json", in_workspace.preprocessed / "dataset.json"):
        content = json.loads(file.read_text())
        content["labels"] = {"background": 0, "left lesion": 1}
        file.write_text(json.dumps(content))
    return in_workspace


@pytest.mark.parametrize("trainer", [nnUNetTrainerBaseline, nnUNetTrainerViTScratch])
@pytest.mark.parametrize(("choice", "axes"), [("auto", (0, 1)), ("zyx", (0, 1, 2)), ("x", (2,)), ("none", None)])
def test_u_net_and_vit_mirror_alike_in_training_and_prediction(sided, trainer, choice, axes):
    content = json.loads((sided.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    content["configurations"]["3d_fullres"]["vit_mae"] = {"finetuning": {"mirroring": choice}}
    description = json.loads((sided.preprocessed / "dataset.json").read_text())
    model = trainer(content, "3d_fullres", 0, description, torch.device("cpu"))
    assert model.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == axes
    assert model.inference_allowed_mirroring_axes == axes


def test_plans_say_which_axes(sided, capsys):
    plan.main("-d 901 -o Sided --size XS --token 4".split())
    assert "x leads from left to right" in capsys.readouterr().out
    plan.main("-d 901 -o Sided --size XS --token 4 --mirroring none".split())
    block = json.loads((sided.preprocessed / "Sided.json").read_text())["configurations"]["3d_fullres"]["vit_mae"]
    assert block["pretraining"]["mirroring"] == block["finetuning"]["mirroring"] == "none"
