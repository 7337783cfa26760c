"""The examples in docstrings do what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from test_weights import make_card

import nnunet_vit_mae
from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.weights import save_encoder

PACKAGE = Path(nnunet_vit_mae.__file__).parent
ELSEWHERE = {"nnunet_vit_mae.nnunet.quantification"}  # test_calibration has a trained model for its example
MODULES = sorted(
    {
        ".".join(("nnunet_vit_mae", *file.relative_to(PACKAGE).with_suffix("").parts))
        for file in PACKAGE.rglob("*.py")
        if ">>>" in file.read_text(encoding="utf-8")
    }
    - ELSEWHERE
)


@pytest.fixture
def dataset(in_workspace):
    """`-d 901` with plans for a tiny network."""
    in_workspace.call(*"mae3d_plan -d 901 -o Tiny --size XS --token 8".split())


@pytest.fixture
def encoder_here(tmp_path):
    """A file `encoder.safetensors`."""
    card = make_card(channel_names=["T1", "FLAIR"])
    save_encoder(build_encoder(card.settings, 2), card, tmp_path / "encoder.safetensors")


NEEDED = {
    "nnunet_vit_mae.nnunet.plans": "in_workspace",
    "nnunet_vit_mae.nnunet.pretraining": "dataset",
    "nnunet_vit_mae.weights": "encoder_here",
}


def test_there_are_examples():
    assert "nnunet_vit_mae.planning" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_show(module, request, tmp_path, monkeypatch):
    if module in NEEDED:
        request.getfixturevalue(NEEDED[module])
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed
