"""Feature maps and their checkerboards: the measure where the answer is known, and the command on a tiny dataset."""

import csv
import json
import math
import re
import shutil

import blosc2
import numpy as np
import pytest
import torch
from conftest import random_volume
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from nnunet_vit_mae.cli import features as features_command
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.checkerboard import checkerboard, feature_maps, inner
from nnunet_vit_mae.nnunet.features import draw_features, read_patch
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import load_plan
from nnunet_vit_mae.presets import DECODERS, UPSAMPLINGS
from nnunet_vit_mae.settings import Network

PERIOD = (1, 2, 4)
few = settings(max_examples=25, deadline=None)
periods = st.tuples(*[st.sampled_from((1, 2, 3, 4))] * 3)
counts = st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(2, 5))


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """A random volume (1 1 z y x) that hardly changes from one voxel to the next."""
    coarse = random_volume(1, 1, *(max(2, side // 6) for side in shape), seed=seed)
    return functional.interpolate(coarse, size=shape, mode="trilinear")


def segmenter(decoder: str = "upscale", kind: str = "nearest", token=(4, 4, 4), seed: int = 0):
    torch.manual_seed(seed)
    network = Network(size="XS", token=token, decoder=decoder, upsampling=kind)
    return build_segmenter(network, 1, 2, drop_path=0.0).eval()


# ---------- the measure


@few
@given(period=periods.filter(lambda p: math.prod(p) > 1), count=counts)
def test_a_repeated_cell_is_all_checkerboard(period, count):
    assert checkerboard(random_volume(3, *period).tile(1, *count), period) == pytest.approx(1)


@few
@given(period=periods, count=counts, value=st.floats(-1e4, 1e4, width=32))
def test_a_constant_map_has_none(period, count, value):
    sides = [side * cells for side, cells in zip(period, count, strict=True)]
    assert checkerboard(torch.full((2, *sides), value), period) == 0


@few
@given(period=periods, count=counts)
def test_whole_cells_of_one_value_have_none(period, count):
    blocks = random_volume(3, *count)
    for axis, side in enumerate(period, start=1):
        blocks = blocks.repeat_interleave(side, dim=axis)
    assert checkerboard(blocks, period) == pytest.approx(0, abs=1e-12)


@few
@given(seed=st.integers(0, 99), period=periods, count=counts, scale=st.sampled_from((-300.0, 0.02, 7.0)))
def test_it_is_a_share_and_neither_scale_nor_offset_changes_it(seed, period, count, scale):
    values = random_volume(2, *(side * cells for side, cells in zip(period, count, strict=True)), seed=seed).double()
    share = checkerboard(values, period)
    assert 0 <= share <= 1
    assert checkerboard(scale * values - 20, period) == pytest.approx(share, abs=1e-6)


def test_smooth_maps_and_noise_have_next_to_none():
    along = torch.linspace(0, 2 * math.pi, 48)
    wave = along[:24, None, None].cos() + along[None, :40, None].cos() * along.sin()
    assert checkerboard(wave[None], (2, 4, 8)) < 0.01
    assert checkerboard(smooth(24, 40, 48)[0], (2, 4, 8)) < 0.02
    assert sum(checkerboard(random_volume(1, 16, 24, 32, seed=seed), (2, 4, 8)) for seed in range(10)) / 10 < 0.005


@pytest.mark.parametrize("strength", [0.1, 1.0])
def test_it_finds_how_strong_a_pattern_is(strength):
    """Noise of variance 1 and a pattern of variance s: a share of s / (1 + s)."""
    pattern = random_volume(1, *PERIOD)
    pattern = (pattern - pattern.mean()) / pattern.std(correction=0) * math.sqrt(strength)
    values = random_volume(1, 12, 24, 48) + pattern.tile(1, 12, 12, 12)
    assert checkerboard(values, PERIOD) == pytest.approx(strength / (1 + strength), rel=0.1)


def test_a_pattern_counts_along_its_own_axis_only():
    stripes = torch.arange(24).remainder(4).float().expand(1, 8, 12, 24)
    assert checkerboard(stripes, (1, 1, 4)) == pytest.approx(1)
    assert checkerboard(stripes, (1, 1, 8)) == pytest.approx(1)  # the harmonics of a longer period
    assert checkerboard(stripes, (1, 4, 1)) == 0
    assert checkerboard(stripes.transpose(2, 3), (1, 4, 1)) == pytest.approx(1)


def test_the_border_and_incomplete_cells_are_left_out():
    values = torch.full((2, 6, 13, 19), 1e4)  # 6, 6 and 4 whole cells, with one and three values left over
    values[:, 1:5, 2:10, 4:12] = random_volume(2, *PERIOD).tile(1, 4, 4, 2)
    assert inner(values, PERIOD).shape == (2, 4, 8, 8)
    assert checkerboard(values, PERIOD) == pytest.approx(1)
    assert inner(values, (2, 6, 19)).shape == (2, 6, 12, 19)  # of three, two or one cell all are kept


def test_a_strong_channel_counts_more():
    pattern, plain = random_volume(1, *PERIOD).tile(1, 6, 6, 6), random_volume(1, 6, 12, 24, seed=1)
    weak = checkerboard(torch.cat([0.01 * pattern, plain]), PERIOD)
    assert weak < 0.05
    assert checkerboard(torch.cat([pattern, 0.01 * plain]), PERIOD) > 0.95


def test_one_cell_has_nothing_to_repeat_and_less_is_an_error():
    assert math.isnan(checkerboard(random_volume(2, 2, 4, 8), (2, 4, 8)))
    with pytest.raises(ValueError, match="3 values has no whole cell of 4"):
        checkerboard(random_volume(2, 2, 3, 8), (2, 4, 8))


# ---------- the maps


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"unet"}))  # a U-Net covers the volume, not the tokens
@pytest.mark.parametrize("token", [(4, 4, 4), (1, 2, 4), (1, 1, 1)])
def test_maps_come_from_coarse_to_fine_and_cover_the_tokens(decoder, token):
    maps = feature_maps(segmenter(decoder, token=token), smooth(3, 5, 7))
    stages = 0 if decoder == "mae" else max(token).bit_length() - 1
    if decoder in ("unetr", "sfpn"):
        stages = max(1, stages)
    assert [entry.name for entry in maps] == ["image", "tokens", *(f"scale {i + 1}" for i in range(stages)), "logits"]
    grid = [-(-side // step) for side, step in zip((3, 5, 7), token, strict=True)]
    assert [entry.cell for entry in (maps[0], maps[1], maps[-1])] == [token, (1, 1, 1), token]
    for entry in maps:
        assert list(entry.values.shape[1:]) == [cells * side for cells, side in zip(grid, entry.cell, strict=True)]
        assert tuple(a * b for a, b in zip(entry.cell, entry.stride, strict=True)) == token
        assert not entry.values.requires_grad
    sizes = [math.prod(entry.cell) for entry in maps[1:]]
    assert sizes == sorted(sizes)


def test_the_last_map_is_what_the_network_gives():
    network, volume = segmenter(), smooth(8, 12, 16)
    maps = feature_maps(network, volume)
    torch.testing.assert_close(maps[-1].values[None], network(volume).detach())
    stages = network.get_submodule("decoder.stages")
    values = maps[1].values[None]
    for stage, entry in zip(stages.children(), maps[2:-1], strict=True):
        values = stage(values)
        torch.testing.assert_close(entry.values[None], values.detach())


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind(fails):
    network = segmenter("unetr")
    if fails:
        network.decoder.expand.stages[-1] = nn.Conv3d(1, 1, kernel_size=1)  # stages take a skip, too
        with pytest.raises(TypeError):
            feature_maps(network, smooth(8, 12, 16))
    else:
        feature_maps(network, smooth(8, 12, 16))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("decoder", ["upscale", "sfpn"])
def test_transposed_convolutions_leave_a_checkerboard_and_interpolation_does_not(decoder):
    """At the start, before anything is learned; figure 6 shows it after training."""
    shares = {
        kind: [
            [
                checkerboard(entry.values, entry.cell)
                for entry in feature_maps(segmenter(decoder, kind, seed=seed), smooth(20, 24, 28, seed=seed))[2:]
            ]
            for seed in range(3)
        ]
        for kind in UPSAMPLINGS
    }
    nearest, transposed = (torch.tensor(shares[kind]).mean(dim=0) for kind in ("nearest", "transposed"))
    assert (nearest < 0.1).all(), nearest
    assert (transposed > 0.5).all(), transposed


# ---------- the command


@pytest.fixture(scope="module")
def trained(planned, tmp_path_factory):
    """A workspace with both ways of upsampling, each trained for one step."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("features"))
    file = workspace.root / "recipe.json"
    for kind in UPSAMPLINGS:
        recipe = {"network": {"size": "XS", "token": [4, 4, 4], "decoder": "upscale", "upsampling": kind}}
        file.write_text(json.dumps(recipe))
        schedule = ("--epochs", "1", "--iterations", "1", "--batch_size", "2")
        workspace.call("mae3d_plan", "-d", "901", "-o", kind, "--recipe", str(file), *schedule)
        command = f"nnUNetv2_train 901 3d_fullres 0 -p {kind} -tr nnUNetTrainerViTScratch -device cpu"
        workspace.call(*command.split())
    return workspace


def test_a_table_of_others_beside_the_figure_is_not_overwritten(tmp_path):
    (tmp_path / "volumes.csv").write_text("case,volume_mm3\na,1\n")
    with pytest.raises(UserError, match="is there already, and is not a table of mae3d_features"):
        draw_features([], None, tmp_path / "volumes.png", torch.device("cpu"))


@pytest.fixture
def in_trained(trained, monkeypatch):
    trained.use_here(monkeypatch)
    return trained


@pytest.mark.slow
def test_the_command_draws_both_networks_and_writes_their_numbers(trained, tmp_path):
    splits = json.loads((trained.preprocessed / "splits_final.json").read_text())
    (trained.preprocessed / "splits_final.json").unlink()  # written again as nnU-Net does
    picture = tmp_path / "new" / "features.png"
    command = "mae3d_features -d 901 -p nearest transposed -tr nnUNetTrainerViTScratch -o"
    lines = trained.call(*command.split(), str(picture)).stdout.splitlines()
    assert lines[-1] == f"Wrote {picture} and {picture.with_suffix('.csv')}."
    assert picture.read_bytes().startswith(b"\x89PNG")
    with picture.with_suffix(".csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = [("image", "4 4 4"), ("scale 1", "2 2 2"), ("scale 2", "4 4 4"), ("logits", "4 4 4")]
    assert [(row["plans"], row["map"], row["period"]) for row in rows] == [
        (kind, *entry) for kind in ("nearest", "transposed") for entry in expected
    ]
    assert json.loads((trained.preprocessed / "splits_final.json").read_text()) == splits
    assert {row["case"] for row in rows} == {splits[0]["val"][0]}
    for row, line in zip(rows, lines[-1 - len(rows) : -1], strict=True):
        share = float(row["checkerboard"])
        assert 0 <= share <= 1
        assert re.split("  +", line) == [row["plans"], row["map"], row["period"], f"{share:.3f}"]
    shares = {(row["plans"], row["map"]): float(row["checkerboard"]) for row in rows}
    assert shares["transposed", "scale 2"] > 0.3 > shares["nearest", "scale 2"]
    assert shares["transposed", "image"] == shares["nearest", "image"]


@pytest.mark.slow
def test_any_training_case_can_be_named(in_trained, tmp_path, capsys):
    arguments = "-d 901 -p nearest -tr nnUNetTrainerViTScratch --case train_3 -chk checkpoint_best.pth -o".split()
    features_command.main([*arguments, str(tmp_path / "one.png")])
    assert capsys.readouterr().out.count("nearest") == 4
    assert all(line.startswith("train_3,") for line in (tmp_path / "one.csv").read_text().splitlines()[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("-p transposed missing", "run nnUNetv2_train 901 3d_fullres 0 -p missing -tr nnUNetTrainerViTScratch first"),
        ("-f 1", "run nnUNetv2_train 901 3d_fullres 1 -p nearest"),
        ("-chk other.pth", "other.pth"),
        ("-tr nnUNetTrainerBaseline", "nnUNetTrainerBaseline has no ViT"),
        ("-c 2d", "run nnUNetv2_train 901 2d 0"),
        ("--case nobody", "train_0, train_1, train_2 and 3 more): check --case"),
        ("-o features.jpg", "features.jpg must end with .png"),
        ("-o dataset.json/features.png", "choose another file with -o"),
        ("-o /dev/null/features.png", "choose another file with -o"),
        ("-d 902", "-d 902"),
    ],
)
def test_mistakes_get_one_sentence_and_leave_no_files(in_trained, refused, tmp_path, monkeypatch, changes, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    arguments = "-d 901 -p nearest -tr nnUNetTrainerViTScratch -o features.png".split()
    message = refused(features_command.main, *arguments, *changes.split())
    assert reason in message
    assert message.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["dataset.json"]


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_refused(in_trained, refused, tmp_path):
    fold = in_trained.results / "nnUNetTrainerViTScratch__nearest__3d_fullres" / "fold_0"
    other = in_trained.results / "nnUNetTrainerViTScratch__transposed__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    shutil.copy(other, fold / "other.pth")
    (fold / "half.pth").write_bytes(other.read_bytes()[:5000])
    (fold / "empty.pth").touch()
    arguments = "-d 901 -p nearest -tr nnUNetTrainerViTScratch -chk"
    reasons = {"other.pth": "is damaged or does not fit", "half.pth": "cannot be read", "empty.pth": "cannot be read"}
    for name, reason in reasons.items():
        message = refused(features_command.main, *arguments.split(), name, "-o", str(tmp_path / "features.png"))
        assert f"{name} {reason}" in message


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [(6, 8, 10), (10, 40, 12)])
def test_a_patch_lies_around_the_foreground_and_zeros_follow_a_small_case(in_trained, patch_size):
    plan = load_plan(find_dataset("901"), "nearest", "3d_fullres")
    plan.plans.plans["configurations"]["3d_fullres"]["patch_size"] = list(patch_size)
    patch = read_patch(plan, "train_3")
    volume, label = (blosc2.open(str(plan.preprocessed_folder / f"train_3{end}.b2nd"))[:] for end in ("", "_seg"))
    places = np.argwhere(label[0] == 1)
    middle = places[np.square(places - places.mean(axis=0)).sum(axis=1).argmin()]
    starts = [
        min(max(0, m - size // 2), max(0, side - size))
        for m, size, side in zip(middle, patch_size, label.shape[1:], strict=True)
    ]
    expected = volume[:, *(slice(start, start + size) for start, size in zip(starts, patch_size, strict=True))]
    assert tuple(patch.image.shape) == (2, *patch_size)
    z, y, x = expected.shape[1:]
    assert np.array_equal(patch.image[:, :z, :y, :x].numpy(), expected)
    assert not patch.image[:, :, y:].any()
    assert label[0, starts[0] + patch.z].any()


@pytest.mark.slow
def test_tokens_of_one_voxel_have_a_picture_and_no_numbers(in_trained, tmp_path, capsys):
    """The results of a network without any upsampling: its plans and an untrained checkpoint are enough."""
    source = in_trained.results / "nnUNetTrainerViTScratch__nearest__3d_fullres"
    folder = in_trained.results / "nnUNetTrainerViTScratch__voxels__3d_fullres"
    (folder / "fold_all").mkdir(parents=True)
    shutil.copy(source / "dataset.json", folder)
    plans = json.loads((source / "plans.json").read_text()) | {"plans_name": "voxels"}
    configuration = plans["configurations"]["3d_fullres"]
    configuration["vit_mae"]["network"] |= {"token": [1, 1, 1]}
    configuration["patch_size"] = [4, 6, 8]
    (folder / "plans.json").write_text(json.dumps(plans))
    torch.manual_seed(0)
    network = build_segmenter(Network(size="XS", token=(1, 1, 1)), 2, 2, drop_path=0.0)
    torch.save({"network_weights": network.state_dict()}, folder / "fold_all" / "checkpoint_final.pth")
    arguments = "-d 901 -p voxels -tr nnUNetTrainerViTScratch -f all -o".split()
    features_command.main([*arguments, str(tmp_path / "voxels.png")])
    assert (tmp_path / "voxels.csv").read_text().count("\n") == 1
    assert "voxels  " not in capsys.readouterr().out
    assert (tmp_path / "voxels.png").is_file()
