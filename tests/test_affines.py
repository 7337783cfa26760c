"""Rotation and scaling of pre-training crops: what is drawn, where voxels come from, and which tokens take part."""

import math

import blosc2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.pretraining import affines as module
from nnunet_vit_mae.pretraining.affines import AffineDrawing, moved, tokens_reached
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.settings import Network, Pretraining, Settings

CPU = torch.device("cpu")
PATCH, TOKEN = (8, 12, 10), (4, 2, 4)
SPACING = (3.0, 1.5, 0.75)
IDENTITY = torch.eye(3)
DRAWING = MaskDrawing(masking=Masking(mask_ratio=0.6), token=TOKEN)


def job(files=(), **protocol):
    return PretrainingJob(
        files=list(files),
        channel_names=["T1", "FLAIR"],
        patch_size=PATCH,
        spacing=SPACING,
        network=Network(size="XS", token=TOKEN),
        protocol=Pretraining(mask_ratio=0.6, **protocol),
    )


@pytest.fixture
def always(monkeypatch):
    """Rotate and scale all crops."""
    monkeypatch.setattr(module, "SHARE", 1.0)


@pytest.fixture
def files(tmp_path):
    """Two volumes, the second one smaller than a crop along y."""
    random = np.random.default_rng(0)
    for number, shape in enumerate([(9, 15, 11), (10, 9, 14)]):
        volume = random.normal(5, 1, (2, *shape)).astype(np.float32)
        blosc2.asarray(volume, urlpath=str(tmp_path / f"case_{number}.b2nd"), mode="w")
    return sorted(tmp_path.glob("*.b2nd"))


