"""Augmentation of batches against nnU-Net's own, with the same random numbers, and each function row by row."""

import json

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage, stats

from nnunet_vit_mae import batch_transforms as augmentation
from nnunet_vit_mae.cli import plan as plan_command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet import stopping
from nnunet_vit_mae.nnunet.augmentation import BatchAugmentation
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerViTScratch

PATCH, ENLARGED = (16, 20, 24), (24, 29, 35)
FLAT_PATCH, FLAT_ENLARGED = (6, 20, 24), (6, 29, 35)  # thick slices: turned and scaled in their plane only
ROTATION = (-np.pi / 6, np.pi / 6)
LABELS = (0, 1, 2)


def transforms(patch=PATCH, flat=False, **more):
    return nnUNetTrainer.get_training_transforms(patch, ROTATION, None, (0, 1, 2), flat, **more)


def sample(seed: int, shape=ENLARGED, channels=2):
    """Smooth images and blobs of labels, with a corner outside of the image."""
    random = np.random.default_rng(seed)
    image = ndimage.gaussian_filter(random.normal(size=(channels, *shape)), (0, 2, 2, 2)) * 8
    segmentation = np.digitize(ndimage.gaussian_filter(random.normal(size=shape), 3), [0.02, 0.06])[None]
    segmentation[:, :4, :5, :6] = -1
    return torch.from_numpy(image).float(), torch.from_numpy(segmentation).to(torch.int16)


def seed_everything(seed: int) -> None:
    np.random.seed(seed)  # noqa: NPY002 (nnU-Net's transforms draw from it)
    torch.manual_seed(seed)


@pytest.mark.parametrize(
    ("patch", "enlarged", "more"),
    [
        (PATCH, ENLARGED, {}),
        (FLAT_PATCH, FLAT_ENLARGED, {"flat": True}),
        (PATCH, ENLARGED, {"use_mask_for_norm": [False, True]}),
        (PATCH, ENLARGED, {"regions": [(1, 2), 2], "ignore_label": 3}),
    ],
)
def test_one_sample_is_augmented_as_by_nnunet(patch, enlarged, more):
    """With a batch of one both draw the same numbers in the same order, so that every transform can be compared."""
    theirs = transforms(patch, **more)
    ours = BatchAugmentation(theirs, LABELS, contrast_dropout=0)
    changed = 0
    for seed in range(40):
        image, segmentation = sample(seed, enlarged)
        seed_everything(seed)
        expected = theirs(image=image.clone(), segmentation=segmentation.clone())
        seed_everything(seed)
        found, target = ours(image[None].clone(), segmentation[None].clone())
        assert found.shape[2:] == patch
        assert torch.allclose(found[0], expected["image"], atol=2e-4 * float(image.abs().max()))
        assert target.dtype == expected["segmentation"].dtype
        assert (target[0] != expected["segmentation"]).float().mean() < 1e-3  # ties, which half precision rounds
        changed += not torch.equal(expected["image"], augmentation.centre_crop(image[None], patch)[0])
    assert changed > 30


def test_a_batch_is_augmented_sample_by_sample():
    """Statistics of many draws: what a batch gives is distributed as what nnU-Net gives for its samples."""
    theirs = transforms()
    ours = BatchAugmentation(theirs, LABELS, contrast_dropout=0)
    image, segmentation = sample(0)
    seed_everything(0)
    batches = [ours(image[None].repeat(6, 1, 1, 1, 1), segmentation[None].repeat(6, 1, 1, 1, 1)) for _ in range(40)]
    found = [(volume, target) for batch in batches for volume, target in zip(*batch, strict=True)]
    done = [theirs(image=image.clone(), segmentation=segmentation.clone()) for _ in range(240)]
    expected = [(one["image"], one["segmentation"]) for one in done]
    for statistic in (
        lambda volume, target: float(volume[0].mean()),
        lambda volume, target: float(volume[1].std()),
        lambda volume, target: float(volume[0].diff(dim=0).abs().mean()),
        lambda volume, target: float((volume[0, :8] - volume[0, 8:]).mean()),
        lambda volume, target: float((target == 2).sum()),
        lambda volume, target: float((target[:, :, :10] == 1).sum()),
    ):
        ours_, theirs_ = ([statistic(*one) for one in side] for side in (found, expected))
        assert stats.ks_2samp(ours_, theirs_).pvalue > 1e-4


@pytest.mark.parametrize(("patch", "enlarged", "flat"), [(PATCH, ENLARGED, False), (FLAT_PATCH, FLAT_ENLARGED, True)])
def test_image_and_labels_of_each_sample_move_together(patch, enlarged, flat):
    """Images that show their own labels still do, in batches of samples that differ."""
    ours = BatchAugmentation(transforms(patch, flat), (0, 1), contrast_dropout=0)
    ours.steps = [step for step in ours.steps if not isinstance(step.transform, ImageOnlyTransform)]
    moved = 0
    for seed in range(10):
        labels = torch.stack([(sample(8 * seed + n, enlarged)[1] > 0).to(torch.int16) for n in range(4)])
        seed_everything(seed)
        image, target = ours(labels.float(), labels.clone())
        assert ((image > 0.5) != (target == 1)).float().mean() < 5e-3  # ties
        still = augmentation.centre_crop(labels, patch)
        moved += sum(not torch.equal(one, other) for one, other in zip(target, still, strict=True))
    assert moved > 20


