"""Encoder files: what is written comes back, and what is not an encoder of ours is refused without running it."""

import dataclasses
import io
import json
import os
import pickle
import re
import stat
import tempfile
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Poison
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.nnunet import pretraining
from nnunet_vit_mae.pretraining.run import PretrainingResult
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.storage.files import file_hash
from nnunet_vit_mae.weights import (
    CARD_KEY,
    Card,
    check_encoder,
    encoder_content,
    hashed_name,
    read_encoder,
    save_encoder,
)

CASES = ["carotid_left_0017", "carotid_right_0042"]


def make_card(**changes) -> Card:
    card = Card(
        size="XS",
        token=[2, 4, 8],
        adaptive=False,
        modality_vectors="one_hot",
        channel_names=["CT", "late phase"],
        dataset="Dataset900_CarotidPhantom",
        plans="nnUNetPlans",
        configuration="3d_fullres",
        fold="0",
        patch_size=[32, 64, 80],
        spacing=[3.0, 0.8, 0.9],
        normalization=["CTNormalization", "ZScoreNormalization"],
        data_fingerprint="0123456789abcdef",
        cases_seen=[hashed_name(case) for case in CASES],
        epochs=800,
        steps=1600,
        loss=0.123456789,
        pretraining={"mask_ratio": 0.9, "decoder": "self", "norm_pix": True},
        seed=7,
        data_licence="CC0 1.0 — “phantoms”",
        packages=package_versions(),
        transpose_forward=[0, 1, 2],
    )
    return dataclasses.replace(card, **changes)


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    return build_autoencoder(Network(size="XS", token=(2, 4, 8)), 2, Pretraining(mask_ratio=0.9)).encoder


@pytest.fixture
def file(tmp_path, encoder) -> Path:
    path = tmp_path / "runs" / "encoder.safetensors"
    save_encoder(encoder, make_card(), path)
    return path


