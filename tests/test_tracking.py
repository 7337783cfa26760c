"""What a training reports: a table with a row for each epoch, TensorBoard's files, Weights & Biases if it is on."""

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest

from nnunet_vit_mae import tracking
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.csv_tables import read_rows
from nnunet_vit_mae.tracking import METRICS, MetricsTable, StepClock, TensorBoard, open_trackers, read_switch

DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("train_losses", "lrs")


def numbers(epoch, factor=1.0):
    return {"lrs": 1e-3 / (epoch + 1), "train_losses": factor * epoch, "dice/class_1": 0.5}


def column(file, name):
    return [float(row[name]) for row in read_rows(file)]


def test_the_table_has_a_row_an_epoch_with_known_columns_first(tmp_path):
    table = MetricsTable(tmp_path)
    for epoch in range(3):
        table.log(epoch, numbers(epoch))
        assert column(tmp_path / "metrics.csv", "epoch") == list(range(epoch + 1))
    header, first, *_ = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header == "epoch,train_losses,lrs,dice/class_1"
    assert first == "0,0.0,0.001,0.5"


def test_a_run_that_goes_on_loses_and_repeats_no_epoch(tmp_path):
    before = MetricsTable(tmp_path)
    for epoch in range(4):
        before.log(epoch, numbers(epoch, factor=2))
    after = MetricsTable(tmp_path)  # from a checkpoint after the second epoch
    for epoch in (2, 3, 4):
        after.log(epoch, numbers(epoch, factor=3) | {"val_losses": 7.0})
    assert column(tmp_path / "metrics.csv", "epoch") == [0, 1, 2, 3, 4]
    assert column(tmp_path / "metrics.csv", "train_losses") == [0, 2, 6, 9, 12]
    assert [row["val_losses"] for row in read_rows(tmp_path / "metrics.csv")] == ["", "", "7.0", "7.0", "7.0"]


def test_a_number_that_is_not_finite_is_an_empty_cell(tmp_path):
    MetricsTable(tmp_path).log(0, {"mean_fg_dice": float("nan"), "lrs": 0.1, "val_losses": float("inf")})
    assert read_rows(tmp_path / "metrics.csv") == [{"epoch": "0", "lrs": "0.1"}]


@pytest.mark.parametrize("content", ["case,dice\na,0.5\n", "epoch,lrs\none,0.5\n", "epoch,lrs\n0\n", "PK\x03\x04"])
def test_another_table_of_that_name_is_refused_and_kept(tmp_path, content):
    file = tmp_path / "metrics.csv"
    file.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.csv is not the table of a training: move it away"):
        MetricsTable(tmp_path)
    assert file.read_text() == content


def test_tensorboard_reads_numbers_and_pictures_of_a_run_that_went_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "picture.png"
    matplotlib.image.imsave(picture, np.random.default_rng(0).random((6, 9, 3)))
    before = TensorBoard(tmp_path)
    for epoch in range(4):
        before.log(epoch, numbers(epoch, factor=2))  # killed: never closed
    after = TensorBoard(tmp_path)
    for epoch in (2, 3, 4):
        after.log(epoch, numbers(epoch, factor=3) | {"val_losses": float("nan")})
    after.show(4, "reconstructions", picture)
    after.close()

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == set(numbers(0))
    assert [(event.step, event.value) for event in events.Scalars("train_losses")] == [
        (0, 0), (1, 2), (2, 6), (3, 9), (4, 12)
    ]  # fmt: skip
    (image,) = events.Images("reconstructions")
    assert (image.step, image.height, image.width) == (4, 6, 9)


@pytest.mark.parametrize(
    ("switch", "installed", "wanted"), [(None, True, True), (None, False, False), ("0", True, False)]
)
def test_tensorboard_is_written_where_it_is_installed_unless_it_is_off(
    monkeypatch, tmp_path, switch, installed, wanted
):
    monkeypatch.setattr(tracking, "find_spec", lambda _: installed or None)
    monkeypatch.delenv("MAE3D_TENSORBOARD", raising=False)
    if switch:
        monkeypatch.setenv("MAE3D_TENSORBOARD", switch)
    assert [type(tracker) for tracker in open_trackers(tmp_path)] == [MetricsTable, *[TensorBoard] * wanted]
    assert not list(tmp_path.iterdir())


