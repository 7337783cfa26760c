"""The examples in docstrings do what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import nnunet_vit_mae

PACKAGE = Path(nnunet_vit_mae.__file__).parent
MODULES = sorted(
    ".".join(("nnunet_vit_mae", *file.relative_to(PACKAGE).with_suffix("").parts))
    for file in PACKAGE.rglob("*.py")
    if ">>>" in file.read_text(encoding="utf-8")
)


def test_there_are_examples():
    assert "nnunet_vit_mae.planning" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_show(module):
    found = doctest.testmod(import_module(module))
    assert found.attempted
    assert not found.failed