def refused(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_encoder(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


# ---------- what is written comes back


def test_tensors_come_back_bitwise(file, encoder):
    tensors, _ = read_encoder(file)
    written = encoder.state_dict()
    assert set(tensors) == set(written)
    for name, tensor in tensors.items():
        assert tensor.dtype == written[name].dtype
        assert tensor.numpy().tobytes() == written[name].numpy().tobytes()


def test_a_pre_training_that_is_complete_leaves_its_encoder_as_it_is(file, encoder, monkeypatch):
    """Plans that start from it name its hash, and its card tells of the day on which it was trained."""
    result = PretrainingResult(SimpleNamespace(encoder=encoder), [0.1])
    monkeypatch.setattr(pretraining, "run", lambda *_, **__: result)
    before, changed = file.read_bytes(), make_card(packages={"torch": "of a later version"})
    flags = {"resume": True, "readers": 0, "on_device": False}

    def go_on():
        pretraining._make_encoder(None, lambda _: changed, file, torch.device("cpu"), **flags)
        return file.read_bytes()

    assert go_on() == before
    file.write_bytes(before[:-1])  # a copy that was cut off
    assert go_on() == encoder_content(encoder.state_dict(), changed)
    file.unlink()
    assert go_on() == encoder_content(encoder.state_dict(), changed)
    result.network.encoder = other = deepcopy(encoder)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert go_on() == encoder_content(other.state_dict(), changed)


def test_tensors_that_are_not_contiguous_come_back(tmp_path, encoder):
    copy = deepcopy(encoder)
    weight = copy.transformer.blocks[0].attention.qkv.weight
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    save_encoder(copy, make_card(), tmp_path / "encoder.safetensors")
    tensors, _ = read_encoder(tmp_path / "encoder.safetensors")
    assert torch.equal(tensors["transformer.blocks.0.attention.qkv.weight"], weight)


def test_others_may_read_the_file_as_the_umask_says(tmp_path, encoder):
    before = os.umask(0o022)
    try:
        save_encoder(encoder, make_card(), tmp_path / "encoder.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "encoder.safetensors").stat().st_mode) == 0o644


def test_the_card_comes_back(file):
    assert read_encoder(file)[1] == make_card()


@given(
    dataset=st.text(),
    loss=st.floats(allow_nan=False, allow_infinity=False),
    seed=st.integers(),
    names=st.lists(st.text(), min_size=1, max_size=3),
    norm_pix=st.booleans(),
)
def test_a_card_survives_json(dataset, loss, seed, names, norm_pix):
    protocol = {"norm_pix": norm_pix}
    card = make_card(dataset=dataset, loss=loss, seed=seed, channel_names=names, pretraining=protocol)
    assert Card.from_json(card.to_json()) == card


def test_the_file_is_read_by_safetensors_alone(file):
    """The format's own layout: the header's length, the header as JSON, the tensors."""
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"][CARD_KEY])["seed"] == 7


def test_saving_replaces_an_older_file_and_leaves_no_other(file, encoder):
    save_encoder(encoder, make_card(epochs=3), file)
    assert read_encoder(file)[1].epochs == 3
    assert list(file.parent.iterdir()) == [file]


# ---------- cases


def test_the_files_bytes_tell_hashes_and_no_names(file):
    content = file.read_bytes()
    for case in CASES:
        assert hashed_name(case).encode() in content
        assert case.encode() not in content


def test_a_hash_does_not_show_the_name_and_is_the_same_in_every_process():
    assert hashed_name("carotid_left_0017") == "da9a85dfd3794f36"


def test_names_that_share_a_beginning_have_different_hashes():
    assert len({hashed_name(f"case_{number}") for number in range(1000)}) == 1000


def test_a_card_knows_which_cases_it_has_seen():
    assert make_card().seen(["carotid_left_0018", *reversed(CASES), "carotid"]) == list(reversed(CASES))
    assert make_card().seen(["carotid_left_0018"]) == []


@pytest.mark.parametrize("entries", [["case_1", "case_2"], []])  # shared without hashes, converted
def test_a_card_without_hashes_does_not_tell_which_cases_it_has_seen(entries):
    assert make_card(cases_seen=entries).seen(CASES) is None


# ---------- files that are no encoders


def test_a_missing_file_is_named(tmp_path):
    assert refused(tmp_path / "none.safetensors").endswith("is missing: check its path.")


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused(file, kept):
    file.write_bytes(file.read_bytes()[:kept])
    assert "damaged" in refused(file)


def test_a_file_with_bytes_behind_its_end_is_refused(file):
    file.write_bytes(file.read_bytes() + b"\0")
    assert "damaged" in refused(file)


def test_a_file_with_a_broken_header_is_refused(file):
    content = bytearray(file.read_bytes())
    content[8] ^= 0xFF
    file.write_bytes(content)
    assert "damaged" in refused(file)


@settings(deadline=None)
@given(content=st.binary(max_size=300))
def test_any_other_bytes_are_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "encoder.safetensors"
        file.write_bytes(content)
        refused(file)


@pytest.mark.parametrize("write", [lambda poison, file: file.write_bytes(pickle.dumps(poison)), torch.save])
def test_a_pickle_under_our_name_is_refused_and_never_unpickled(tmp_path, write):
    file, marker = tmp_path / "encoder.safetensors", tmp_path / "marker"
    write(Poison(marker), file)
    assert "damaged or not a safetensors file" in refused(file)
    assert not marker.exists()
    content = io.BytesIO(file.read_bytes())
    torch.load(content, weights_only=False) if write is torch.save else pickle.load(content)
    assert marker.exists()  # the poison does work


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_without_a_card_is_refused(tmp_path, metadata):
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "other.safetensors", metadata=metadata)
    assert "no card" in refused(tmp_path / "other.safetensors")


def test_a_card_of_another_version_is_refused_with_the_entries_that_differ(tmp_path):
    entries = json.loads(make_card().to_json())
    del entries["seed"]
    entries["scanner"] = "Z1"
    file = tmp_path / "encoder.safetensors"
    save_file({"weight": torch.ones(2, 3)}, file, metadata={CARD_KEY: json.dumps(entries)})
    assert "differs in: scanner, seed" in refused(file)


def test_a_card_that_lacks_the_order_of_the_axes_is_read(tmp_path, encoder):
    entries = json.loads(make_card().to_json())
    del entries["transpose_forward"]
    file = tmp_path / "encoder.safetensors"
    save_file(encoder.state_dict(), file, metadata={CARD_KEY: json.dumps(entries)})
    assert read_encoder(file)[1] == make_card(transpose_forward=[])


@pytest.mark.parametrize("card", ["not json", "[1, 2]", "3", "null", "{}"])
def test_a_card_that_is_none_is_refused(tmp_path, card):
    file = tmp_path / "encoder.safetensors"
    save_file({"weight": torch.zeros(1)}, file, metadata={CARD_KEY: card})
    with pytest.raises(UserError, match="card"):
        read_encoder(file)


# ---------- encoders that cannot be used

WEIGHT, BIAS = "transformer.blocks.1.attention.qkv.weight", "tokenizer.projection.bias"


def damaged(value: float):
    def change(tensors):
        tensors[WEIGHT][3, 2] = value

    return change


def without(*names):
    def change(tensors):
        for name in names:
            del tensors[name]

    return change


def instead(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name]) if name in tensors else value(torch.ones(2))

    return change


BAD_WEIGHTS = {
    "one NaN": (damaged(torch.nan), f"NaN or Inf in {WEIGHT}"),
    "one infinite number": (damaged(-torch.inf), f"NaN or Inf in {WEIGHT}"),
    "all NaN": (
        lambda tensors: tensors.update({name: tensor * torch.nan for name, tensor in tensors.items()}),
        "NaN or Inf in .* more",
    ),
    "no tensors": (lambda tensors: tensors.clear(), "it lacks"),
    "a tensor missing": (without(WEIGHT), f"it lacks {WEIGHT}"),
    "half of the tokenizer": (without(BIAS), f"it lacks {BIAS}"),
    "a tensor more": (instead("head.weight", lambda _: torch.ones(2)), "an encoder of size XS has no head.weight"),
    "integers": (instead(BIAS, lambda tensor: tensor.long()), f"no floating-point numbers in {BIAS}"),
    "truth values": (instead(BIAS, lambda tensor: tensor > 0), f"no floating-point numbers in {BIAS}"),
    "another shape": (instead(WEIGHT, lambda tensor: tensor.T), f"calls for other shapes of {WEIGHT}"),
    "no elements": (instead(WEIGHT, lambda tensor: tensor[:0]), f"calls for other shapes of {WEIGHT}"),
    "beyond single precision": (instead(BIAS, lambda tensor: tensor.double() + 1e300), f"NaN or Inf in {BIAS}"),
}


@pytest.mark.parametrize(("change", "reason"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_that_are_none_of_an_encoder_are_neither_read_nor_written(tmp_path, encoder, change, reason):
    tensors = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    change(tensors)
    file = tmp_path / "encoder.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {CARD_KEY: make_card().to_json()})
    assert re.search(reason, refused(file))
    with pytest.raises(UserError, match=reason):
        encoder_content(tensors, make_card())


def test_a_converted_encoder_may_lack_the_tokenizer_as_a_whole(encoder):
    tensors = {name: tensor for name, tensor in encoder.state_dict().items() if not name.startswith("tokenizer.")}
    check_encoder(tensors, make_card())


BAD_ENTRIES = {
    "size": ["XXL", 3, None, ["S"]],
    "token": [[2, 4], [3, 4, 8], [2, 4, 8.5], ["2", "4", "8"], "248", [], [2, 4, -8], [10**30] * 3],
    "adaptive": ["yes", 1, None],
    "modality_vectors": ["two_hot", 0],
    "channel_names": [[], "CT", [1, 2], ["CT"], None],
    "dataset": [3, None],
    "fold": [0],
    "patch_size": [[0, 1, 1], [1.5, 2, 2], "32", [1, 2, 3, 4], [1, 2]],
    "spacing": [
        [1.0, 1.0],
        [1.0] * 4,
        [0.0, 1, 1],
        [-1.0, 1, 1],
        [1.0, float("nan"), 1],
        [1.0, float("inf"), 1],
        {"z": 1},
    ],
    "normalization": ["CTNormalization", [3], None, []],
    "transpose_forward": [[0, 1], [0, 0, 1], [1, 2, 3], "zyx", None],
    "cases_seen": ["abc", [1], None],
    "epochs": [-1, 1.5, "800", True],
    "steps": [-1, None],
    "loss": [float("nan"), float("inf"), "small", None],
    "pretraining": [[], None, "mae"],
    "seed": ["7", 1.5],
    "data_licence": [None, {}],
    "packages": [[], {"torch": 2.4}],
    "network": [[], {"positions": "nowhere"}, {"size": "S"}, {"learned_positions": [10**9] * 3}, {"blocks": 3}],
    "source": [None, 4],
    "notes": ["a note", [1]],
}


@pytest.mark.parametrize(
    ("entry", "value"), [(entry, value) for entry, values in BAD_ENTRIES.items() for value in values]
)
def test_every_entry_of_a_card_is_checked(tmp_path, encoder, entry, value):
    file = tmp_path / "encoder.safetensors"
    entries = json.loads(make_card().to_json()) | {entry: value}
    save_file(encoder.state_dict(), file, {CARD_KEY: json.dumps(entries)})
    message = refused(file)
    assert message.startswith(f"The encoder {file} cannot be used: ")
    assert message.endswith(".")


def test_no_entry_of_a_card_is_without_a_bad_value():
    text = {"plans", "configuration", "data_fingerprint"}  # as `dataset`
    assert {entry.name for entry in dataclasses.fields(Card)} == BAD_ENTRIES.keys() | text


@pytest.mark.parametrize("card", ["[" * 100_000, "1" * 5000, '{"size": "\\ud800"}'])
def test_a_card_that_breaks_readers_is_refused(tmp_path, card):
    file = tmp_path / "encoder.safetensors"
    save_file({"weight": torch.zeros(1)}, file, metadata={CARD_KEY: card})
    assert "card" in refused(file)


# ---------- hashes of files


def test_the_same_encoder_and_card_give_the_same_hash(file, encoder, tmp_path):
    save_encoder(encoder, make_card(), tmp_path / "again.safetensors")
    assert file_hash(tmp_path / "again.safetensors") == file_hash(file)
