"""Positions and blocks: attention sees distances, and places travel with their tokens."""

import math

import pytest
import torch
from conftest import random_volume
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.positions import (
    Positions,
    forget_positions,
    rotary_positions,
    rotated,
    sine_cosine_positions,
)
from nnunet_vit_mae.networks.transformer import Attention, GatedMLP, Transformer, plain_mlp
from nnunet_vit_mae.presets import BLOCKS, POSITIONS
from nnunet_vit_mae.settings import Network, Pretraining, token_grid

CPU = torch.device("cpu")
GRID = (3, 4, 5)
ONE = (1.0, 1.0, 1.0)
few = settings(max_examples=15, deadline=None)


def index(z: int, y: int, x: int) -> int:
    return (z * GRID[1] + y) * GRID[2] + x


places = st.tuples(*(st.integers(0, side - 1) for side in GRID))
grids = st.tuples(*[st.integers(1, 7)] * 3)


# ---------- sine-cosine positions


@few
@given(grid=grids, width=st.integers(1, 40))
def test_positions_have_a_row_per_token_and_the_width(grid, width):
    assert sine_cosine_positions(grid, width, CPU).shape == (math.prod(grid), width)


@few
@given(grid=grids, other=grids, width=st.integers(6, 40))
def test_a_place_has_the_same_position_in_every_grid(grid, other, width):
    shared = tuple(map(min, grid, other))
    first, second = (
        sine_cosine_positions(g, width, CPU).reshape(*g, width)[: shared[0], : shared[1], : shared[2]]
        for g in (grid, other)
    )
    assert torch.allclose(first, second, rtol=0, atol=1e-6)


@few
@given(grid=grids, width=st.integers(6, 40))
def test_all_positions_of_a_grid_differ(grid, width):
    positions = sine_cosine_positions(grid, width, CPU)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert distances.min() > 0.1


def test_positions_are_sines_and_cosines_of_z_then_y_then_x():
    positions = sine_cosine_positions((3, 4, 5), 14, CPU).reshape(3, 4, 5, 14)
    expected = []
    for place in (2, 1, 4):  # z y x; two frequencies: 1 and 10000 ** -0.5
        expected += [math.sin(place), math.sin(place / 100), math.cos(place), math.cos(place / 100)]
    assert positions[2, 1, 4].tolist() == pytest.approx([*expected, 0, 0], abs=1e-6)


@few
@given(width=st.integers(6, 40))
def test_what_six_does_not_divide_of_the_width_stays_zero(width):
    positions = sine_cosine_positions((2, 3, 4), width, CPU)
    used = width // 6 * 6
    assert not positions[:, used:].any()
    assert positions[:, :used].any(dim=0).all()


def test_positions_first_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        positions = sine_cosine_positions((3, 1, 11), 13, CPU)  # a grid that no other test has
    weight = torch.ones(13, requires_grad=True)
    (positions * weight).sum().backward()
    assert not positions.is_inference()
    assert torch.equal(weight.grad, positions.sum(0))


def test_a_training_step_leaves_the_cached_positions_as_they_were():
    network = build_segmenter(Network(size="XS", token=(2, 4, 8), decoder="mae"), 2, 3, drop_path=0.0)
    before = [sine_cosine_positions((4, 2, 3), width, CPU).clone() for width in (96, 48)]
    network(random_volume(2, 2, 7, 5, 17)).sum().backward()
    after = [sine_cosine_positions((4, 2, 3), width, CPU) for width in (96, 48)]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


# ---------- rotary positions


@few
@given(places, places, st.data(), st.integers(0, 999))
def test_rotary_scores_depend_on_the_distance_of_two_tokens_alone(first, second, data, seed):
    """Both tokens moved by the same shift have the same score, along unequal axes."""
    ends = [(min(pair), side - 1 - max(pair)) for *pair, side in zip(first, second, GRID, strict=True)]
    shift = [data.draw(st.integers(-before, behind)) for before, behind in ends]
    moved = [tuple(a + b for a, b in zip(place, shift, strict=True)) for place in (first, second)]
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 1, 1, 1, 26, generator=generator)
    table = rotary_positions(GRID, 26, CPU, ONE, 100.0)

    def score(one: tuple[int, int, int], other: tuple[int, int, int]) -> torch.Tensor:
        a, b = (rotated(x, table[index(*place)][None], turned=1) for x, place in ((query, one), (key, other)))
        return (a * b).sum()

    torch.testing.assert_close(score(first, second), score(*moved), atol=1e-4, rtol=1e-4)


