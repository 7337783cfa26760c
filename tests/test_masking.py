"""Test which tokens are visible, hidden and rebuilt, with and without background tokens, token by token."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import random_volume, seeded
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.networks.masking import (
    BACKGROUND_DEVIATION,
    Masking,
    Masks,
    background_tokens,
    count_rebuilt,
    take,
)
from nnunet_vit_mae.settings import count_visible

B, C = 3, 2
TOKEN = (2, 4, 8)
SHAPE = (5, 11, 27)  # the last tokens along z, y and x hold 1, 3 and 3 layers of the volume
GRID = (3, 3, 4)
TOKENS = math.prod(GRID)

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 999)
ratios = st.floats(0.05, 0.95)
shares = st.floats(0, 1, exclude_min=True)
contents = st.lists(st.sets(st.integers(0, TOKENS - 1)), min_size=B, max_size=B)


def voxels_of(token: int) -> tuple[slice, ...]:
    """Return where a token lies in the volume."""
    place = np.unravel_index(token, GRID)
    return tuple(slice(i * side, (i + 1) * side) for i, side in zip(place, TOKEN, strict=True))


def volume_with(content: list[set[int]], seed: int = 0) -> torch.Tensor:
    """Return constant samples, far from zero, with noise in one channel of some tokens."""
    volume = torch.full((len(content), C, *SHAPE), -3.5)
    for sample, tokens in enumerate(content):
        for token in tokens:
            part = volume[(sample, token % C, *voxels_of(token))]
            part += torch.randn(part.shape, generator=seeded(seed + token))
    return volume


def varying(tokens: set[int]) -> set[int]:
    """Return the tokens with at least two voxels inside the volume: a single voxel cannot vary."""
    return {token for token in tokens if torch.zeros(SHAPE)[voxels_of(token)].numel() > 1}


def noise_for(samples: int = B, seed: int = 0) -> torch.Tensor:
    return torch.rand(samples, TOKENS, generator=seeded(seed + 1000))


# ---------- where all tokens take part


@few
@given(b=st.integers(2, 4), n=st.integers(1, 60), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_each_token_is_either_visible_or_hidden(b, n, ratio, seed):
    visible, hidden, counted = Masking(mask_ratio=ratio).draw(torch.rand(b, n, generator=seeded(seed)))
    for v, h in zip(visible.tolist(), hidden.tolist(), strict=True):
        assert sorted(v + h) == list(range(n))
    assert counted.shape == hidden.shape
    assert counted.all()


@few
@given(n=st.integers(1, 5000), ratio=st.floats(0.01, 0.99))
def test_the_visible_tokens_are_the_rounded_share_and_at_least_one(n, ratio):
    visible, hidden, _ = Masking(mask_ratio=ratio).draw(torch.rand(2, n, generator=seeded()))
    assert visible.shape[1] == max(1, round(n * (1 - ratio))) == n - hidden.shape[1]


@pytest.mark.parametrize(("n", "ratio", "visible"), [(1000, 0.9, 100), (512, 0.9, 51), (36, 0.75, 9), (3, 0.9, 1)])
def test_known_numbers_of_visible_tokens(n, ratio, visible):
    assert count_visible(n, ratio) == visible


@few
@given(n=st.integers(2, 40), ratio=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_the_tokens_with_the_lowest_noise_stay_visible(n, ratio, seed):
    noise = torch.rand(3, n, generator=seeded(seed))
    visible, hidden, _ = Masking(mask_ratio=ratio).draw(noise)
    if hidden.shape[1]:
        assert (take(noise, visible).amax(1) <= take(noise, hidden).amin(1)).all()


@few
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_a_mask_depends_on_the_noise_of_its_own_sample_only(order, seed):
    noise = torch.rand(4, 31, generator=seeded(seed))
    taking_part, masking = torch.rand(noise.shape, generator=seeded(seed + 1)) < 0.8, Masking(mask_ratio=0.7)
    for choice in (None, taking_part):
        straight = masking.draw(noise, choice)
        permuted = masking.draw(noise[order], None if choice is None else choice[order])
        assert all(torch.equal(s[order], p) for s, p in zip(straight, permuted, strict=True))


@few
@given(b=st.integers(2, 4), n=st.integers(1, 9), k=st.integers(0, 9), rest=st.lists(st.integers(1, 3), max_size=2))
def test_take_equals_a_loop(b, n, k, rest):
    values = random_volume(b, n, *rest)
    index = torch.randint(n, (b, k), generator=seeded())
    expected = torch.empty(b, k, *rest)
    for sample, place in itertools.product(range(b), range(k)):
        expected[sample, place] = values[sample, index[sample, place]]
    assert torch.equal(take(values, index), expected)


# ---------- background tokens


@few
@given(content=contents)
def test_a_token_has_content_when_any_channel_varies_inside_the_volume(content):
    background = background_tokens(volume_with(content), TOKEN)
    for sample, token in itertools.product(range(B), range(TOKENS)):
        assert background[sample, token].item() == (token not in varying(content[sample]))


@pytest.mark.parametrize(
    ("deviation", "expected"), [(0.0, True), (0.9 * BACKGROUND_DEVIATION, True), (1.1 * BACKGROUND_DEVIATION, False)]
)
@pytest.mark.parametrize("level", [0.0, 3.0, -20.0])
def test_ripples_below_the_threshold_are_background(deviation, expected, level):
    pattern = torch.tensor([-1.0, 1.0]).repeat(32) * math.sqrt(63 / 64)  # unbiased variance 1
    volume = torch.full((1, C, *TOKEN), level)
    volume[0, 1] += deviation * pattern.reshape(TOKEN)
    assert background_tokens(volume, TOKEN).tolist() == [[expected]]


# ---------- which tokens take part


def draw(content: list[set[int]], ratio: float, noise: torch.Tensor) -> Masks:
    """Draw masks for which only the given tokens of each sample take part."""
    taking_part = torch.zeros(len(content), TOKENS, dtype=torch.bool)
    for sample, tokens in enumerate(content):
        taking_part[sample, sorted(tokens)] = True
    return Masking(mask_ratio=ratio).draw(noise, taking_part)


def expected_split(tokens: set[int], ratio: float, noise: list[float]) -> tuple[list[int], list[int]]:
    """Return the visible and the hidden ones of the tokens that take part in a sample."""
    order = sorted(tokens, key=lambda token: noise[token])
    visible = count_visible(len(tokens), ratio)
    return order[:visible], order[visible:]


@few
@given(tokens=st.sets(st.integers(0, TOKENS - 1), min_size=1), ratio=ratios, seed=seeds)
def test_a_sample_alone_goes_on_with_exactly_the_tokens_that_take_part(tokens, ratio, seed):
    noise = noise_for(1, seed)
    masks = draw([tokens], ratio, noise)
    visible, hidden = expected_split(tokens, ratio, noise[0].tolist())
    assert masks.visible.tolist() == [visible]
    assert masks.hidden.tolist() == [hidden]
    assert masks.counted.all()


@few
@given(content=contents, ratio=ratios, seed=seeds)
def test_samples_have_as_many_tokens_as_the_average_one(content, ratio, seed):
    masks = draw(content, ratio, noise_for(seed=seed))
    visible = [count_visible(len(tokens), ratio) for tokens in content]
    hidden = [max(0, len(tokens) - count) for tokens, count in zip(content, visible, strict=True)]
    assert masks.visible.shape == (B, round(sum(visible) / B))
    assert masks.hidden.shape == masks.counted.shape == (B, round(sum(hidden) / B))


@few
@given(content=contents, ratio=ratios, seed=seeds)
def test_a_sample_uses_its_own_tokens_in_the_order_of_their_noise_and_repeats_them_where_it_has_fewer(
    content, ratio, seed
):
    noise = noise_for(seed=seed)
    masks = draw(content, ratio, noise)
    for sample, tokens in enumerate(content):
        own = expected_split(tokens, ratio, noise[sample].tolist())
        for indices, expected in zip((masks.visible[sample], masks.hidden[sample]), own, strict=True):
            if expected:
                assert indices.tolist() == list(itertools.islice(itertools.cycle(expected), len(indices)))
        if own[1]:
            assert not {*masks.visible[sample].tolist()} & {*masks.hidden[sample].tolist()}


@few
@given(content=contents, ratio=ratios, seed=seeds)
def test_each_hidden_token_of_a_sample_counts_once_and_nothing_else_counts(content, ratio, seed):
    noise = noise_for(seed=seed)
    masks = draw(content, ratio, noise)
    for sample, tokens in enumerate(content):
        counted = masks.hidden[sample][masks.counted[sample]].tolist()
        _, hidden = expected_split(tokens, ratio, noise[sample].tolist())
        assert counted == hidden[: masks.hidden.shape[1]]


@few
@given(others=st.lists(st.sets(st.integers(0, TOKENS - 1), min_size=9), min_size=B, max_size=B), seed=seeds)
def test_a_sample_without_tokens_counts_nothing_and_does_not_enlarge_the_others(others, seed):
    masks = draw([set(), *others], 0.5, noise_for(1 + B, seed))
    assert not masks.counted[0].any()
    assert masks.counted[1:].any(dim=1).all()
    assert masks.hidden.shape[1] <= max(map(len, others)) // 2 + 1


@few
@given(ratio=ratios, seed=seeds, tokens=st.integers(1, TOKENS))
def test_where_every_token_takes_part_the_masks_are_those_without_a_choice(ratio, seed, tokens):
    noise, masking = noise_for(seed=seed)[:, :tokens], Masking(mask_ratio=ratio)
    plain, other = masking.draw(noise), masking.draw(noise, torch.ones_like(noise, dtype=torch.bool))
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("taking_part", [None, torch.ones(B, TOKENS, dtype=torch.bool)])
def test_masks_have_no_gaps_in_memory_for_which_a_gpu_would_be_waited_for(taking_part):
    masks = Masking(mask_ratio=0.7).draw(noise_for(), taking_part)
    assert all(part.is_contiguous() for part in masks)


def test_shares_are_rounded_alike_with_and_without_a_choice():
    noise = noise_for()[:, :15]
    taking_part = torch.ones_like(noise, dtype=torch.bool)
    assert Masking(mask_ratio=0.9).draw(noise, taking_part).visible.shape[1] == count_visible(15, 0.9) == 1


# ---------- which of the hidden ones are rebuilt


@given(hidden=st.integers(0, 5000), share=shares)
def test_the_rebuilt_tokens_are_the_rounded_share_and_at_least_one_if_there_is_one(hidden, share):
    assert count_rebuilt(hidden, share) == (max(1, round(hidden * share)) if hidden else 0)
    assert count_rebuilt(hidden, 1.0) == hidden


@few
@given(hidden=st.integers(0, 40), share=shares, seed=seeds)
def test_all_rounds_together_rebuild_every_hidden_token_once(hidden, share, seed):
    index = torch.rand(B, hidden, generator=seeded(seed)).argsort(dim=1)
    counted = torch.rand(B, hidden, generator=seeded(seed + 1)) < 0.5
    masks = Masks(torch.arange(B)[:, None], index, counted)
    rounds = Masking(mask_ratio=0.5, rebuilt_share=share).rounds(masks)
    assert rounds[0].hidden.shape == (B, count_rebuilt(hidden, share))
    assert all(part.hidden.shape[1] <= rounds[0].hidden.shape[1] for part in rounds)
    assert all(torch.equal(part.visible, masks.visible) for part in rounds)
    assert torch.equal(torch.cat([part.hidden for part in rounds], dim=1), index)
    assert torch.equal(torch.cat([part.counted for part in rounds], dim=1), counted)


def test_another_quarter_is_rebuilt_at_each_step():
    masking, rebuilt = Masking(mask_ratio=0.75, rebuilt_share=0.25), []
    for seed in range(40):
        rebuilt.append(set(masking.rounds(masking.draw(noise_for(1, seed)))[0].hidden[0].tolist()))
    assert set.union(*rebuilt) == set(range(TOKENS))
    assert {len(tokens) for tokens in rebuilt} == {7}