def about_z(degrees, spacing=(1.0, 1.0, 1.0)):
    """The map of a rotation about z."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[1.0, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    return turn * torch.tensor(spacing) / torch.tensor(spacing)[:, None]


# ---------- settings


def test_it_is_off_unless_asked_for():
    assert job().affines is None
    assert job(rotation=10.0).affines == AffineDrawing(rotation=10.0, scaling=(1.0, 1.0), spacing=SPACING)
    assert job(scaling=(0.8, 1.0)).affines is not None


def test_settings_come_from_plans():
    protocol = Settings.from_dict({"pretraining": {"rotation": 30, "scaling": [0.7, 1]}}).pretraining
    assert (protocol.rotation, protocol.scaling) == (30.0, (0.7, 1.0))
    assert all(type(factor) is float for factor in protocol.scaling)


@pytest.mark.parametrize(
    "block",
    [{"rotation": value} for value in (-1, 181, float("nan"), "30", [30])]
    + [
        {"scaling": value}
        for value in ([1.2, 0.8], [1.0], [0, 1], [1, 11], ["a", 1], 0.9, [float("nan"), 1], [True, 1])
    ]
    + [{"seed": value} for value in (-1, 2**32, 0.5)],
)
def test_other_values_are_refused_by_name(block):
    with pytest.raises(UserError, match=f"pretraining.{next(iter(block))}"):
        Settings.from_dict({"pretraining": block})


# ---------- what is drawn


def test_a_fifth_of_the_crops_is_rotated_and_a_fifth_is_scaled():
    drawing = AffineDrawing(rotation=20.0, scaling=(0.5, 2.0), spacing=SPACING)
    random = np.random.default_rng(0)
    maps = np.stack([drawing.draw(random) for _ in range(3000)])
    sizes = np.linalg.det(maps) ** (-1 / 3)  # by which structures grow
    turns = maps * np.array(SPACING)[:, None] / np.array(SPACING) * sizes[:, None, None]
    assert np.allclose(turns @ turns.transpose(0, 2, 1), np.eye(3))  # rotations in the patient, not in voxels
    rotated, scaled = np.abs(turns - np.eye(3)).max(axis=(1, 2)) > 1e-9, np.abs(sizes - 1) > 1e-9
    assert rotated.mean() == pytest.approx(0.2, abs=0.02)
    assert scaled.mean() == pytest.approx(0.2, abs=0.02)
    assert (rotated & scaled).mean() == pytest.approx(0.04, abs=0.012)
    assert 0.5 <= sizes.min() < 0.52
    assert 1.95 < sizes.max() <= 2
    assert np.median(sizes[scaled]) == pytest.approx(1, abs=0.06)  # as often larger as smaller
    angles = np.degrees(np.arccos(np.clip((np.trace(turns, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    assert 20 < angles.max() <= 20 * math.sqrt(3) + 1


def test_the_same_seed_gives_the_same_crops_and_others_stay_what_they_are_without(files, always):
    options = {"rotation": 30.0, "scaling": (0.7, 1.4)}

    def batch(seed, affines, reads=(0, 1, 2, 3)):
        return RandomCrops(files, PATCH, DRAWING, seed, affines=affines, crops_per_volume=2)[list(reads)]

    off, first, second, other = (
        batch(seed, job(**changes).affines) for seed, changes in [(1, {}), (1, options), (1, options), (2, options)]
    )
    assert off.affines is None
    assert torch.equal(first.crops, off.crops)
    assert torch.equal(first.flips, off.flips)
    assert all(torch.equal(one, again) for one, again in zip(first.masks, second.masks, strict=True))
    assert torch.equal(first.affines, second.affines)
    assert torch.equal(first.samples(CPU).volume, second.samples(CPU).volume)
    assert not torch.equal(first.affines, other.affines)
    assert len(first.affines.flatten(1).unique(dim=0)) == 8  # each crop its own
    alone = batch(1, job(**options).affines, reads=[2])
    assert torch.equal(alone.affines, first.affines[4:6])
    assert torch.equal(alone.samples(CPU).volume, first.samples(CPU).volume[4:6])


def test_crops_that_are_not_drawn_stay_as_they_are_to_the_digit(files, monkeypatch):
    monkeypatch.setattr(module, "SHARE", 0.0)
    crops = RandomCrops(files, PATCH, DRAWING, 1, affines=job(rotation=30.0).affines)[[0, 1]]
    without = RandomCrops(files, PATCH, DRAWING, 1)[[0, 1]]
    assert torch.equal(crops.affines, IDENTITY.expand(2, 3, 3))
    assert torch.equal(crops.samples(CPU).volume, without.samples(CPU).volume)
    assert all(torch.equal(one, other) for one, other in zip(crops.masks, without.masks, strict=True))


# ---------- where voxels come from


def test_a_quarter_turn_takes_each_voxel_to_its_place():
    volume = torch.randn(2, 3, 4, 6, 6)
    maps = torch.stack([about_z(90), IDENTITY])
    turned = moved(volume, maps)
    # the map takes (y, x), counted from the centre, from (-x, y): what lay at the end of x comes to the end of y
    assert torch.allclose(turned[0], torch.rot90(volume[0], -1, (2, 3)), atol=1e-5)
    assert torch.equal(turned[1], volume[1])


def test_structures_keep_their_size_in_mm_when_they_are_turned():
    volume = torch.zeros(1, 1, 3, 16, 31)
    volume[0, 0, 1, 4:12, 14:17] = 1  # 8 voxels of 2 mm along y
    turned = moved(volume, about_z(90, spacing=(1.0, 2.0, 1.0))[None])[0, 0, 1]
    assert (turned > 0.25).any(dim=0).sum() == pytest.approx(16, abs=1)  # 16 voxels of 1 mm along x
    assert (turned > 0.25).any(dim=1).sum() <= 2


def test_a_larger_factor_makes_structures_larger(always):
    drawn = AffineDrawing(rotation=0.0, scaling=(2.0, 2.0), spacing=SPACING).draw(np.random.default_rng(0))
    assert np.allclose(drawn, np.eye(3) / 2)  # from half as far from the centre
    volume = torch.zeros(1, 1, 16, 16, 16)
    volume[..., 6:10, 6:10, 6:10] = 1
    assert moved(volume, IDENTITY[None] / 2).sum() == pytest.approx(8**3, rel=0.05)
    assert moved(volume, IDENTITY[None] * 2).sum() == pytest.approx(2**3, rel=0.5)


# ---------- tokens


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    low=st.tuples(*[st.integers(0, 3)] * 3),
    high=st.tuples(*[st.integers(4, 8)] * 3),
    degrees=st.floats(0, 180),
    factor=st.floats(0.5, 2),
)
def test_tokens_take_part_where_anything_of_the_scan_comes_in(seed, low, high, degrees, factor):
    drawing = AffineDrawing(rotation=degrees, scaling=(factor, factor), spacing=SPACING)
    random = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARE", 1.0)
        affine = torch.from_numpy(drawing.draw(random)).float()[None]
    bounds = torch.tensor([*zip(low, high, strict=True)])[None]
    scan = torch.zeros(1, 1, *PATCH)
    scan[0, 0, low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    before = patchify(scan, TOKEN)[:, :, 0].any(dim=2)
    reached = tokens_reached(before, affine, bounds, PATCH, TOKEN)[0]
    content = patchify(moved(scan, affine), TOKEN)[0, :, 0].amax(dim=1)
    assert reached[content > 1e-3].all()
    assert (content[reached] > 0).float().mean() > 0.99 if reached.any() else True
    assert not content[~reached].gt(1e-3).any()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_what_comes_in_from_beyond_a_crop_is_neither_shown_nor_hidden(files, always, adaptive, skip):
    drawing = MaskDrawing(masking=Masking(mask_ratio=0.6), token=TOKEN, adaptive=adaptive, skip_background=skip)
    drawn = job(rotation=180.0, scaling=(0.6, 0.8)).affines
    left_out = 0
    for read in range(12):
        batch = RandomCrops(files, PATCH, drawing, 3, affines=drawn)[[read]]
        volume = batch.samples(CPU).volume
        content = patchify(volume, TOKEN).ne(0).flatten(2).any(dim=2)[0]  # no voxel of a scan is 0
        seen = {*batch.masks.visible.flatten().tolist(), *batch.masks.hidden[batch.masks.counted].tolist()}
        assert all(content[token % len(content)] for token in seen)
        left_out += int((~content).sum())
    assert left_out > 0


def test_absent_contrasts_stay_absent():
    volume = torch.randn(1, 2, *PATCH)
    volume[:, 1] = 0
    assert not moved(volume, about_z(30)[None])[:, 1].any()