def test_rotation_keeps_lengths_and_leaves_the_rest_alone():
    heads = torch.randn(3, 2, 2, math.prod(GRID), 26)
    table = rotary_positions(GRID, 26, CPU, ONE, 100.0)
    turned = rotated(heads, table, turned=2, padding=6)
    assert table.shape == (math.prod(GRID), 2, 12)
    torch.testing.assert_close(turned[..., :26].norm(dim=-1), heads.norm(dim=-1))
    torch.testing.assert_close(turned[..., 24:26], heads[..., 24:])
    assert not turned[..., 26:].any()
    torch.testing.assert_close(turned[2, ..., :26], heads[2])  # values have no place
    torch.testing.assert_close(turned[..., 0, :26], heads[..., 0, :])  # the token at the origin is not turned
    assert (turned[:2, ..., 1:, :26] - heads[:2, ..., 1:, :]).abs().amax(dim=(0, 1, 2, 4)).min() > 1e-3


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one table", "a table for each sample"])
def test_the_gradient_of_a_rotation_is_that_of_its_formula(padding, batch):
    """Against differences of the rotation itself."""
    torch.manual_seed(0)
    heads = torch.randn(3, 2, 2, 3, 7, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(*batch, 3, 2, dtype=torch.float64)
    rotation = torch.stack([angles.cos(), angles.sin()], dim=-2)
    assert torch.autograd.gradcheck(lambda x: rotated(x, rotation, turned=2, padding=padding), heads)


def test_a_step_in_mm_scales_all_axes_of_the_coordinates():
    """A token of thick slices is as far from its neighbour as two thin ones are apart."""
    thin, thick = (Positions("rotary", step).places((4, 3, 3), 24, 24, CPU).rotation for step in (ONE, (2.0, 1.0, 1.0)))
    torch.testing.assert_close(thick[9], thin[18])  # the second token along z, and the third
    blueprint = Network(size="XS", token=(4, 8, 8), decoder="mae", position_unit="mm")
    networks = [
        build_segmenter(blueprint, 1, 2, drop_path=0.0, spacing=spacing)
        for spacing in ((1.0, 1.0, 1.0), (3.0, 0.5, 0.5))
    ]
    steps = [network.encoder.positions.step for network in networks]
    assert steps == [(0.5, 1.0, 1.0), (1.5, 0.5, 0.5)]


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_are_in_no_state_dict(kind):
    network = Network(size="XS", token=(4, 8, 8), positions=kind)
    autoencoder = build_autoencoder(network, 2, Pretraining())
    assert set(autoencoder.state_dict()) == {name for name, _ in autoencoder.named_parameters()}
    assert not any("position" in name or "rot" in name for name in autoencoder.state_dict())
    assert set(autoencoder.state_dict()) == set(
        build_autoencoder(Network(token=(4, 8, 8), size="XS"), 2, Pretraining()).state_dict()
    )


@pytest.mark.parametrize("kind", ["rotary", "both"])
def test_attention_alone_tells_tokens_apart(kind):
    """Equal tokens, nothing added: with rotary positions their outputs differ by place, without they cannot."""
    torch.manual_seed(0)
    attention, tokens = Attention(24, 2), torch.randn(1, 1, 24).expand(1, math.prod(GRID), 24).clone()
    tokens[:, 0] += 1  # something to look at
    table = Positions(kind).places(GRID, 24, 12, CPU).rotation
    turned, plain = attention(tokens, table)[0, 1:], attention(tokens)[0, 1:]
    assert turned.std(dim=0).max() > 1e-5
    assert plain.std(dim=0).max() < 1e-5


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("cross", [False, True])
def test_a_subset_in_another_order_gives_the_same_tokens(blocks, cross):
    """Attention has no order of its own: places travel with their tokens."""
    torch.manual_seed(1)
    transformer = Transformer(36, 2, 3, blocks=blocks).eval()
    everywhere = Positions("both").places(GRID, 36, 12, CPU)
    chosen = torch.randperm(math.prod(GRID))[:9]
    tokens = torch.randn(1, 9, 36)
    order = torch.randperm(9)
    context = torch.randn(1, 5, 36) if cross else None
    rotation_of_context = everywhere.at(torch.arange(5)).rotation if cross else None
    outputs = [
        transformer(tokens[:, o], everywhere.at(chosen[o]).rotation, context, rotation_of_context)
        for o in (torch.arange(9), order)
    ]
    torch.testing.assert_close(outputs[0][:, order], outputs[1], atol=1e-5, rtol=1e-4)


def test_batches_with_places_of_their_own_equal_one_sample_at_a_time():
    torch.manual_seed(2)
    network = build_autoencoder(Network(size="XS", token=(4, 8, 8)), 2, Pretraining()).eval()
    volume = torch.randn(3, 2, 9, 20, 27)
    tokens = math.prod(token_grid(volume.shape[2:], (4, 8, 8)))
    masks = Masking(mask_ratio=0.6).draw(torch.rand(3, tokens))
    together = network(volume, masks).patches
    alone = [network(volume[i : i + 1], type(masks)(*(part[i : i + 1] for part in masks))).patches for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_rotary_positions_are_cached_and_forgotten():
    first = rotary_positions(GRID, 24, CPU, ONE, 100.0)
    assert rotary_positions(GRID, 24, CPU, ONE, 100.0) is first
    forget_positions()
    assert rotary_positions(GRID, 24, CPU, ONE, 100.0) is not first


def test_modern_blocks_start_near_the_identity_and_have_as_many_weights():
    tokens = torch.randn(2, 7, 96)
    vit, modern = (Transformer(96, 4, 6, blocks=kind) for kind in ("vit", "modern"))
    moved = [(block(tokens) - tokens).norm() for block in (vit.blocks[0], modern.blocks[0])]
    assert moved[1] < 0.3 * moved[0]
    sizes = [sum(p.numel() for p in mlp.parameters()) for mlp in (plain_mlp(96), GatedMLP(96))]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_weight_learns(kind, blocks):
    torch.manual_seed(0)
    network = Network(size="XS", token=(4, 8, 8), decoder="mae", positions=kind, blocks=blocks)
    segmenter = build_segmenter(network, 2, 3, drop_path=0.0)
    segmenter(torch.randn(2, 2, 9, 20, 27)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in segmenter.parameters())
