"""`mae3d_demo` as it is typed, in full: what the README promises."""

import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest

from nnunet_vit_mae.cli import demo
from nnunet_vit_mae.demonstration import MODELS, Shell
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.csv_tables import read_rows


def test_a_folder_in_use_is_refused(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("precious")
    assert "already exists" in refused(demo.main, "-o", str(tmp_path))
    assert "already exists" in refused(demo.main, "-o", str(tmp_path / "mine.txt"))
    assert "is not between 0" in refused(demo.main, "-o", str(tmp_path / "new"), "--seed", "-1")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_commands_run_side_by_side_with_a_log_each(tmp_path):
    shell = Shell(tmp_path)
    shell.type("mae3d_trainers", "mae3d_demo --help", nnUNet_n_proc_DA="1")
    first, second = sorted((tmp_path / "logs").iterdir())
    assert (first.name, second.name) == ("01_mae3d_trainers.txt", "02_mae3d_demo.txt")
    assert "--seed" in second.read_text()


def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    with pytest.raises(UserError, match=r"mae3d_plan failed with exit code 2: see the end of .*02_mae3d_plan.txt"):
        Shell(tmp_path).type("mae3d_trainers", "mae3d_plan")
    assert "required" in (tmp_path / "logs" / "02_mae3d_plan.txt").read_text()


@pytest.mark.slow
def test_the_demonstration_runs_and_its_models_have_learned(tmp_path):
    started = time.monotonic()
    program = Path(sys.executable).with_name("mae3d_demo")
    folder = tmp_path / "my demo"
    done = subprocess.run([program, "-o", folder], capture_output=True, text=True, check=False)
    logs = sorted((folder / "logs").iterdir(), key=lambda log: log.stat().st_mtime)
    assert done.returncode == 0, done.stdout + done.stderr + "".join(log.read_text()[-3000:] for log in logs[-2:])
    print(done.stdout, f"{time.monotonic() - started:.0f} s in all")

    scores = read_rows(folder / "report" / "cases.csv")
    dice = {model: np.mean([float(s["dice"]) for s in scores if s["model"] == model]) for model in MODELS}
    assert len(scores) == 3 * 16
    assert dice["nnU-Net"] > 0.6
    assert dice["ViT, pre-trained"] > 0.6
    assert all(f"{value:.3f}" in done.stdout for value in dice.values())
    page = Path(url2pathname(urlsplit(done.stdout.split()[-1]).path))
    assert page == folder.resolve() / "report" / "index.html"
    assert page.is_file()
    assert (folder / "results.png").stat().st_size > 10_000
    assert len(list((folder / "results").rglob("reconstructions/*.png"))) == 20