@pytest.mark.parametrize(("name", "value"), [("p_elastic_deform", 0.2), ("random_crop", True), ("mode_seg", "nearest")])
def test_a_spatial_setting_without_counterpart_is_refused(name, value):
    theirs = transforms()
    (spatial,) = (one for one in theirs.transforms if isinstance(one, SpatialTransform))
    setattr(spatial, name, value)
    with pytest.raises(UserError, match=rf"{name}.*augmentation \"loader\""):
        BatchAugmentation(theirs, LABELS, contrast_dropout=0)


def rows_of(seed: int, count: int, shape=(7, 9, 11)) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, *shape))).float()


@given(seed=st.integers(0, 99), count=st.integers(1, 4))
def test_rows_do_not_meet(seed, count):
    rows = rows_of(seed, count)
    random = np.random.default_rng(seed + 1)

    def numbers(low: float, high: float, *more: int) -> torch.Tensor:
        return torch.from_numpy(random.uniform(low, high, (count, *more)))

    flags = torch.from_numpy(random.random((2, count)) < 0.5)
    for function, parameters in (
        (augmentation.brightness, [numbers(0.5, 1.5)]),
        (augmentation.blur, [numbers(0.5, 1, 3)]),
        (lambda *given: augmentation.contrast(*given, preserve_range=True), [numbers(0.5, 1.5)]),
        (augmentation.gamma, [numbers(0.7, 1.5), *flags]),
        (augmentation.lower_resolution, [numbers(0.5, 1, 3)]),
    ):
        alone = [function(rows[n : n + 1], *(one[n : n + 1] for one in parameters)) for n in range(count)]
        assert torch.allclose(function(rows, *parameters), torch.cat(alone), atol=1e-5)


def test_turning_a_ramp_turns_its_gradient():
    """A quarter turn in the plane of y and x, twice as large along z."""
    z, y, x = torch.meshgrid(*(torch.arange(size) - (size - 1) / 2 for size in ENLARGED), indexing="ij")
    affine = torch.tensor([[2.0, 0, 0], [0, 0, -1], [0, 1, 0]])[None]
    patch = (10, 20, 20)
    found = augmentation.resample_images(torch.stack([z, y, x])[None], affine, patch)[0]
    own = torch.meshgrid(*(torch.arange(size) - (size - 1) / 2 for size in patch), indexing="ij")
    for turned, expected in zip(found, (2 * own[0], -own[2], own[1]), strict=True):
        assert torch.allclose(turned, expected, atol=1e-4)


def test_absent_contrasts_stay_absent_and_some_are_taken_away():
    ours = BatchAugmentation(transforms(), LABELS, contrast_dropout=0.5)
    image, segmentation = sample(0, channels=3)
    image[1] = 0
    taken = set()
    for _ in range(20):
        found, _ = ours(image[None].repeat(2, 1, 1, 1, 1), segmentation[None].repeat(2, 1, 1, 1, 1))
        for one in found:
            present = tuple(one.flatten(1).any(dim=1).tolist())
            assert present[1] is False
            assert any(present)
            taken.add(present)
    assert len(taken) == 3


def test_a_transform_without_counterpart_is_named():
    class NewTransform(BasicTransform):
        pass

    with pytest.raises(UserError, match="NewTransform has no counterpart"):
        BatchAugmentation(ComposeTransforms([NewTransform()]), LABELS, contrast_dropout=0)


def test_the_trainer_augments_where_the_plans_say(in_workspace, monkeypatch):
    """The loader gives enlarged patches as they are, and the step gets augmented ones of the planned size."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    recipe = in_workspace.root / "device.json"
    recipe.write_text(json.dumps({"finetuning": {"augmentation": "device", "batch_size": 2}}))
    plan_command.main(["-d", "901", "-o", "Device", "--recipe", str(recipe), "--size", "XS", "--token", "8"])
    plans = json.loads((in_workspace.preprocessed / "Device.json").read_text()) | {"continue_training": False}
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainerViTScratch(plans, "3d_fullres", 0, description, torch.device("cpu"))
    trainer.initialize()
    patch, counted = tuple(trainer.configuration_manager.patch_size), []
    monkeypatch.setattr(stopping, "refuse_without_shared_memory", lambda *arguments, **_: counted.append(arguments))
    training, validation = trainer.get_dataloaders()
    batch = next(training)
    assert counted == [(0, batch["data"].nbytes + batch["target"].nbytes)]  # of shared memory, which holds such batches
    assert all(large >= small for large, small in zip(batch["data"].shape[2:], patch, strict=True))
    assert batch["data"].shape[2:] != patch
    assert next(validation)["data"].shape[2:] == patch
    seen = []
    trainer.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    trainer.on_train_epoch_start()
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert seen[0].shape == (2, 2, *patch)
