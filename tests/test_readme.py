"""The README.txt of output folders: the command as typed, what each file is, and nobody's name."""

import sys

import pytest

from nnunet_vit_mae import __version__
from nnunet_vit_mae.storage.readme import write_readme

CONTENTS = {"index.html": "the report", "figures/": "its figures"}


@pytest.fixture
def typed(monkeypatch):
    """The command that runs."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["/home/somebody/venv/bin/mae3d_evaluate", *arguments])

    run("-r", "labelsTs", "-p", "ViT S=out")
    return run


def test_it_repeats_the_command_and_says_what_each_file_is(typed, tmp_path):
    write_readme(tmp_path, CONTENTS)
    first, _, command, _, *lines = (tmp_path / "README.txt").read_text().splitlines()
    assert first.startswith(f"Written by nnunet-vit-mae {__version__} on 20")
    assert command == "    mae3d_evaluate -r labelsTs -p 'ViT S=out'"
    assert lines == ["index.html  the report", "figures/    its figures"]


def test_it_is_that_of_the_last_command(typed, tmp_path):
    write_readme(tmp_path, CONTENTS)
    typed("-r", "labelsTr")
    write_readme(tmp_path, CONTENTS)
    text = (tmp_path / "README.txt").read_text()
    assert "-r labelsTr" in text
    assert "-r labelsTs" not in text


def test_a_file_of_somebody_else_is_left(typed, tmp_path):
    (tmp_path / "README.txt").write_bytes(b"Notes of ours, J\xfcrgen\n")
    write_readme(tmp_path, CONTENTS)
    assert (tmp_path / "README.txt").read_bytes() == b"Notes of ours, J\xfcrgen\n"


def test_paths_that_may_name_people_are_left_out(typed, tmp_path):
    private = tmp_path / "miller_jane"
    typed("-i", f"{private}/", f"--key={private}", "-o", "Dataset501_A")
    write_readme(tmp_path, CONTENTS, private=(private, None))
    assert "    mae3d_evaluate -i ... --key=... -o Dataset501_A\n" in (tmp_path / "README.txt").read_text()
