"""Encoder files: what is written comes back, and what is not an encoder of ours is refused without running it."""

import dataclasses
import io
import json
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.presets import Network, Pretraining
from nnunet_vit_mae.weights import CARD_KEY, Card, file_hash, hashed_name, load_encoder, package_versions, save_encoder

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
        load_encoder(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


# ---------- what is written comes back


def test_tensors_come_back_bitwise(file, encoder):
    tensors, _ = load_encoder(file)
    written = encoder.state_dict()
    assert set(tensors) == set(written)
    for name, tensor in tensors.items():
        assert tensor.dtype == written[name].dtype
        assert tensor.numpy().tobytes() == written[name].numpy().tobytes()


def test_tensors_that_are_not_contiguous_come_back(tmp_path):
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    save_encoder(module, make_card(), tmp_path / "encoder.safetensors")
    tensors, _ = load_encoder(tmp_path / "encoder.safetensors")
    assert tensors["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_special_numbers_come_back_bitwise(tmp_path):
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]))
    save_encoder(module, make_card(), tmp_path / "encoder.safetensors")
    tensors, _ = load_encoder(tmp_path / "encoder.safetensors")
    assert tensors["weight"].numpy().tobytes() == module.weight.detach().numpy().tobytes()


def test_the_card_comes_back(file):
    assert load_encoder(file)[1] == make_card()


@given(
    dataset=st.text(),
    loss=st.floats(allow_nan=False),
    seed=st.integers(),
    names=st.lists(st.text(), max_size=3),
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
    assert load_encoder(file)[1].epochs == 3
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


# ---------- files that are no encoders


def test_a_missing_file_is_named(tmp_path):
    assert refused(tmp_path / "none.safetensors").endswith("is missing.")


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


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("write", [lambda trap, file: file.write_bytes(pickle.dumps(trap)), torch.save])
def test_a_pickle_under_our_name_is_refused_and_never_unpickled(tmp_path, write):
    file, marker = tmp_path / "encoder.safetensors", tmp_path / "marker"
    write(Trap(marker), file)
    assert "damaged or not a safetensors file" in refused(file)
    assert not marker.exists()
    content = io.BytesIO(file.read_bytes())
    torch.load(content, weights_only=False) if write is torch.save else pickle.load(content)
    assert marker.exists()  # the trap does work


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


@pytest.mark.parametrize("card", ["not json", "[1, 2]", "3", "null", "{}"])
def test_a_card_that_is_none_is_refused(tmp_path, card):
    file = tmp_path / "encoder.safetensors"
    save_file({"weight": torch.zeros(1)}, file, metadata={CARD_KEY: card})
    with pytest.raises(UserError, match="card"):
        load_encoder(file)


# ---------- hashes of files


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
)
def test_a_files_hash_is_the_sha_256_of_its_bytes(tmp_path, content, expected):
    (tmp_path / "file").write_bytes(content)
    assert file_hash(tmp_path / "file") == expected


def test_a_files_hash_changes_with_a_single_bit_of_it(file):
    before, content = file_hash(file), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert file_hash(file) != before


def test_the_same_encoder_and_card_give_the_same_hash(file, encoder, tmp_path):
    save_encoder(encoder, make_card(), tmp_path / "again.safetensors")
    assert file_hash(tmp_path / "again.safetensors") == file_hash(file)
