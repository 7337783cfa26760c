"""Encoders among other data: channels matched by name, differences said, misfits refused with all reasons."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weights import make_card
from torch import nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.adaptive import DynamicTokenizer, ModalityVectors
from nnunet_vit_mae.networks.build import build_autoencoder, build_encoder
from nnunet_vit_mae.networks.tokenizer import Tokenizer, patchify
from nnunet_vit_mae.presets import MODALITY_VECTORS
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.transfer import Destination, adapt_encoder
from nnunet_vit_mae.weights import Card

TOKEN = (2, 3, 5)
TOKENIZER = "tokenizer.projection.weight"
CT, Z, NONE = "CTNormalization", "ZScoreNormalization", "NoNormalization"

names = st.sampled_from(["T1", "t1", "T2", "FLAIR", "SWI", "MRI", "CT"])
name_lists = st.lists(names, min_size=1, max_size=4)
distinct_lists = st.lists(names, min_size=1, max_size=4, unique_by=str.lower)
counts = st.integers(1, 4)


def destination_of(card: Card, **changes) -> Destination:
    entries = {field.name: getattr(card, field.name) for field in dataclasses.fields(Destination)}
    return Destination(**(entries | changes))


def moved(kernels: list[list[float]], there: list[str], here: list[str]) -> tuple[list[list[float]], list[str]]:
    """Kernels of a tokenizer with a single output, one a channel, after the move from channels `there` to `here`."""
    card, weight = make_card(channel_names=there), torch.tensor(kernels).float().reshape(1, -1)
    adapted, notes = adapt_encoder({TOKENIZER: weight}, card, destination_of(card, channel_names=here))
    return adapted[TOKENIZER].reshape(len(here), -1).tolist(), notes


def refused(card: Card, **changes) -> str:
    with pytest.raises(UserError) as caught:
        adapt_encoder({TOKENIZER: torch.ones(3, 2)}, card, destination_of(card, **changes))
    return str(caught.value)


def random_tokenizer(channels: int, seed: int = 0) -> nn.Module:
    """As it stands in an encoder, with biases that are not zero."""
    torch.manual_seed(seed)
    holder = nn.Module()
    holder.tokenizer = Tokenizer(channels, TOKEN, 7).double()
    return holder


def embedded(holder: nn.Module, volume: torch.Tensor) -> torch.Tensor:
    return holder.tokenizer(patchify(volume, TOKEN))


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_autoencoder(Network(size="XS", token=(2, 4, 8)), 2, Pretraining(mask_ratio=0.9)).encoder.state_dict()


# ---------- the same place, or another patch, spacing or normalisation


def test_an_encoder_in_its_own_place_stays_as_it_is_and_nothing_is_said(tensors):
    adapted, notes = adapt_encoder(tensors, make_card(), destination_of(make_card()))
    assert notes == []
    assert adapted.keys() == tensors.keys()
    assert all(adapted[name].numpy().tobytes() == tensors[name].numpy().tobytes() for name in tensors)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"patch_size": [16, 64, 80]}, "Patch [32, 64, 80] there, [16, 64, 80] here: positions are rebuilt for it."),
        (
            {"spacing": [1.0, 0.8, 0.9]},
            "Spacing (mm) [3.0, 0.8, 0.9] there, [1.0, 0.8, 0.9] here: a token has another length.",
        ),
        (
            {"transpose_forward": [1, 0, 2]},
            "Axes of the files z y x there, y z x here: the encoder sees them from another side.",
        ),
        (
            {"normalization": [Z, Z]},
            "Intensities were normalised by CTNormalization, ZScoreNormalization, here by ZScoreNormalization.",
        ),
        (
            {"normalization": [CT]},
            "Intensities were normalised by CTNormalization, ZScoreNormalization, here by CTNormalization.",
        ),
    ],
)
def test_a_difference_that_needs_no_other_weights_is_said_and_changes_none(tensors, changes, note):
    adapted, notes = adapt_encoder(tensors, make_card(), destination_of(make_card(), **changes))
    assert notes == [note]
    assert all(adapted[name].numpy().tobytes() == tensors[name].numpy().tobytes() for name in tensors)


def test_a_card_of_an_earlier_version_does_not_tell_the_order_of_the_axes(tensors):
    card = make_card(transpose_forward=[])
    assert adapt_encoder(tensors, card, destination_of(card, transpose_forward=[1, 0, 2]))[1] == []


def test_every_difference_has_its_note(tensors):
    changes = {"patch_size": [8, 8, 8], "spacing": [1.0] * 3, "normalization": [Z], "channel_names": ["late phase"]}
    changes["transpose_forward"] = [2, 1, 0]
    _, notes = adapt_encoder(tensors, make_card(), destination_of(make_card(), **changes))
    assert [note.split()[0] for note in notes] == ["Patch", "Spacing", "Axes", "Intensities", "Tokenizer:"]
    assert all(note.endswith(".") for note in notes)


@pytest.mark.parametrize(("there", "here"), [([CT], [Z]), ([Z], [CT]), ([CT, Z], [Z]), ([Z, Z], [Z, CT])])
def test_ct_and_z_score_normalisation_stand_for_each_other(there, here):
    card = make_card(normalization=there)
    _, notes = adapt_encoder({TOKENIZER: torch.ones(1, 2)}, card, destination_of(card, normalization=here))
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("there", "here"), [([NONE], [NONE]), ([NONE, Z], [Z, NONE]), ([Z], [Z, Z]), ([CT, Z], [Z, CT])]
)
def test_normalisations_in_another_number_or_order_are_the_same(there, here):
    card = make_card(normalization=there)
    assert adapt_encoder({TOKENIZER: torch.ones(1, 2)}, card, destination_of(card, normalization=here))[1] == []


# ---------- refusals


def test_all_reasons_for_a_refusal_are_in_one_sentence_with_both_values():
    card = make_card(normalization=[NONE])
    assert refused(card, size="S", token=[4, 4, 8], normalization=[Z], spacing=[1.0] * 3) == (
        "size XS there, S here; token [2, 4, 8] there, [4, 4, 8] here; "
        "intensities normalised by NoNormalization there, ZScoreNormalization here"
    )


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("size", "L", "size XS there, L here"), ("token", [8, 4, 2], "token [2, 4, 8] there, [8, 4, 2] here")],
)
def test_only_the_reasons_are_listed(key, value, reason):
    assert refused(make_card(), **{key: value}, patch_size=[8, 8, 8], channel_names=["SWI"]) == reason


@pytest.mark.parametrize("changes", [{"blocks": "modern"}, {"tokenizer": "convolutional"}, {"register_tokens": 2}])
def test_a_card_that_leaves_out_settings_is_that_of_a_network_with_the_defaults(changes):
    card = make_card(network={"positions": "sine_cosine"})
    others = {"positions": "sine_cosine", "rotary_base": 50.0}  # of no weight
    reasons = [f"{name} {getattr(Network(), name)} there, {value} here" for name, value in changes.items()]
    assert refused(card, network=others | changes) == "; ".join(reasons)
    without = destination_of(card, network={"tokenizer": "convolutional"})
    assert adapt_encoder({"transformer.norm.bias": torch.ones(3)}, card, without)[1] == []  # none to compare
    adapt_encoder({TOKENIZER: torch.ones(3, 2)}, card, destination_of(card, network=others))


@pytest.mark.parametrize("scheme", [NONE, "RescaleTo01Normalization", "RGBTo01Normalization"])
@pytest.mark.parametrize("standardised", [CT, Z])
def test_intensities_in_another_range_are_refused_either_way(scheme, standardised):
    for there, here in ((scheme, standardised), (standardised, scheme)):
        message = refused(make_card(normalization=[there]), normalization=[here])
        assert message == f"intensities normalised by {there} there, {here} here"


def test_one_channel_in_another_range_is_enough_for_a_refusal():
    assert "normalised" in refused(make_card(normalization=[Z, NONE]), normalization=[Z, Z])
    assert "normalised" in refused(make_card(normalization=[Z, Z]), normalization=[Z, NONE])


# ---------- channels by name


@pytest.mark.parametrize(
    ("here", "kernels", "said"),
    [
        (["FLAIR", "T1"], [[10, 20], [1, 2]], "; FLAIR, T1 by name."),
        (["FLAIR"], [[10, 20]], "; FLAIR by name."),
        (["t1"], [[1, 2]], "; t1 by name."),
        (["flair", "T1"], [[10, 20], [1, 2]], "; flair, T1 by name."),
        (
            ["T1", "FLAIR", "SWI"],
            [[2 / 3, 4 / 3], [20 / 3, 40 / 3], [11 / 3, 22 / 3]],
            "; T1, FLAIR by name; SWI from the mean over its channels, all scaled by 2/3.",
        ),
        (["SWI"], [[11, 22]], "; SWI from the mean over its channels, all scaled by 2/1."),
        (["CT", "PET"], [[5.5, 11], [5.5, 11]], "; CT, PET from the mean over its channels."),
        (
            ["SWI", "T1"],
            [[5.5, 11], [1, 2]],
            "; T1 by name; SWI from the mean over its channels.",
        ),
    ],
)
def test_channels_are_matched_by_name_and_new_ones_start_from_the_mean(here, kernels, said):
    got, notes = moved([[1, 2], [10, 20]], ["T1", "FLAIR"], here)
    assert got == [pytest.approx(kernel, rel=1e-6) for kernel in kernels]
    assert notes == [f"Tokenizer: made for T1, FLAIR, used for {', '.join(here)}{said}"]


def test_one_channel_is_repeated_for_three_new_ones_and_divided_by_three():
    assert moved([[3, 6]], ["CT"], ["T1", "T2", "FLAIR"])[0] == [[1, 2]] * 3


def test_three_channels_are_summed_for_a_new_one():
    assert moved([[1, 2], [10, 20], [100, 200]], ["T1", "T2", "FLAIR"], ["CT"])[0] == [[111, 222]]


def test_other_spellings_of_a_contrast_are_the_same_name():
    got, notes = moved([[1, 2], [10, 20], [100, 200]], ["T2w", "DWI", "flair"], ["FLAIR", "t2", "Trace"])
    assert got == [[100, 200], [1, 2], [10, 20]]
    assert notes == ["Tokenizer: made for T2w, DWI, flair, used for FLAIR, t2, Trace; FLAIR, t2, Trace by name."]


@given(there=distinct_lists, data=st.data())
def test_known_channels_keep_their_weights_to_the_bit(there, data):
    here = data.draw(st.lists(st.sampled_from(there), min_size=1, unique=True))
    cased = [data.draw(st.sampled_from([name, name.lower(), name.upper(), name.title()])) for name in here]
    kernels = torch.randn(len(there), 5, 6, generator=torch.Generator().manual_seed(len(there)))
    card = make_card(channel_names=there)
    weight = kernels.permute(1, 0, 2).flatten(1)  # width, channels x voxels
    adapted, notes = adapt_encoder({TOKENIZER: weight}, card, destination_of(card, channel_names=cased))
    chosen = adapted[TOKENIZER].reshape(5, len(here), 6)
    for number, name in enumerate(here):
        assert torch.equal(chosen[:, number], kernels[there.index(name)])
    assert len(notes) == (cased != there)
    assert not any("scaled" in note for note in notes)


@given(there=distinct_lists, here=distinct_lists)
def test_every_channel_is_its_namesake_or_the_mean_and_new_ones_scale_all(there, here):
    kernels = [[float(2**number), -float(3**number)] for number in range(len(there))]
    mean = [sum(column) / len(there) for column in zip(*kernels, strict=True)]
    lower = [name.lower() for name in there]
    scale = len(there) / len(here) if {name.lower() for name in here} - set(lower) else 1
    expected = [kernels[lower.index(name.lower())] if name.lower() in lower else mean for name in here]
    got, _ = moved(kernels, there, here)
    assert got == [pytest.approx([scale * value for value in kernel], rel=1e-5) for kernel in expected]


@given(there=name_lists, here=name_lists)
def test_any_names_give_finite_contiguous_weights_and_leave_the_source_alone(there, here):
    card, holder = make_card(channel_names=there), random_tokenizer(len(there))
    source = holder.state_dict()
    before = {name: tensor.clone() for name, tensor in source.items()}
    adapted, notes = adapt_encoder(source, card, destination_of(card, channel_names=here))
    assert adapted[TOKENIZER].isfinite().all()
    assert adapted[TOKENIZER].is_contiguous()
    assert adapted[TOKENIZER].dtype == torch.float64
    assert len(notes) == (there != here)
    if there != here:
        adapted[TOKENIZER].zero_()
    assert source.keys() == before.keys()
    assert all(torch.equal(source[name], before[name]) for name in before)
    random_tokenizer(len(here)).load_state_dict(adapted)


# ---------- in the real modules


@settings(deadline=None)
@given(there=counts, here=counts, seed=st.integers(0, 9))
def test_an_image_in_all_channels_gives_the_same_tokens_whatever_the_number_of_new_channels(there, here, seed):
    card = make_card(channel_names=[f"old {i}" for i in range(there)])
    place = destination_of(card, channel_names=[f"new {i}" for i in range(here)])
    old, new = random_tokenizer(there, seed), random_tokenizer(here, seed + 1)
    new.load_state_dict(adapt_encoder(old.state_dict(), card, place)[0])
    image = torch.randn(2, 1, 5, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    tokens = [embedded(holder, image.expand(-1, number, -1, -1, -1)) for holder, number in ((old, there), (new, here))]
    assert tokens[0].shape == (2, math.prod((3, 3, 3)), 7)
    torch.testing.assert_close(tokens[1], tokens[0], rtol=1e-12, atol=1e-12)


@settings(deadline=None)
@given(order=st.permutations(["T1", "T2", "FLAIR", "SWI"]))
def test_tokens_are_the_same_when_the_channels_come_in_another_order(order):
    there = ["T1", "T2", "FLAIR", "SWI"]
    card = make_card(channel_names=there)
    old, new = random_tokenizer(4), random_tokenizer(4, seed=1)
    new.load_state_dict(adapt_encoder(old.state_dict(), card, destination_of(card, channel_names=order))[0])
    volume = torch.randn(1, 4, 4, 6, 5, dtype=torch.float64)
    turned = volume[:, [there.index(name) for name in order]]
    torch.testing.assert_close(embedded(new, turned), embedded(old, volume), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "here", [["CT"], ["late phase", "ct"], ["MRI"], ["CT", "late phase", "PET"], ["a", "b", "c", "d"], ["MRI", "MRI"]]
)
def test_what_comes_out_loads_strictly_into_an_encoder_for_the_new_channels(tensors, here):
    adapted, _ = adapt_encoder(tensors, make_card(), destination_of(make_card(), channel_names=here))
    encoder = build_autoencoder(Network(size="XS", token=(2, 4, 8)), len(here), Pretraining(mask_ratio=0.9)).encoder
    assert not any(encoder.load_state_dict(adapted, strict=True))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, tensors[name]) == (name != TOKENIZER)
    assert encoder.encode(torch.randn(1, len(here), 4, 8, 16), ()).tokens.isfinite().all()


def test_a_convolutional_tokenizer_gives_a_new_channel_the_mean_of_its_kernels():
    network = Network(size="XS", token=(2, 4, 8), tokenizer="convolutional")
    tensors, here = build_encoder(network, 2).state_dict(), ["late phase", "CT", "PET"]
    adapted, _ = adapt_encoder(tensors, make_card(), destination_of(make_card(), channel_names=here))
    build_encoder(network, 3).load_state_dict(adapted)
    ct, late = tensors["tokenizer.entry.weight"].unbind(1)
    expected = torch.stack([late, ct, (ct + late) / 2], dim=1) * (2 / 3)
    torch.testing.assert_close(adapted["tokenizer.entry.weight"], expected)


# ---------- adaptive networks


def random_dynamic_tokenizer(contrasts: int, kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    holder = nn.Module()
    holder.tokenizer = DynamicTokenizer(ModalityVectors(contrasts, kind), TOKEN, 7)
    for parameter in holder.parameters():
        nn.init.normal_(parameter)
    return holder


def factors(holder: nn.Module) -> torch.Tensor:
    """What scales kernel and bias for each contrast."""
    tokenizer = holder.tokenizer
    return tokenizer.factors(tokenizer.vectors(torch.arange(tokenizer.vectors.contrasts)).float())


@pytest.mark.parametrize("kind", MODALITY_VECTORS)
def test_an_adaptive_tokenizer_treats_contrasts_as_it_treats_their_namesakes_and_new_ones_as_the_mean(kind):
    card = make_card(adaptive=True, modality_vectors=kind, channel_names=["T1", "FLAIR", "SWI"])
    place = destination_of(card, channel_names=["PET", "swi", "T1w", "SWI"])  # no second SWI there
    old, new = random_dynamic_tokenizer(3, kind), random_dynamic_tokenizer(4, kind, seed=1)
    source = old.state_dict()
    before = {name: tensor.clone() for name, tensor in source.items()}
    adapted, notes = adapt_encoder(source, card, place)
    new.load_state_dict(adapted)
    of_t1, of_flair, of_swi = factors(old)
    mean = (of_t1 + of_flair + of_swi) / 3
    expected = torch.stack([mean, of_swi, of_t1, mean])
    torch.testing.assert_close(factors(new), expected)
    assert all(torch.equal(source[name], before[name]) for name in before)
    assert notes == [
        "Tokenizer: made for T1, FLAIR, SWI, used for PET, swi, T1w, SWI; swi, T1w by name; "
        "PET, SWI from the mean over its channels."
    ]
    patches = torch.randn(2, 5, math.prod(TOKEN))
    torch.testing.assert_close(
        new.tokenizer(patches, torch.tensor([2, 1])), old.tokenizer(patches, torch.tensor([0, 2]))
    )


@pytest.mark.parametrize("kind", MODALITY_VECTORS)
def test_an_adaptive_encoder_loads_strictly_for_other_contrasts(kind):
    network = Network(size="XS", token=(2, 4, 8), decoder="unetr", adaptive=True, modality_vectors=kind)
    source = build_autoencoder(network, 2, Pretraining(mask_ratio=0.9)).encoder.state_dict()
    card = make_card(adaptive=True, modality_vectors=kind)
    adapted, _ = adapt_encoder(source, card, destination_of(card, channel_names=["PET", "CT", "MRI"]))
    encoder = build_autoencoder(network, 3, Pretraining(mask_ratio=0.9)).encoder
    assert not any(encoder.load_state_dict(adapted, strict=True))


@pytest.mark.parametrize(("adaptive", "way"), [(True, "takes one contrast at a time"), (False, "stacks all contrasts")])
def test_between_adaptive_and_stacking_networks_only_the_tokenizer_stays_behind(adaptive, way):
    network = Network(size="XS", token=(2, 4, 8), adaptive=adaptive, modality_vectors="learned")
    source = build_autoencoder(network, 2, Pretraining(mask_ratio=0.9)).encoder.state_dict()
    card = make_card(adaptive=adaptive, modality_vectors="learned")
    place = destination_of(card, adaptive=not adaptive, modality_vectors="one_hot", channel_names=["T1"])
    adapted, notes = adapt_encoder(source, card, place)
    assert adapted.keys() == {name for name in source if name.startswith("transformer.")}
    assert all(adapted[name].numpy().tobytes() == source[name].numpy().tobytes() for name in adapted)
    assert [way in note for note in notes] == [True]


def test_other_modality_vectors_are_refused_with_the_other_reasons():
    card = make_card(adaptive=True)
    assert refused(card, size="S", modality_vectors="learned") == (
        "size XS there, S here; modality vectors one_hot there, learned here"
    )


def test_modality_vectors_do_not_matter_to_networks_that_stack_their_channels(tensors):
    place = destination_of(make_card(), modality_vectors="learned")
    assert adapt_encoder(tensors, make_card(), place)[1] == []