def test_tensorboard_that_is_asked_for_and_missing_is_a_mistake(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    monkeypatch.setenv("MAE3D_TENSORBOARD", "1")
    with pytest.raises(UserError, match=r"TensorBoard is missing: pip install \"nnunet-vit-mae\[tracking\]\""):
        open_trackers(tmp_path)


@pytest.mark.parametrize("text", ["", "yes", "2"])
def test_a_switch_is_on_or_off(monkeypatch, text):
    monkeypatch.setenv("MAE3D_TENSORBOARD", text)
    with pytest.raises(UserError, match=r"set it to 1 \(on\) or 0 \(off\)"):
        read_switch("MAE3D_TENSORBOARD")


def test_a_clock_tells_steps_from_waiting(monkeypatch):
    now = SimpleNamespace(monotonic=lambda: now.seconds, seconds=10.0)
    monkeypatch.setattr(tracking, "time", now)
    clock = StepClock()
    assert clock.metrics == {}
    for wait, work in ((3.0, 1.0), (1.0, 3.0)):
        now.seconds += wait
        clock.batch_came()
        now.seconds += work
        clock.step_done()
    assert clock.metrics == {"seconds_per_step": 4.0, "waiting_share": 0.5}


class FakeRun:
    """What nnU-Net's logger uses of a run of Weights & Biases."""

    def __init__(self):
        self.step, self.config, self.summary, self.logged, self.finished = 0, {}, {}, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    from nnunetv2.training.logging import nnunet_logger

    run = FakeRun()
    fake = SimpleNamespace(run=run, init=lambda **_: run, Image=lambda file: ("image", file), Error=RuntimeError)
    monkeypatch.setattr(nnunet_logger, "wandb", fake)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    return fake


JOB = SimpleNamespace(to_dict=lambda: {"cases": ["miller_jane"], "patch_size": [8, 12, 10]})


def test_pretraining_goes_to_nnunets_own_logger_without_names_of_cases(wandb, tmp_path):
    from nnunet_vit_mae.nnunet.wandb_tracker import wandb_tracker

    (tracker,) = wandb_tracker(JOB, tmp_path, False)
    tracker.log(0, {"train_losses": 0.5, "lrs": 0.1})
    tracker.show(0, "reconstructions", tmp_path / "a.png")
    tracker.close()
    assert wandb.run.config["patch_size"] == [8, 12, 10]
    assert "cases" not in wandb.run.config
    image = ("image", str(tmp_path / "a.png"))
    assert wandb.run.logged == [(0, {"train_losses": 0.5}), (0, {"lrs": 0.1}), (0, {"reconstructions": image})]
    assert wandb.run.finished


def test_without_the_switch_nothing_is_sent(wandb, tmp_path, monkeypatch):
    from nnunet_vit_mae.nnunet.wandb_tracker import wandb_tracker

    for value in ("0", None):
        monkeypatch.delenv("nnUNet_wandb_enabled")
        if value:
            monkeypatch.setenv("nnUNet_wandb_enabled", value)
        wandb.init = None
        assert list(wandb_tracker(JOB, tmp_path, False)) == []
        monkeypatch.setenv("nnUNet_wandb_enabled", "1")


def test_mistakes_with_wandb_are_one_sentence(wandb, tmp_path, monkeypatch):
    from nnunetv2.training.logging import nnunet_logger

    from nnunet_vit_mae.nnunet.wandb_tracker import check_wandb, wandb_tracker

    def refuse(**_):
        raise RuntimeError("not logged in")

    wandb.init = refuse
    with pytest.raises(UserError, match=r"refuses a run \(not logged in\): log in with wandb login"):
        wandb_tracker(JOB, tmp_path, False)
    monkeypatch.setattr(nnunet_logger, "wandb", None)
    with pytest.raises(UserError, match="wandb is missing: pip install wandb"):
        check_wandb()
    monkeypatch.setenv("nnUNet_wandb_enabled", "yes")
    with pytest.raises(UserError, match="nnUNet_wandb_enabled is 'yes'"):
        check_wandb()


def test_in_the_other_processes_of_a_training_wandb_is_off(wandb, monkeypatch):
    from nnunet_vit_mae.nnunet import wandb_tracker

    rank = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: rank.number)
    monkeypatch.setattr(wandb_tracker, "dist", rank)
    for rank.number, on in ((0, True), (1, False)):
        assert wandb_tracker.check_wandb() == on
        assert read_switch("nnUNet_wandb_enabled") == on


def test_the_reference_lists_the_metrics():
    (table,) = re.findall(r"\| metric \|.*?\n\n", (DOCS / "reference.md").read_text(), re.DOTALL)
    listed = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert dict(listed) == METRICS
