"""The Python interface: small, lazy, typed, documented; and encoders for people who want features."""

import ast
import inspect
from pathlib import Path

import make_reference
import pytest
import torch
from test_package import imported_by
from test_weights import make_card

import nnunet_vit_mae
from nnunet_vit_mae import UserError, load_encoder
from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.weights import encoder_content, read_encoder, save_encoder

CONTRASTS = ["T1", "T2", "FLAIR"]


def test_the_package_is_imported_at_once():
    assert not imported_by("nnunet_vit_mae") & {"torch", "numpy", "nnunetv2", "pandas"}


@pytest.mark.parametrize("name", nnunet_vit_mae.API)
def test_every_name_is_found_and_documented(name):
    value = getattr(nnunet_vit_mae, name)
    assert value.__module__ == f"nnunet_vit_mae.{nnunet_vit_mae.API[name]}"
    assert inspect.getdoc(value)
    assert name in dir(nnunet_vit_mae)


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(nnunet_vit_mae.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module.partition(".")[2] for node in imports for alias in node.names if alias.asname}
    assert seen == nnunet_vit_mae.API


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="has no attribute 'pretrian'"):
        nnunet_vit_mae.pretrian  # noqa: B018


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_the_reference_is_current(name):
    """`python docs/make_reference.py` writes it."""
    assert (make_reference.FOLDER / name).read_text(encoding="utf-8") == make_reference.PAGES[name]()


# ---------- encoders for features


def saved(folder: Path, **changes) -> Path:
    card = make_card(**changes)
    torch.manual_seed(0)
    encoder = build_encoder(card.settings, len(card.channel_names), spacing=tuple(card.spacing))
    with torch.no_grad():  # at the start, contrasts have no factors of their own
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_encoder(encoder, card, folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


@pytest.fixture
def volume():
    return torch.randn(2, 3, 9, 18, 27, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("adaptive", [False, True])
def test_tokens_are_those_of_the_saved_weights_on_the_grid(tmp_path, volume, adaptive):
    file = saved(tmp_path, channel_names=CONTRASTS, adaptive=adaptive)
    encoder = load_encoder(str(file))
    tensors, card = read_encoder(file)
    assert not encoder.training
    assert encoder.card == card
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.encoder.state_dict().items())
    with torch.inference_mode():
        tokens, grid = encoder(volume)
        again, _ = encoder(volume[:1])
    assert grid == (5, 5, 4)
    assert tokens.shape == (2, 5 * 5 * 4, 96)
    torch.testing.assert_close(tokens[:1], again)


def test_an_adaptive_encoder_does_without_a_contrast(tmp_path, volume):
    encoder = load_encoder(saved(tmp_path, channel_names=CONTRASTS, adaptive=True))
    alone, other = torch.zeros_like(volume), volume.clone()
    alone[:, 2] = volume[:, 2]
    other[:, 0] = 0
    with torch.inference_mode():
        whole, one, two = (encoder(each)[0] for each in (volume, alone, other))
    assert whole.shape == one.shape == two.shape
    assert not torch.allclose(whole, two)
    assert not torch.allclose(one, two)


def test_positions_in_mm_follow_the_spacing_of_the_card(tmp_path, volume):
    network = {"position_unit": "mm"}
    fine, coarse = (
        load_encoder(saved(tmp_path / str(z), channel_names=CONTRASTS, network=network, spacing=[z, 0.8, 0.9]))
        for z in (1.0, 5.0)
    )
    with torch.inference_mode():
        assert not torch.allclose(fine(volume)[0], coarse(volume)[0])


@pytest.mark.parametrize("shape", [(3, 8, 8, 8), (1, 2, 8, 8, 8)])
def test_a_volume_of_other_channels_is_refused(tmp_path, shape):
    encoder = load_encoder(saved(tmp_path, channel_names=CONTRASTS))
    with pytest.raises(ValueError, match=r"must be \(b c z y x\) with 3 channels: T1, T2, FLAIR"):
        encoder(torch.zeros(shape))


def test_an_encoder_without_a_tokenizer_is_refused(tmp_path):
    tensors, card = read_encoder(saved(tmp_path, source="a stranger's checkpoint"))
    without = {name: tensor for name, tensor in tensors.items() if not name.startswith("tokenizer.")}
    (tmp_path / "other.safetensors").write_bytes(encoder_content(without, card))
    with pytest.raises(UserError, match=r"has no tokenizer \(converted from a stranger's checkpoint\)"):
        load_encoder(tmp_path / "other.safetensors")
