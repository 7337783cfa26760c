"""Which axes crops are mirrored along: none in fine-tuning where labels name sides."""

import json

import pytest
import torch

from nnunet_vit_mae.cli import plan
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.sides import label_with_side
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.nnunet.mirroring import mirroring_of
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline, nnUNetTrainerViTScratch
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.settings import Settings

SIDED = ["background", "brainstem", "right_parotid", "left_parotid"]


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


@pytest.mark.parametrize(
    ("choice", "labels", "in_3d", "in_2d"),
    [
        ("auto", ["background", "lesion"], (0, 1, 2), (0, 1)),
        ("auto", SIDED, None, None),
        ("xz", SIDED, (0, 2), (1,)),
        ("z", SIDED, (0,), None),
        ("none", ["background", "lesion"], None, None),
    ],
)
def test_what_a_choice_stands_for(choice, labels, in_3d, in_2d):
    found = mirroring_of(choice, labels)
    assert (found.of_patch(3), found.of_patch(2)) == (in_3d, in_2d)


def test_the_reason_is_a_sentence():
    assert str(mirroring_of("auto", SIDED)) == (
        "No crop is mirrored: the label right_parotid names a side of the body."
    )
    assert str(mirroring_of("zy", SIDED)) == "Crops are mirrored along z, y: the plans say so."


@pytest.mark.parametrize(
    ("section", "value"),
    [("pretraining", "auto"), *((section, value) for section in ("pretraining", "finetuning") for value in ("", "zq"))],
)
def test_other_values_are_refused(section, value):
    with pytest.raises(UserError, match=rf"{section}\.mirroring is '{value}'"):
        Settings.from_dict({section: {"mirroring": value}})


@pytest.mark.parametrize(("choice", "axes"), [("xz", [True, False, True]), ("none", [False, False, False])])
def test_pretraining_flips_along_these_axes_alone(workspace, choice, axes):
    files = sorted(workspace.preprocessed.glob("nnUNetPlans_3d_fullres/*[0-9].b2nd"))
    drawing = MaskDrawing(masking=Masking(mask_ratio=0.6), token=(4, 4, 4))
    some, every = (
        RandomCrops(files, (12, 16, 8), drawing, 3, mirroring=mirroring)[range(40)] for mirroring in (choice, "zyx")
    )
    assert torch.equal(some.crops, every.crops)
    assert every.flips.any(dim=0).all()
    assert torch.equal(some.flips, every.flips & torch.tensor(axes))


@pytest.fixture
def sided(in_workspace):
    """A workspace whose label names a side."""
    for file in (in_workspace.raw / "dataset.json", in_workspace.preprocessed / "dataset.json"):
        content = json.loads(file.read_text())
        content["labels"] = {"background": 0, "left lesion": 1}
        file.write_text(json.dumps(content))
    return in_workspace


@pytest.mark.parametrize("trainer", [nnUNetTrainerBaseline, nnUNetTrainerViTScratch])
@pytest.mark.parametrize(("choice", "axes"), [("auto", None), ("zyx", (0, 1, 2)), ("x", (2,))])
def test_u_net_and_vit_mirror_alike_in_training_and_prediction(sided, trainer, choice, axes):
    content = json.loads((sided.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    content["configurations"]["3d_fullres"]["vit_mae"] = {"finetuning": {"mirroring": choice}}
    description = json.loads((sided.preprocessed / "dataset.json").read_text())
    model = trainer(content, "3d_fullres", 0, description, torch.device("cpu"))
    assert model.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[-1] == axes
    assert model.inference_allowed_mirroring_axes == axes


def test_plans_say_which_axes(sided, capsys):
    plan.main("-d 901 -o Sided --size XS --token 4".split())
    assert "the label left lesion names a side" in capsys.readouterr().out
    plan.main("-d 901 -o Sided --size XS --token 4 --mirroring zy".split())
    block = json.loads((sided.preprocessed / "Sided.json").read_text())["configurations"]["3d_fullres"]["vit_mae"]
    assert block["finetuning"]["mirroring"] == "zy"
    assert block["pretraining"]["mirroring"] == "zyx"
