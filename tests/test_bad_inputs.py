"""Every mistake of `bad_inputs.py` gets one sentence, exit code 2, no traceback, and changes no file."""

import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import ROWS, page
from conftest import Workspace, blob, write_case
from in_process import run_in_process

from nnunet_vit_mae.cli.arguments import parser_for
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.capacity import refuse_step_beyond

DOCUMENT = Path(__file__).parent.parent / "docs" / "bad_inputs.md"


@pytest.fixture(scope="module")
def used(planned: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which all was done once: unlabelled images, pre-training and a trained model."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("bad"))
    for number in range(2):
        write_case(workspace.raw / "imagesTs", f"test_{number}", *blob(20 + number))
    for command in (
        "mae3d_preprocess -d 901 -np 1",
        "mae3d_plan -d 901 -o Tiny --size XS --token 8 --decoder upscale --epochs 1 --iterations 1 --batch_size 2",
        "mae3d_pretrain -d 901 -p Tiny -f 0 --epochs 2 --batch_size 3 -device cpu",
        "nnUNetv2_train 901 3d_fullres 0 -p Tiny -tr nnUNetTrainerViTMAE -device cpu --npz",
        f"mae3d_export -d 901 -p Tiny -o {workspace.root / 'model.zip'}",
    ):
        workspace.call(*command.split())
    return workspace


def states(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but locks, and nnU-Net's logs, which its trainers begin before anything is known."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if not name.startswith("training_log") and not name.endswith(".lock"):
                file = Path(folder, name)
                found[str(file.relative_to(root))] = (file.lstat().st_size, file.lstat().st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def pristine(used: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workspace, from which each row's edits are undone."""
    return used.copied_to(tmp_path_factory.mktemp("pristine")).root


@pytest.fixture
def damaged(used: Workspace, pristine: Path) -> Iterator[Workspace]:
    """The workspace, to be edited; afterwards it is as it was."""
    yield used
    before, now = states(pristine), states(used.root)
    for name in now.keys() - before.keys():
        (used.root / name).unlink()
    for name, state in before.items():
        if now.get(name) != state:
            (used.root / name).unlink(missing_ok=True)
            shutil.copy2(pristine / name, used.root / name)
    for folder in sorted(used.root.rglob("*"), reverse=True):
        if folder.is_dir() and not (pristine / folder.relative_to(used.root)).exists() and not any(folder.iterdir()):
            folder.rmdir()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.command.split()[0]}: {row.what}" for row in ROWS])
def test_a_mistake_gets_one_sentence(row, damaged, monkeypatch):
    monkeypatch.chdir(damaged.root)
    row.edit(damaged.root)
    before = states(damaged.root)
    environment = {**damaged.environment, "nnUNet_n_proc_DA": "0", **row.environment}
    done = run_in_process(row.command.split(), environment)
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    sentences = [line for line in done.stderr.splitlines() if re.match(r"(Error|\w+: error|Not \w+): ", line)]
    assert len(sentences) == 1, done.stderr[-2000:]
    assert row.words in sentences[0]
    after = states(damaged.root)
    assert {file for file in before | after if before.get(file) != after.get(file)} == set()


def test_a_console_that_lacks_a_sign_is_no_reason_to_fail(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    parser_for("mae3d_check", None)
    print("label \u0142")
    console.flush()
    assert console.buffer.getvalue().splitlines() == [b"label \\u0142"]


@pytest.mark.parametrize(("available", "rehearsed"), [(10**6, False), (10**7, True), (10**12, False)])
def test_a_step_is_rehearsed_only_where_its_memory_may_matter(available, rehearsed):
    asked = []

    def ask() -> None:
        refuse_step_beyond(
            available, "this", shape=(2, 1, 99, 99, 99), estimate=lambda: asked.append(1) or 10**8, advice="give less"
        )

    if available == 10**12:
        ask()
    else:
        with pytest.raises(UserError, match="A step with a batch of 2 and a patch of 99 x 99 x 99 voxels needs about"):
            ask()
    assert bool(asked) == rehearsed


def test_there_are_enough_of_every_command():
    assert len(ROWS) >= 120
    scripts = re.findall(r"^(mae3d_\w+) =", (DOCUMENT.parent.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert {row.command.split()[0] for row in ROWS} >= set(scripts)
    assert len({(row.what, row.command) for row in ROWS}) == len(ROWS)


def test_the_document_lists_them():
    assert DOCUMENT.read_text(encoding="utf-8") == page()
