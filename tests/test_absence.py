"""Absent contrasts through nnU-Net's own augmentation, and contrast dropout."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_vit_mae.nnunet.absence import keeping_absence

PATCH = (10, 12, 14)


def augmentation() -> BasicTransform:
    """Everything that nnU-Net does to a training sample."""
    return nnUNetTrainer.get_training_transforms(
        np.array(PATCH), (-0.5, 0.5), None, (0, 1, 2), False, use_mask_for_norm=[False] * 4, foreground_labels=[1]
    )


def sample(absent: list[int]) -> dict:
    image = 3 + torch.randn(4, *PATCH)
    image[absent] = 0
    return {"image": image, "segmentation": torch.zeros(1, *PATCH, dtype=torch.int16)}


def test_augmentation_alone_fills_an_absent_contrast():
    results = [augmentation()(**sample([2]))["image"][2] for _ in range(60)]
    assert any(result.any() for result in results)


@pytest.mark.parametrize("absent", [[2], [0, 3], [0, 1, 2, 3], []])
def test_absent_contrasts_stay_zero_and_present_ones_do_not_become_so(absent):
    transform = keeping_absence(augmentation(), dropout=0.0)
    for _ in range(60):
        result = transform(**sample(absent))
        zero = [channel for channel in range(4) if not result["image"][channel].any()]
        assert zero == absent
        assert set(result) == {"image", "segmentation"}


class Nothing(BasicTransform):
    """A transform that leaves everything as it is."""

    def apply(self, data_dict: dict, **params) -> dict:
        return data_dict


def test_without_dropout_the_pair_changes_nothing():
    given = sample([1])
    result = keeping_absence(Nothing(), dropout=0.0)(image=given["image"].clone(), segmentation=given["segmentation"])
    assert torch.equal(result["image"], given["image"])


def test_dropout_takes_contrasts_away_as_often_as_asked_and_never_the_last():
    transform = keeping_absence(Nothing(), dropout=0.4)
    kept = np.array([transform(**sample([2]))["image"].flatten(1).any(dim=1).numpy() for _ in range(2000)])
    assert not kept[:, 2].any()
    assert kept.any(axis=1).all()
    # three present contrasts: each is kept with 0.6, or when all three were drawn, as the one that is put back
    expected = 0.6 + 0.4**3 / 3
    assert kept[:, [0, 1, 3]].mean(axis=0) == pytest.approx(expected, abs=0.04)


def test_a_sample_of_zeros_stays_one():
    result = keeping_absence(Nothing(), dropout=0.9)(**sample([0, 1, 2, 3]))
    assert not result["image"].any()
