"""Default settings for patches and spacings as nnU-Net plans them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.planning import TOKEN_BUDGET, default_decoder, default_settings, default_token, token_grid
from nnunet_vit_mae.presets import TOKEN_SIDES

patches = st.tuples(*[st.integers(1, 320)] * 3)
spacings = st.tuples(*[st.integers(10, 2000).map(lambda n: n / 100)] * 3)
budgets = st.integers(1, 20_000)
tokens = st.tuples(*[st.sampled_from(TOKEN_SIDES)] * 3)


def expected_token(side: int, spacing: tuple[float, ...]) -> tuple[int, ...]:
    """The rule in words: halve a side as long as the axis stays at least twice as coarse; stop at two voxels."""
    token = []
    for mm in spacing:
        thickness, axis_side = mm / min(spacing), side
        while thickness >= 2 and axis_side > 2:
            thickness, axis_side = thickness / 2, axis_side // 2
        token.append(axis_side)
    return tuple(token)


def candidates(spacing: tuple[float, ...]) -> list[tuple[int, ...]]:
    return [expected_token(side, spacing) for side in (4, 8, 16)]


def tokens_needed(patch: tuple[int, ...], token: tuple[int, ...]) -> int:
    return math.prod(len(range(0, voxels, side)) for voxels, side in zip(patch, token, strict=True))


# ---------- tokens


@given(patch=patches, spacing=spacings, budget=budgets)
def test_the_token_is_the_smallest_within_the_budget_and_else_the_largest(patch, spacing, budget):
    within = [token for token in candidates(spacing) if tokens_needed(patch, token) <= budget]
    assert default_token(patch, spacing, budget) == (within[0] if within else candidates(spacing)[-1])


@given(patch=patches, spacing=spacings)
def test_the_budget_is_kept_whenever_it_can_be(patch, spacing):
    if any(tokens_needed(patch, token) <= TOKEN_BUDGET for token in candidates(spacing)):
        assert tokens_needed(patch, default_token(patch, spacing)) <= TOKEN_BUDGET


@given(patch=patches, spacing=spacings, factor=st.sampled_from([0.25, 0.5, 2, 64]))
def test_the_token_depends_on_the_ratios_of_the_spacing_only(patch, spacing, factor):
    assert default_token(patch, spacing) == default_token(patch, tuple(factor * mm for mm in spacing))


@given(patch=patches, spacing=spacings, order=st.permutations(range(3)))
def test_the_token_turns_with_the_axes(patch, spacing, order):
    turned = default_token(tuple(patch[i] for i in order), tuple(spacing[i] for i in order))
    assert turned == tuple(default_token(patch, spacing)[i] for i in order)


@pytest.mark.parametrize(
    ("patch", "spacing", "token"),
    [
        ((28, 64, 72), (3, 1, 1), (2, 4, 4)),  # 14 x 16 x 18 = 4032 tokens
        ((28, 64, 76), (3, 1, 1), (4, 8, 8)),  # 4256 tokens of 2 x 4 x 4 would be too many
        ((48, 160, 224), (3, 1, 1), (8, 16, 16)),
        ((64, 64, 64), (1, 1, 1), (4, 4, 4)),
        ((128, 128, 128), (1, 1, 1), (8, 8, 8)),
        ((96, 160, 176), (1, 0.7, 0.7), (16, 16, 16)),
        ((40, 64, 100), (2, 1, 4), (4, 8, 2)),
        ((16, 96, 128), (12, 1, 1), (2, 8, 8)),
        ((512, 512, 512), (1, 1, 1), (16, 16, 16)),  # nothing fits: the largest
    ],
)
def test_known_tokens(patch, spacing, token):
    assert default_token(patch, spacing) == token


@given(patch=patches, token=tokens)
def test_the_grid_covers_the_patch_without_a_token_to_spare(patch, token):
    for n, voxels, side in zip(token_grid(patch, token), patch, token, strict=True):
        assert (n - 1) * side < voxels <= n * side


# ---------- settings


@given(patch=patches, spacing=spacings, batch=st.integers(1, 64))
def test_default_settings_hold_the_default_token_and_its_decoder(patch, spacing, batch):
    network = default_settings(patch, spacing, batch).network
    assert network.token == default_token(patch, spacing)
    assert network.decoder == default_decoder(network.token)


@pytest.mark.parametrize(("unet", "vit"), [(2, 4), (4, 4), (11, 11)])
def test_the_batch_is_at_least_nnunets_own_and_at_least_the_default(unet, vit):
    assert default_settings([32, 64, 80], [1, 1, 1], unet).finetuning.batch_size == vit


@pytest.mark.parametrize(
    ("token", "decoder"), [((4, 4, 4), "mae"), ((2, 4, 4), "mae"), ((2, 4, 8), "upscale"), ((8, 8, 8), "upscale")]
)
def test_small_tokens_go_with_the_mae_decoder(token, decoder):
    assert default_decoder(token) == decoder


def test_a_2d_patch_is_refused_and_a_3d_configuration_suggested():
    with pytest.raises(UserError, match=r"2D patch \[512, 448\].*3d_fullres"):
        default_settings([512, 448], [0.7, 0.7], 12)
