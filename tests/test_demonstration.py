"""`mae3d_demo` as it is typed, in full: what the README promises."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnunet_vit_mae.cli import demo


def test_a_folder_in_use_is_refused(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("precious")
    assert "already exists" in refused(demo.main, "-o", str(tmp_path))
    assert "already exists" in refused(demo.main, "-o", str(tmp_path / "mine.txt"))
    assert "below 0" in refused(demo.main, "-o", str(tmp_path / "new"), "--seed", "-1")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_the_demonstration_runs_and_its_models_have_learned(tmp_path):
    started = time.monotonic()
    program = Path(sys.executable).with_name("mae3d_demo")
    done = subprocess.run([program, "-o", tmp_path / "my demo"], capture_output=True, text=True, check=False)
    log = tmp_path / "my demo" / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    print(done.stdout, f"{time.monotonic() - started:.0f} s in all")

    scores = list(csv.DictReader((tmp_path / "my demo" / "results.csv").read_text().splitlines()))
    dice = {
        model: np.mean([float(s["dice"]) for s in scores if s["model"] == model])
        for model in {s["model"] for s in scores}
    }
    assert set(dice) == {"ViT, pre-trained", "ViT, from scratch", "nnU-Net"}
    assert len(scores) == 3 * 8
    assert min(dice.values()) >= 0
    assert max(dice.values()) > 0.1
    assert all(f"{value:.3f}" in done.stdout for value in dice.values())
    assert (tmp_path / "my demo" / "results.png").stat().st_size > 10_000
    assert len(list((tmp_path / "my demo" / "results").rglob("reconstructions/*.png"))) == 20
