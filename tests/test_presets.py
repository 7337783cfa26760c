"""Settings as they stand in nnU-Net's plans, and what they say about values that cannot be."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.presets import (
    BLOCKS,
    COMPILING,
    DECODERS,
    POSITION_UNITS,
    POSITIONS,
    PRETRAINING_DECODERS,
    SIZES,
    TOKENIZERS,
    UPSAMPLINGS,
)
from nnunet_vit_mae.settings import TOKEN_SIDES, Finetuning, Network, Pretraining, Settings


def with_taps(network: Network) -> st.SearchStrategy[Network]:
    """The same network, with taps or without."""
    count, depth = len(network.tapped_blocks), SIZES[network.size].depth
    blocks = st.lists(st.integers(1, depth), min_size=count, max_size=count).map(lambda drawn: tuple(sorted(drawn)))
    return st.one_of(st.just(()), blocks).map(lambda taps: dataclasses.replace(network, taps=taps))


positive = st.floats(1e-12, 1e6)
counts = st.integers(1, 10**6)
shares = st.floats(0, 1, exclude_max=True)
networks = st.builds(
    Network,
    size=st.sampled_from(sorted(SIZES)),
    token=st.tuples(*[st.sampled_from(TOKEN_SIDES)] * 3),
    decoder=st.sampled_from(sorted(DECODERS)),
    upsampling=st.sampled_from(sorted(UPSAMPLINGS)),
    decoder_width=st.integers(0, 64),
    upscale_convolutions=st.integers(1, 2),
    positions=st.sampled_from(sorted(POSITIONS)),
    position_unit=st.sampled_from(POSITION_UNITS),
    rotary_base=positive,
    blocks=st.sampled_from(sorted(BLOCKS)),
    tokenizer=st.sampled_from(sorted(TOKENIZERS)),
    norm_eps=positive,
    learned_positions=st.one_of(st.just(()), st.tuples(*[st.integers(1, 40)] * 3)),
    register_tokens=st.integers(0, 9),
).flatmap(with_taps)
pretrainings = st.builds(
    lambda reads, crops, masks, loss, **others: Pretraining(
        batch_size=reads * crops * masks, crops_per_volume=crops, masks_per_crop=masks, **loss, **others
    ),
    reads=counts,
    crops=st.integers(1, 8),
    masks=st.integers(1, 4),
    epochs=counts,
    mask_ratio=st.floats(0, 1, exclude_min=True, exclude_max=True),
    decoder=st.sampled_from(sorted(PRETRAINING_DECODERS)),
    decoder_heads=st.sampled_from([0, 1, 2, 4, 8]),  # divisors of the widths of all sizes
    rebuilt_share=st.floats(0, 1, exclude_min=True),
    skip_background=st.booleans(),
    base_lr=positive,
    weight_decay=st.floats(0, 10),
    warmup=shares,
    loss=st.one_of(st.just({"norm_pix": False}), st.fixed_dictionaries({"plain_share": shares})),
    gradient_clip=positive,
    compile=st.sampled_from(COMPILING),
)
finetunings = st.builds(
    Finetuning,
    epochs=counts,
    iterations=counts,
    batch_size=counts,
    lr=positive,
    weight_decay=st.floats(0, 10),
    warmup=shares,
    layer_decay=st.floats(0, 1, exclude_min=True),
    drop_path=shares,
    gradient_clip=positive,
    seed=st.integers(-1, 2**31),
)
all_settings = st.builds(Settings, network=networks, pretraining=pretrainings, finetuning=finetunings)

DEFAULTS = Settings().to_dict()
FLOATS = [
    (section, key) for section, values in DEFAULTS.items() for key, value in values.items() if type(value) is float
]
INTS = [(section, key) for section, values in DEFAULTS.items() for key, value in values.items() if type(value) is int]


def refused(section: str, key: str, value: Any) -> str:
    with pytest.raises(UserError) as caught:
        Settings.from_dict({section: {key: value}})
    return str(caught.value)


@given(chosen=all_settings)
def test_settings_survive_json(chosen):
    assert Settings.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen


@given(chosen=all_settings)
def test_settings_as_a_dict_hold_plain_json_types(chosen):
    block = chosen.to_dict()
    assert json.loads(json.dumps(block)) == block


@given(chosen=all_settings)
def test_an_empty_block_changes_nothing(chosen):
    assert chosen.updated({}) == chosen
    assert chosen.updated({"network": {}, "finetuning": {}}) == chosen


@given(chosen=all_settings, other=all_settings)
def test_a_full_block_replaces_everything(chosen, other):
    assert chosen.updated(other.to_dict()) == other


@given(chosen=all_settings, epochs=counts)
def test_an_update_keeps_what_it_does_not_name(chosen, epochs):
    expected = dataclasses.replace(chosen, pretraining=dataclasses.replace(chosen.pretraining, epochs=epochs))
    assert chosen.updated({"pretraining": {"epochs": epochs}}) == expected


def test_an_empty_block_gives_the_defaults():
    assert Settings.from_dict({}) == Settings()


def test_an_unknown_section_is_named_and_so_are_the_known_ones():
    with pytest.raises(UserError, match=r"vit_mae .*unknown keys: net .*network, .*pretraining, finetuning"):
        Settings.from_dict({"net": {"size": "S"}})


def test_all_unknown_keys_of_a_section_are_named():
    with pytest.raises(UserError, match=r"vit_mae\.finetuning .*unknown keys: epoch, learning_rate .*epochs"):
        Settings.from_dict({"finetuning": {"learning_rate": 1e-3, "epoch": 3, "lr": 1e-4}})


@pytest.mark.parametrize("values", [None, 3, "S", ["size", "S"]])
def test_a_section_that_is_no_object_is_named(values):
    with pytest.raises(UserError, match=r"vit_mae\.network .*must be an object"):
        Settings.from_dict({"network": values})


@pytest.mark.parametrize(("section", "key"), INTS)
@pytest.mark.parametrize("value", ["3", 3.0, True, None, [3]])
def test_a_count_of_another_type_is_refused_by_name(section, key, value):
    assert refused(section, key, value) == f"{section}.{key} is {value!r}, but it must be of type int."


@pytest.mark.parametrize(("section", "key"), FLOATS)
@pytest.mark.parametrize("value", ["0.5", False, None, [0.5]])
def test_a_number_of_another_type_is_refused_by_name(section, key, value):
    assert refused(section, key, value) == f"{section}.{key} is {value!r}, but it must be of type float."


@pytest.mark.parametrize("key", ["norm_pix", "skip_background"])
@pytest.mark.parametrize("value", [1, 0, "true", None])
def test_a_switch_of_another_type_is_refused_by_name(key, value):
    assert refused("pretraining", key, value).startswith(f"pretraining.{key} is {value!r}, ")


def test_a_batch_that_its_reads_do_not_make_up_is_refused():
    chosen = Settings.from_dict({"pretraining": {"crops_per_volume": 4, "masks_per_crop": 2}})
    assert (chosen.pretraining.samples_per_read, chosen.pretraining.reads) == (8, 2)
    with pytest.raises(UserError, match=r"batch_size is 12, .* a multiple of 8, crops_per_volume x masks_per_crop"):
        chosen.updated({"pretraining": {"batch_size": 12}})


def test_a_network_that_takes_each_contrast_on_its_own_is_not_compiled():
    with pytest.raises(UserError, match=r"compile is 'on', .* auto or off, as network.adaptive is set"):
        Settings.from_dict({"network": {"adaptive": True}, "pretraining": {"compile": "on"}})


def test_decoder_heads_that_do_not_divide_the_width_of_another_size_are_refused():
    chosen = Settings.from_dict({"network": {"size": "S"}, "pretraining": {"decoder_heads": 3}})
    with pytest.raises(UserError, match=r"decoder_heads is 3, .* 512, the width of the decoder of size B"):
        chosen.updated({"network": {"size": "B"}})


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("network", "size", "XL"),
        ("network", "decoder", "fpn"),
        ("network", "token", [8, 8]),
        ("network", "token", [8, 8, 8, 8]),
        ("network", "token", [8, 8, 6]),
        ("network", "token", [0, 8, 8]),
        ("network", "token", [-8, 8, 8]),
        ("network", "token", [True, 8, 8]),
        ("network", "token", [8.0, 8, 8]),
        ("network", "token", 8),
        ("network", "upsampling", "trilinear"),
        ("network", "upscale_convolutions", 0),
        ("network", "upscale_convolutions", 3),
        ("network", "taps", 7),
        ("network", "taps", "7"),
        ("network", "taps", None),
        ("network", "taps", [5.0, 9.0]),
        ("network", "taps", [True, 9]),
        ("pretraining", "epochs", 0),
        ("pretraining", "batch_size", -1),
        ("pretraining", "crops_per_volume", 0),
        ("pretraining", "masks_per_crop", -2),
        ("pretraining", "masks_per_crop", 1.5),
        ("pretraining", "mask_ratio", 0.0),
        ("pretraining", "mask_ratio", 1),
        ("pretraining", "decoder", "both"),
        ("pretraining", "decoder_heads", -1),
        ("pretraining", "decoder_heads", 7),
        ("pretraining", "rebuilt_share", 0.0),
        ("pretraining", "rebuilt_share", 1.01),
        ("pretraining", "base_lr", 0.0),
        ("pretraining", "weight_decay", -0.1),
        ("pretraining", "warmup", 1.0),
        ("pretraining", "warmup", -0.1),
        ("pretraining", "plain_share", 1.0),
        ("pretraining", "plain_share", -0.1),
        ("pretraining", "gradient_clip", 0),
        ("pretraining", "compile", "yes"),
        ("finetuning", "epochs", 0),
        ("finetuning", "iterations", 0),
        ("finetuning", "batch_size", 0),
        ("finetuning", "lr", -1e-3),
        ("finetuning", "weight_decay", -1),
        ("finetuning", "warmup", 1),
        ("finetuning", "layer_decay", 0.0),
        ("finetuning", "layer_decay", 1.1),
        ("finetuning", "drop_path", 1.0),
        ("finetuning", "drop_path", -0.1),
        ("finetuning", "gradient_clip", -1.0),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(section, key, value):
    assert refused(section, key, value).startswith(f"{section}.{key} is ")


@pytest.mark.parametrize(("section", "key"), FLOATS)
def test_not_a_number_is_refused_by_name(section, key):
    assert refused(section, key, json.loads("NaN")).startswith(f"{section}.{key} is nan, ")


def test_a_size_that_is_not_there_is_answered_with_those_that_are():
    assert (
        refused("network", "size", "XL") == "network.size is 'XL', but it must be one of XS, S, M, B, L, "
        "PrimusS, PrimusB, PrimusM, PrimusL, ViTTi, ViTS, ViTL."
    )


@pytest.mark.parametrize(("section", "key"), [("finetuning", "lr"), ("pretraining", "weight_decay")])
def test_a_whole_number_is_taken_for_a_float(section, key):
    value = getattr(getattr(Settings.from_dict({section: {key: 1}}), section), key)
    assert value == 1
    assert type(value) is float


@pytest.mark.parametrize("token", [[2, 4, 8], (2, 4, 8)])
def test_a_list_is_taken_for_a_token(token):
    assert Settings.from_dict({"network": {"token": token}}).network.token == (2, 4, 8)


@pytest.mark.parametrize("taps", [[3, 9], (3, 9)])
def test_a_list_is_taken_for_taps(taps):
    network = Settings.from_dict({"network": {"decoder": "unetr", "taps": taps}}).network
    assert network.taps == network.tapped_blocks == (3, 9)


@pytest.mark.parametrize("taps", [[4, 7], [0, 7, 10], [-1, 7, 10], [4, 7, 13], [7, 4, 10], [10, 7, 4]])
def test_taps_of_another_number_range_or_order_are_refused(taps):
    with pytest.raises(UserError) as caught:
        Settings.from_dict({"network": {"decoder": "unetr", "token": [2, 16, 8], "taps": taps}})
    assert str(caught.value).startswith(
        f"network.taps is {taps}, but it must be 3 or more blocks from 1 to 12, ascending"
    )


def test_taps_beyond_the_depth_of_a_smaller_encoder_are_refused():
    with pytest.raises(UserError, match=r"network\.taps is \[2, 5\], but it must be 2 or more blocks from 1 to 4"):
        Settings.from_dict({"network": {"size": "XS", "decoder": "unetr", "taps": [2, 5]}})


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"unetr"}))
def test_taps_are_refused_with_a_decoder_that_takes_none(decoder):
    with pytest.raises(UserError, match=rf"network\.taps is \[5, 9\], .* with the decoder {decoder} "):
        Settings.from_dict({"network": {"decoder": decoder, "taps": [5, 9]}})


@pytest.mark.parametrize("token", [(2, 1, 2), (1, 1, 1)])
def test_taps_are_refused_where_the_image_is_the_only_skip(token):
    with pytest.raises(UserError, match=r"network\.taps is \[7\], "):
        Settings.from_dict({"network": {"decoder": "unetr", "token": token, "taps": [7]}})


@pytest.mark.parametrize(
    ("token", "blocks"),
    [
        ((32, 32, 32), (3, 6, 8, 11)),
        ((16, 16, 16), (4, 7, 10)),
        ((2, 16, 8), (4, 7, 10)),  # the longest side decides
        ((8, 8, 8), (4, 7, 10)),  # three at least
        ((4, 4, 4), (4, 7, 10)),
        ((2, 2, 2), ()),
        ((1, 1, 1), ()),
    ],
)
def test_unetr_taps_evenly_spaced_blocks_of_twelve(token, blocks):
    assert Network(decoder="unetr", token=token).tapped_blocks == blocks


@given(network=networks)
def test_the_tapped_blocks_could_have_been_given_as_taps(network):
    blocks = network.tapped_blocks
    assert dataclasses.replace(network, taps=blocks).tapped_blocks == blocks


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"unetr"}))
def test_other_decoders_tap_no_blocks(decoder):
    assert Network(decoder=decoder).tapped_blocks == ()


@given(protocol=pretrainings, lr=st.floats(1e-9, 10))
def test_with_lr_gives_that_learning_rate_and_changes_nothing_else(protocol, lr):
    other = protocol.with_lr(lr)
    assert other.lr == pytest.approx(lr, rel=1e-12)
    assert dataclasses.replace(other, base_lr=protocol.base_lr) == protocol


@pytest.mark.parametrize(("batch_size", "lr"), [(256, 1.5e-4), (512, 3e-4), (16, 9.375e-6)])
def test_the_learning_rate_is_given_per_256_samples(batch_size, lr):
    assert Pretraining(base_lr=1.5e-4, batch_size=batch_size).lr == pytest.approx(lr)


@pytest.mark.parametrize(("share", "epochs", "plain"), [(0.0, 800, 0), (0.25, 10, 2), (0.3, 10, 3), (0.9, 1, 0)])
def test_the_loss_is_plain_in_the_first_epochs_and_norm_pix_in_the_last(share, epochs, plain):
    protocol = Pretraining(epochs=epochs, plain_share=share)
    assert [protocol.norm_pix_in(epoch) for epoch in range(epochs)] == [False] * plain + [True] * (epochs - plain)


def test_a_plain_loss_has_no_share_of_plain_epochs():
    assert not Pretraining(norm_pix=False).norm_pix_in(799)
    with pytest.raises(UserError, match=r"plain_share is 0\.2, but it must be 0, as norm_pix is not set"):
        Settings.from_dict({"pretraining": {"norm_pix": False, "plain_share": 0.2}})


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_heads_divide_the_widths(size):
    assert size.width % size.heads == 0
    assert size.decoder_width % size.decoder_heads == 0


@pytest.mark.parametrize(("size", "millions"), [("S", 9.94), ("M", 39.29), ("B", 111.33), ("L", 156.23)])
def test_autoencoders_have_the_papers_numbers_of_parameters(size, millions):
    with torch.device("meta"):
        network = build_autoencoder(Network(size=size, token=(8, 8, 8)), 1, Pretraining(mask_ratio=0.9))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize("block", [[], ["network"], 3, "network"])
def test_a_block_that_is_no_object_is_refused(block):
    with pytest.raises(UserError, match="must be an object"):
        Settings.from_dict(block)
