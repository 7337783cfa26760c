"""Which tokens are seen and rebuilt, when only a share is or flat tokens are left out; worked out token by token."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.networks.masking import (
    BACKGROUND_DEVIATION,
    Masking,
    background_tokens,
    count_rebuilt,
    count_visible,
)

B, C = 3, 2
TOKEN = (2, 4, 8)
SHAPE = (5, 11, 27)  # the last tokens along z, y and x hold 1, 3 and 3 layers of the volume
GRID = (3, 3, 4)
TOKENS = math.prod(GRID)

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 999)
shares = st.floats(0, 1, exclude_min=True)
contents = st.lists(st.sets(st.integers(0, TOKENS - 1)), min_size=B, max_size=B)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voxels_of(token: int) -> tuple[slice, ...]:
    """Where a token lies in the volume."""
    place = np.unravel_index(token, GRID)
    return tuple(slice(i * side, (i + 1) * side) for i, side in zip(place, TOKEN, strict=True))


def volume_with(content: list[set[int]], seed: int = 0) -> torch.Tensor:
    """Samples that are flat but for noise in some tokens, each in one channel, far from zero."""
    volume = torch.full((len(content), C, *SHAPE), -3.5)
    for sample, tokens in enumerate(content):
        for token in tokens:
            part = volume[(sample, token % C, *voxels_of(token))]
            part += torch.randn(part.shape, generator=seeded(seed + token))
    return volume


def varying(tokens: set[int]) -> set[int]:
    """Tokens with at least two voxels inside the volume: a single one cannot vary."""
    return {token for token in tokens if torch.zeros(SHAPE)[voxels_of(token)].numel() > 1}


def noise_for(samples: int = B, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, TOKENS, generator=seeded(seed + 1000))


# ---------- flat tokens


@few
@given(content=contents)
def test_a_token_has_content_when_any_channel_varies_inside_the_volume(content):
    flat = background_tokens(volume_with(content), TOKEN)
    for sample, token in itertools.product(range(B), range(TOKENS)):
        assert flat[sample, token].item() == (token not in varying(content[sample]))


@pytest.mark.parametrize(
    ("deviation", "expected"), [(0.0, True), (0.9 * BACKGROUND_DEVIATION, True), (1.1 * BACKGROUND_DEVIATION, False)]
)
@pytest.mark.parametrize("level", [0.0, 3.0, -20.0])
def test_ripples_below_the_threshold_are_flat(deviation, expected, level):
    pattern = torch.tensor([-1.0, 1.0]).repeat(32) * math.sqrt(63 / 64)  # unbiased variance 1
    volume = torch.full((1, C, *TOKEN), level)
    volume[0, 1] += deviation * pattern.reshape(TOKEN)
    assert background_tokens(volume, TOKEN).tolist() == [[expected]]


# ---------- which tokens take part


@few
@given(content=contents, ratio=st.floats(0.05, 0.95), seed=seeds)
def test_a_sample_alone_goes_on_with_exactly_its_tokens_with_content(content, ratio, seed):
    masking = Masking(mask_ratio=ratio, skip_background=True)
    tokens = varying(content[0])
    visible, hidden = masking.split(volume_with(content[:1]), TOKEN, noise_for(1, seed))
    assert visible.shape == (1, count_visible(max(1, len(tokens)), ratio))
    chosen = visible[0].tolist() + hidden[0].tolist()
    assert sorted(chosen) == sorted(tokens or {0})  # a volume of nothing but air keeps a token, for shapes' sake


@few
@given(content=contents, ratio=st.floats(0.05, 0.95), seed=seeds)
def test_a_batch_goes_on_with_the_content_of_its_average_sample(content, ratio, seed):
    noise = noise_for(seed=seed)
    own = [varying(tokens) for tokens in content]
    count = max(1, round(sum(map(len, own)) / B))
    visible, hidden = Masking(mask_ratio=ratio, skip_background=True).split(volume_with(content), TOKEN, noise)
    assert visible.shape == (B, count_visible(count, ratio))
    assert hidden.shape == (B, count - visible.shape[1])
    for sample, tokens in enumerate(own):
        v, h = visible[sample].tolist(), hidden[sample].tolist()
        assert len({*v, *h}) == count
        assert len(tokens & {*v, *h}) == min(count, len(tokens))
        level = noise[sample].tolist()
        assert not h or max(level[token] for token in v) <= min(level[token] for token in h)


@few
@given(ratio=st.floats(0.05, 0.95), seed=seeds)
def test_where_nothing_is_flat_leaving_flat_tokens_out_changes_nothing(ratio, seed):
    volume, noise = torch.randn(B, C, 4, 8, 24, generator=seeded(seed)), noise_for(seed=seed)[:, :12]
    plain, other = (
        Masking(mask_ratio=ratio, skip_background=skip).split(volume, TOKEN, noise) for skip in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


# ---------- which of the hidden ones are rebuilt


@given(hidden=st.integers(0, 5000), share=shares)
def test_the_rebuilt_tokens_are_the_rounded_share_and_at_least_one_if_there_is_one(hidden, share):
    assert count_rebuilt(hidden, share) == (max(1, round(hidden * share)) if hidden else 0)
    assert count_rebuilt(hidden, 1.0) == hidden


@few
@given(hidden=st.integers(0, 40), share=shares, seed=seeds)
def test_all_rounds_together_rebuild_every_hidden_token_once(hidden, share, seed):
    index = torch.rand(B, hidden, generator=seeded(seed)).argsort(dim=1)
    masking = Masking(mask_ratio=0.5, rebuilt_share=share)
    (first,), rounds = (masking.rounds(index, everything=everything) for everything in (False, True))
    assert torch.equal(rounds[0], first)
    assert first.shape == (B, count_rebuilt(hidden, share))
    assert all(part.shape[1] <= first.shape[1] for part in rounds)
    assert torch.equal(torch.cat(rounds, dim=1), index)


def test_another_quarter_is_rebuilt_at_each_step():
    masking, volume, rebuilt = Masking(mask_ratio=0.75, rebuilt_share=0.25), volume_with([{1}]), []
    for seed in range(40):
        _, hidden = masking.split(volume, TOKEN, noise_for(1, seed))
        rebuilt.append(set(masking.rounds(hidden, everything=False)[0][0].tolist()))
    assert set.union(*rebuilt) == set(range(TOKENS))
    assert {len(tokens) for tokens in rebuilt} == {7}
