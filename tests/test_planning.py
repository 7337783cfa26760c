"""Default settings for patches and spacings as nnU-Net plans them."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.planning import (
    SLACK,
    TOKEN_BUDGET,
    Memory,
    changed,
    default_settings,
    default_token,
    fit_to_memory,
    token_steps,
)
from nnunet_vit_mae.presets import DECODERS
from nnunet_vit_mae.recipes import read_recipe
from nnunet_vit_mae.settings import TOKEN_SIDES, Settings, token_grid
from nnunet_vit_mae.units import GIB, size_text

patches = st.tuples(*[st.integers(1, 320)] * 3)
spacings = st.tuples(*[st.integers(10, 2000).map(lambda n: n / 100)] * 3)
budgets = st.integers(1, 20_000)
tokens = st.tuples(*[st.sampled_from(TOKEN_SIDES)] * 3)


def tokens_needed(patch: tuple[int, ...], token: tuple[int, ...]) -> int:
    return math.prod(len(range(0, voxels, side)) for voxels, side in zip(patch, token, strict=True))


# ---------- tokens


@given(patch=patches, spacing=spacings)
def test_each_token_is_twice_the_one_before_it_along_one_axis(patch, spacing):
    steps = token_steps(patch, spacing)
    assert steps[0] == tuple(side_for(4, mm / min(spacing)) for mm in spacing)
    assert steps[-1] == tuple(side_for(16, mm / min(spacing)) for mm in spacing)
    for smaller, larger in itertools.pairwise(steps):
        assert sorted(b // a for a, b in zip(smaller, larger, strict=True)) == [1, 1, 2]


def side_for(side: int, thickness: float) -> int:
    """The rule in words: halve a side as long as the axis stays at least twice as coarse; stop at two voxels."""
    while thickness >= 2 and side > 2:
        thickness, side = thickness / 2, side // 2
    return side


@given(patch=patches, spacing=spacings)
def test_the_axis_that_grows_is_the_one_where_tokens_are_shortest(patch, spacing):
    steps = token_steps(patch, spacing)
    for smaller, larger in itertools.pairwise(steps):
        (axis,) = (axis for axis in range(3) if larger[axis] > smaller[axis])
        lengths = [side * mm for side, mm in zip(smaller, spacing, strict=True)]
        growing = [other for other in range(3) if smaller[other] < steps[-1][other]]
        assert lengths[axis] == min(lengths[other] for other in growing)


@given(patch=patches, spacing=spacings, budget=budgets)
def test_the_token_is_the_smallest_within_the_soft_budget_and_else_the_largest(patch, spacing, budget):
    steps = token_steps(patch, spacing)
    within = [token for token in steps if tokens_needed(patch, token) <= SLACK * budget]
    assert default_token(patch, spacing, budget) == (within[0] if within else steps[-1])


@given(patch=st.tuples(*[st.integers(48, 256)] * 3), spacing=spacings)
def test_no_patch_of_a_usual_plan_ends_with_few_tokens(patch, spacing):
    """Doubling one side halves the tokens at most, but for rounding at the border of the patch."""
    token = default_token(patch, spacing)
    steps = token_steps(patch, spacing)
    assert tokens_needed(patch, token) >= min(1500, tokens_needed(patch, steps[0]))


@given(patch=patches, spacing=spacings, factor=st.sampled_from([0.25, 0.5, 2, 64]))
def test_the_token_depends_on_the_ratios_of_the_spacing_only(patch, spacing, factor):
    assert default_token(patch, spacing) == default_token(patch, tuple(factor * mm for mm in spacing))


@given(patch=patches, spacing=spacings, order=st.permutations(range(3)))
def test_the_token_turns_with_the_axes_where_they_differ(patch, spacing, order):
    """Of axes that are alike in mm and in their number of tokens the last one grows first: only there order matters."""
    if len(set(spacing)) == 3 and len(set(patch)) == 3:
        steps, turned = (
            [math.prod(token) for token in token_steps(tuple(patch[i] for i in o), tuple(spacing[i] for i in o))]
            for o in (range(3), order)
        )
        assert steps == turned


@pytest.mark.parametrize(
    ("patch", "spacing", "token"),
    [
        ((28, 64, 72), (3, 1, 1), (2, 4, 4)),  # 14 x 16 x 18 = 4032 tokens
        ((28, 64, 76), (3, 1, 1), (2, 4, 4)),  # 4256 are within a quarter more than 4096
        ((48, 160, 224), (3, 1, 1), (4, 8, 16)),
        ((64, 64, 64), (1, 1, 1), (4, 4, 4)),
        ((128, 128, 128), (1, 1, 1), (8, 8, 8)),
        ((112, 160, 128), (1, 1, 1), (8, 8, 8)),  # 4480 tokens
        ((96, 96, 96), (1, 1, 1), (4, 8, 8)),
        ((96, 160, 176), (1, 0.7, 0.7), (8, 8, 16)),
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


@given(patch=patches, spacing=spacings, batch=st.integers(1, 64), contrasts=st.none() | st.integers(1, 6))
def test_default_settings_hold_the_default_token_decoder_and_nnunets_batch(patch, spacing, batch, contrasts):
    settings = default_settings(patch, spacing, batch, contrasts=contrasts)
    decoder = ("cross", 0.25) if contrasts is None else ("self", 1.0)
    assert (settings.pretraining.decoder, settings.pretraining.rebuilt_share) == decoder
    assert settings.network.token == default_token(patch, spacing, TOKEN_BUDGET // (contrasts or 1))
    assert settings.network.decoder == ("unet" if contrasts is None else "unetr")
    assert settings.finetuning.batch_size == batch


def test_a_2d_patch_is_refused_and_a_3d_configuration_suggested():
    with pytest.raises(UserError, match=r"2D patch \[512, 448\].*3d_fullres"):
        default_settings([512, 448], [0.7, 0.7], 12)


# ---------- memory


@dataclasses.dataclass(frozen=True)
class Situation:
    """What `fit_to_memory` is asked, with an estimate that is linear in batch and number of tokens."""

    settings: Settings
    patch: tuple[int, ...]
    spacing: tuple[float, ...]
    fixed: frozenset[tuple[str, str]]
    estimate: Callable[[Settings], Memory]
    target: int

    def fitted(self) -> Settings | None:
        """None where nothing fits."""
        given = {"fixed": self.fixed, "target": self.target, "estimate": self.estimate}
        try:
            return fit_to_memory(self.settings, self.patch, self.spacing, **given)
        except UserError:
            return None

    def fits(self, chosen: Settings) -> bool:
        memory = self.estimate(chosen)
        return max(memory.finetuning, memory.pretraining) <= self.target

    def smallest(self, token: tuple[int, ...]) -> Settings:
        """With the smallest batches that are allowed, at a token."""
        small = {
            section: {"batch_size": 2}
            for section in ("finetuning", "pretraining")
            if (section, "batch_size") not in self.fixed
        }
        return self.settings.updated({"network": {"token": token, "taps": ()}}).updated(small)


def linear(patch: tuple[int, ...], per_token: tuple[int, int], weights: int) -> Callable[[Settings], Memory]:
    def estimate(settings: Settings) -> Memory:
        grid = tokens_needed(patch, settings.network.token)
        batches = settings.finetuning.batch_size, settings.pretraining.batch_size
        return Memory(*(weights + grid * batch * cost for batch, cost in zip(batches, per_token, strict=True)))

    return estimate


def batches_of(settings: Settings) -> tuple[int, int]:
    return settings.finetuning.batch_size, settings.pretraining.batch_size


# thick slices; grids of 4032, 2016, 1008, 504, 280, 140 and 80 tokens
PATCH, SPACING = (28, 64, 72), (3.0, 1.0, 1.0)


def planned(changes: dict | None = None) -> Settings:
    """Token (2, 4, 4), batches of 4 and 16."""
    return default_settings(PATCH, SPACING, 2).updated(changes or {})


SHARES = st.sampled_from([10 ** (tenths / 10) for tenths in range(-25, 3)])  # of what the defaults need
POWERS = st.sampled_from([2, 4, 8, 16, 32])
CAN_BE_FIXED = [
    ("network", "token"),
    ("finetuning", "batch_size"),
    ("pretraining", "batch_size"),
]


@st.composite
def situations(draw, batches=POWERS) -> Situation:
    patch, spacing = draw(st.tuples(*[st.integers(16, 100)] * 3)), draw(spacings)
    settings = default_settings(patch, spacing, 2).updated(
        {
            "network": {"decoder": draw(st.sampled_from(sorted(DECODERS)))},
            "finetuning": {"batch_size": draw(batches)},
            "pretraining": {"batch_size": draw(batches)},
        }
    )
    fixed = draw(st.frozensets(st.sampled_from(CAN_BE_FIXED), max_size=2))
    cost = st.integers(1, 9)
    estimate = linear(patch, (draw(cost), draw(cost)), draw(st.integers(0, 100)))
    needed = estimate(settings)
    target = int(max(needed.finetuning, needed.pretraining) * draw(SHARES))
    return Situation(settings, patch, spacing, fixed, estimate, target)


@given(situation=situations())
def test_what_is_chosen_fits_the_memory(situation):
    chosen = situation.fitted()
    assert chosen is None or situation.fits(chosen)


@given(situation=situations())
def test_settings_that_fit_stay_as_they_are(situation):
    if situation.fits(situation.settings):
        assert situation.fitted() == situation.settings


@given(situation=situations(batches=st.integers(1, 40)))
def test_what_a_person_has_chosen_stays(situation):
    chosen = situation.fitted()
    for section, key in situation.fixed if chosen else ():
        assert getattr(getattr(chosen, section), key) == getattr(getattr(situation.settings, section), key)


@given(situation=situations(batches=st.integers(1, 40)))
def test_only_token_taps_and_batches_change(situation):
    chosen = situation.fitted()
    if chosen is not None:
        network = {name: getattr(chosen.network, name) for name in ("token", "taps")}
        batches = {name: {"batch_size": getattr(chosen, name).batch_size} for name in ("finetuning", "pretraining")}
        assert situation.settings.updated({"network": network, **batches}) == chosen


@given(situation=situations(batches=st.integers(2, 40)))
def test_a_batch_is_halved_no_more_than_it_must_and_never_below_2(situation):
    chosen = situation.fitted()
    if chosen is not None:
        for section, first, last in zip(
            ("finetuning", "pretraining"), batches_of(situation.settings), batches_of(chosen), strict=True
        ):
            halves = [max(2, first >> times) for times in range(6)]
            assert last in halves
            assert last >= 2
            if last != first:
                larger = chosen.updated({section: {"batch_size": halves[halves.index(last) - 1]}})
                assert getattr(situation.estimate(larger), section) > situation.target


@pytest.mark.parametrize(("target", "batch"), [(18, 18), (17, 9), (8, 3), (3, 3)])
def test_a_halved_batch_is_still_made_up_of_whole_reads(target, batch):
    settings = Settings.from_dict({"pretraining": {"batch_size": 18, "crops_per_volume": 3}})
    given = {"fixed": {("network", "token")}, "estimate": lambda chosen: Memory(0, chosen.pretraining.batch_size)}
    assert fit_to_memory(settings, (32, 32, 32), (1, 1, 1), target=target, **given).pretraining.batch_size == batch
    with pytest.raises(UserError, match="batch 3"):
        fit_to_memory(settings, (32, 32, 32), (1, 1, 1), target=2, **given)


@given(situation=situations())
def test_the_token_grows_only_when_no_batch_of_2_fits(situation):
    chosen = situation.fitted()
    if chosen is not None and chosen.network.token != situation.settings.network.token:
        assert ("network", "token") not in situation.fixed
        steps = token_steps(situation.patch, situation.spacing)
        for token in steps[: steps.index(chosen.network.token)]:
            if all(a >= b for a, b in zip(token, situation.settings.network.token, strict=True)):
                assert not situation.fits(situation.smallest(token))


@given(situation=situations(batches=st.integers(1, 40)))
def test_the_token_never_shrinks_and_is_one_of_the_candidates(situation):
    chosen = situation.fitted()
    if chosen is not None:
        sides = zip(situation.settings.network.token, chosen.network.token, strict=True)
        assert all(before <= after for before, after in sides)
        assert chosen.network.token in token_steps(situation.patch, situation.spacing)


@given(situation=situations(batches=st.integers(1, 40)), share=SHARES)
def test_more_memory_never_gives_a_larger_token_nor_smaller_batches_for_the_same_token(situation, share):
    other = dataclasses.replace(situation, target=int(situation.target * share))
    poor, rich = (each.fitted() for each in sorted((situation, other), key=lambda each: each.target))
    if poor is not None:
        assert rich is not None
        assert math.prod(rich.network.token) <= math.prod(poor.network.token)
        if rich.network.token == poor.network.token:
            assert all(a <= b for a, b in zip(batches_of(poor), batches_of(rich), strict=True))


@given(situation=situations())
def test_nothing_is_refused_that_could_be_made_to_fit(situation):
    tokens = [situation.settings.network.token]
    if ("network", "token") not in situation.fixed:
        tokens += [
            token
            for token in token_steps(situation.patch, situation.spacing)
            if all(a >= b for a, b in zip(token, tokens[0], strict=True))
        ]
    possible = any(situation.fits(situation.smallest(token)) for token in tokens)
    assert (situation.fitted() is not None) == possible


@pytest.mark.parametrize(
    ("target", "token", "batches"),
    [
        (16 * 4032, (2, 4, 4), (4, 16)),
        (16 * 4032 - 1, (2, 4, 4), (4, 8)),
        (4 * 4032 - 1, (2, 4, 4), (2, 2)),
        (2 * 4032, (2, 4, 4), (2, 2)),
        (2 * 4032 - 1, (2, 4, 8), (2, 2)),
        (2 * 504, (4, 8, 8), (2, 2)),
        (2 * 504 - 1, (4, 8, 16), (2, 2)),
        (2 * 80, (8, 16, 16), (2, 2)),
    ],
)
def test_known_choices_for_thick_slices_with_a_byte_for_each_token(target, token, batches):
    settings = planned({"finetuning": {"batch_size": 4}})
    chosen = fit_to_memory(settings, PATCH, SPACING, fixed=(), target=target, estimate=linear(PATCH, (1, 1), 0))
    assert (chosen.network.token, batches_of(chosen)) == (token, batches)


def test_a_batch_of_6_becomes_2_before_the_token_grows():
    settings = planned({"finetuning": {"batch_size": 6}})
    chosen = fit_to_memory(settings, PATCH, SPACING, fixed=(), target=2 * 4032, estimate=linear(PATCH, (1, 1), 0))
    assert (chosen.network.token, batches_of(chosen)) == ((2, 4, 4), (2, 2))


@pytest.mark.parametrize(("gigabytes", "token", "taps"), [(2.0, (2, 4, 4), (9,)), (1.0, (2, 4, 8), ())])
def test_taps_are_kept_with_the_token_and_reset_with_another(gigabytes, token, taps):
    settings = planned({"network": {"decoder": "unetr", "taps": [9]}})
    fixed = {("network", "decoder"), ("network", "taps")}
    estimate, target = linear(PATCH, (GIB // 4032, GIB // 4032), 0), int(gigabytes * GIB)
    chosen = fit_to_memory(settings, PATCH, SPACING, fixed=fixed, target=target, estimate=estimate).network
    assert (chosen.token, chosen.decoder, chosen.taps) == (token, "unetr", taps)


def test_when_nothing_fits_the_refusal_names_sizes_of_the_last_attempt_and_what_to_do():
    estimate = linear(PATCH, (GIB // 80, 2 * GIB // 80), GIB)
    with pytest.raises(UserError) as caught:
        fit_to_memory(planned(), PATCH, SPACING, fixed=(), target=GIB // 2, estimate=estimate)
    assert str(caught.value) == (
        "With token [8, 16, 16] a training step needs about 3 GiB (fine-tuning, batch 2) and 5 GiB (pre-training, "
        "batch 2), more than the 512 MiB that -gpu_memory_target leaves: choose a smaller --size, a larger --token, "
        "another --decoder, or more memory."
    )


@pytest.mark.parametrize(
    ("fixed", "tried"),
    [
        ({("network", "token")}, r"token \[2, 4, 4\].*batch 2.*batch 2"),
        ({("finetuning", "batch_size")}, r"token \[8, 16, 16\].*batch 6.*batch 2"),
        ({("network", "token"), ("pretraining", "batch_size")}, r"token \[2, 4, 4\].*batch 2.*batch 16"),
    ],
)
def test_a_refusal_names_what_was_fixed_as_it_was_fixed(fixed, tried):
    settings = planned({"finetuning": {"batch_size": 6}})
    with pytest.raises(UserError, match=tried):
        fit_to_memory(settings, PATCH, SPACING, fixed=fixed, target=0, estimate=linear(PATCH, (1, 1), 0))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1024 * 1023.96, "1 MiB"),  # not 1024 KiB
        (GIB // 4, "256 MiB"),
        (24 * GIB, "24 GiB"),
        (2500 * 1024 * GIB, "2500 TiB"),
    ],
)
def test_bytes_are_written_with_the_largest_unit_that_leaves_a_number_above_one(size, text):
    assert size_text(size) == text


# ---------- recipes

OTHERS = {  # all that the papers do not have
    "network": {"blocks": "modern", "positions": "rotary", "tokenizer": "convolutional"},
    "pretraining": {
        "decoder": "cross",
        "decoder_heads": 2,
        "plain_share": 0.5,
        "rebuilt_share": 0.5,
        "skip_background": True,
        "weight_decay": 0.01,
    },
}


@pytest.mark.parametrize("name", ["vitiac", "amae"])
def test_a_paper_s_recipe_gives_the_same_whatever_the_plans_had_before(name):
    recipe = read_recipe(name)
    assert changed(planned(OTHERS), recipe) == changed(planned(), recipe)


def test_the_unetr_of_amae_has_transposed_convolutions_as_the_original():
    """AMAE, section 2.3: "the original UNETR model as it is"."""
    network = changed(planned(), read_recipe("amae")).network
    assert (network.decoder, network.upsampling, network.decoder_width) == ("unetr", "transposed", 16)
    assert network.tapped_blocks == (4, 7, 10)
