"""`mae3d_demo`: all of its commands at a smaller scale, and what it draws at its own."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
import torch

from nnunet_vit_mae import demonstration
from nnunet_vit_mae.cli import demo
from nnunet_vit_mae.demonstration import MINUTES, MODELS, Shell, Workload, demonstrate
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.phantoms.dataset import IMAGE_FOLDERS, write_phantom_dataset
from nnunet_vit_mae.recipes import read_recipe
from nnunet_vit_mae.storage.csv_tables import read_rows


def test_a_folder_in_use_is_refused(tmp_path, refused):
    (tmp_path / "mine.txt").write_text("precious")
    assert "already exists" in refused(demo.main, "-o", str(tmp_path))
    assert "already exists" in refused(demo.main, "-o", str(tmp_path / "mine.txt"))
    assert "is not from 0 to" in refused(demo.main, "-o", str(tmp_path / "new"), "--seed", "-1")
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
def test_the_demonstration_ends_in_a_report_of_models_that_learn(tmp_path, capfd, forked_commands):
    """All of its commands on fewer cases, with the networks, patches and batches of the whole one in fewer steps."""
    fewer = {"labelled": 6, "unlabelled": 2, "test": 3}
    recipe = read_recipe(MINUTES.recipe)
    recipe["pretraining"]["epochs"] = 6
    recipe["finetuning"] |= {"epochs": 3, "iterations": 6}
    (tmp_path / "short.json").write_text(json.dumps(recipe))
    folder = tmp_path / "my demo"
    page = demonstrate(folder, seed=0, workload=Workload(MINUTES.phantoms | fewer, str(tmp_path / "short.json")))

    assert page == folder / "report" / "index.html"
    assert page.is_file()
    scores = read_rows(folder / "report" / "cases.csv")
    assert [score["model"] for score in scores] == [model for model in MODELS for _ in range(3)]
    dice = {model: np.mean([float(s["dice"]) for s in scores if s["model"] == model]) for model in MODELS}
    printed = capfd.readouterr().out
    assert all(f"{value:.3f}" in printed for value in dice.values())
    assert (folder / "results.png").stat().st_size > 10_000
    pretrained = next((folder / "results").rglob("state.pt"))
    assert all(figure.stat().st_size > 0 for figure in (folder / "results").rglob("progress.png"))
    losses = {"pre-training": torch.load(pretrained, weights_only=True)["losses"]}
    assert list((pretrained.parent / "reconstructions").iterdir())
    for trainer in MODELS.values():
        (checkpoint,) = (folder / "results").glob(f"*/{trainer}__*/fold_0/checkpoint_final.pth")
        losses[trainer] = torch.load(checkpoint, weights_only=False)["logging"]["train_losses"]
    assert all(values[-1] < 0.85 * values[0] for values in losses.values()), losses


def test_the_command_draws_its_phantoms_before_it_types_the_first_command(tmp_path, monkeypatch, refused):
    """One scan of each kind here, for those of the demonstration take a while."""
    asked = []

    def draw_one_of_each(folder: Path, **settings: Any) -> Path:
        asked.append(settings)
        return write_phantom_dataset(folder, **{**settings, **dict.fromkeys(IMAGE_FOLDERS, 1)})

    class Stops(Shell):
        def type(self, *commands: str, **_: str) -> None:
            raise UserError(commands[0])

    monkeypatch.setattr(demonstration, "Shell", Stops)
    monkeypatch.setattr(demonstration, "write_phantom_dataset", draw_one_of_each)
    refused(demo.main, "-o", str(tmp_path / "demo"))
    (raw,) = (tmp_path / "demo" / "raw").iterdir()
    assert all(len(list((raw / folder).iterdir())) == 1 for folder in IMAGE_FOLDERS.values())
    assert asked == [{"dataset_id": 900, "seed": 0, **MINUTES.phantoms}]


def test_the_command_ends_with_a_link_to_the_report(tmp_path, monkeypatch, capsys):
    page = tmp_path / "my demo" / "report" / "index.html"
    monkeypatch.setattr(demonstration, "demonstrate", lambda folder, seed: folder / "report" / "index.html")
    demo.main(["-o", str(tmp_path / "my demo")])
    link = capsys.readouterr().out.split()[-1]
    assert Path(url2pathname(urlsplit(link).path)) == page
