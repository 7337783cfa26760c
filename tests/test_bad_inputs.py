"""Every mistake of `bad_inputs.py` gets one sentence, exit code 2, no traceback, and changes no file."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import ROWS, page
from conftest import Workspace, blob, write_case
from in_process import run_in_process

DOCUMENT = Path(__file__).parent.parent / "docs" / "bad_inputs.md"


@pytest.fixture(scope="module")
def used(planned: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which all was done once: unlabelled images, pre-training and a trained model."""
    root = tmp_path_factory.mktemp("bad") / "nnunet"
    shutil.copytree(planned.root, root)
    workspace = Workspace(root)
    for number in range(2):
        write_case(workspace.raw / "imagesTs", f"test_{number}", *blob(20 + number))
    for command in (
        "mae3d_preprocess -d 901 -np 1",
        "mae3d_plan -d 901 -o Tiny --size XS --token 8 --epochs 1 --iterations 1 --batch_size 2",
        "mae3d_pretrain -d 901 -p Tiny -f 0 --epochs 2 --batch_size 3 -device cpu",
        "nnUNetv2_train 901 3d_fullres 0 -p Tiny -tr nnUNetTrainerViTMAE -device cpu --npz",
        f"mae3d_export -d 901 -p Tiny -o {root / 'model.zip'}",
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
    return shutil.copytree(used.root, tmp_path_factory.mktemp("pristine") / "nnunet")


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


def test_there_are_enough_of_every_command():
    assert len(ROWS) >= 120
    scripts = re.findall(r"^(mae3d_\w+) =", (DOCUMENT.parent.parent / "pyproject.toml").read_text(), re.MULTILINE)
    assert {row.command.split()[0] for row in ROWS} >= set(scripts)
    assert len({(row.what, row.command) for row in ROWS}) == len(ROWS)


def test_the_document_lists_them():
    assert DOCUMENT.read_text(encoding="utf-8") == page()
