"""Checkpoints of trainings: which one `--c` goes on from, and which are of another network than the plans."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.checkpoints import refuse_network_of_other_folds, refuse_other_network
from nnunet_vit_mae.nnunet.scheduled import ScheduledTrainer
from nnunet_vit_mae.nnunet.stopping import StoppableTrainer
from nnunet_vit_mae.settings import Network, Settings
from nnunet_vit_mae.storage.files import locked
from nnunet_vit_mae.storage.layout import BEST, FINAL, LATEST

CONFIGURATION = "3d_fullres"
NETWORK = {"size": "XS", "token": [2, 4, 8], "decoder": "unetr"}
SAME_SHAPES = {
    "positions": "sine_cosine",
    "position_unit": "mm",
    "rotary_base": 50.0,
    "norm_eps": 1e-6,
    "taps": [1, 2, 4],
    "upsampling": "transposed",
}


# ---------- an earlier training in the same folder


@pytest.fixture
def saving(tmp_path, monkeypatch):
    """Save a checkpoint of a name in a folder, whose content says when it was; gives what is logged."""
    logged: list[str] = []
    trainer = object.__new__(StoppableTrainer)
    trainer.local_rank, trainer.disable_checkpointing, trainer.saved_since = 0, False, 0.0
    monkeypatch.setattr(trainer, "print_to_log_file", logged.append)

    def save(name: str, content: str) -> list[str]:
        monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", lambda _, file: Path(file).write_text(content))
        trainer.save_checkpoint(str(tmp_path / name))
        return logged

    save.trainer = trainer
    return save


def contents(folder: Path) -> dict[str, str]:
    return {re.sub(r"until_[\d_-]+", "until", file.name): file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("first", [LATEST, BEST])
def test_what_is_saved_first_moves_the_end_of_an_earlier_training_aside(saving, tmp_path, first):
    """nnU-Net goes on from the final checkpoint wherever there is one."""
    saving(FINAL, "earlier")
    (tmp_path / "checkpoint_calibrated.pth").write_text("of the earlier one")
    logged = saving(first, "now")
    assert logged[0].startswith(f"{tmp_path / FINAL} of an earlier training is now checkpoint_final_until_")
    moved, calibrated = {"checkpoint_final_until.pth": "earlier"}, {"checkpoint_calibrated.pth": "of the earlier one"}
    assert contents(tmp_path) == {first: "now"} | moved | calibrated
    saving(FINAL, "the end")
    assert len(logged) == 1
    assert contents(tmp_path) == {first: "now", FINAL: "the end"} | moved | calibrated


def test_a_training_without_c_keeps_what_an_interrupted_one_has_saved(saving, tmp_path):
    """Days of it may be in the latest checkpoint, and only --c is missing."""
    for name in (LATEST, BEST):
        saving(name, f"{name} of days")
    saving.trainer.starts_anew = True
    logged = saving(LATEST, "first epoch")
    saving(BEST, "first epoch")
    assert [line.split(" is now ")[0] for line in logged] == [
        f"{tmp_path / name} of an earlier training" for name in (LATEST, BEST)
    ]
    moved = {f"checkpoint_{name}_until.pth": f"checkpoint_{name}.pth of days" for name in ("latest", "best")}
    assert contents(tmp_path) == {LATEST: "first epoch", BEST: "first epoch"} | moved
    saving(LATEST, "second epoch")
    assert len(logged) == 2


@pytest.mark.parametrize(("epoch", "anew"), [(0, True), (3, False)])
def test_a_training_starts_anew_in_its_first_epoch(tmp_path, monkeypatch, epoch, anew):
    trainer = object.__new__(StoppableTrainer)
    trainer.output_folder, trainer.current_epoch, trainer.num_epochs = str(tmp_path), epoch, 9
    trainer.local_rank = 0
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda _: None)
    trainer.run_training()
    assert trainer.starts_anew == anew


def test_half_checkpoints_of_trainings_that_were_killed_are_removed(tmp_path, monkeypatch):
    """They are hidden, and as large as checkpoints. Those of a calibration may be written now."""
    trainer = object.__new__(StoppableTrainer)
    trainer.output_folder, trainer.current_epoch, trainer.num_epochs, trainer.local_rank = str(tmp_path), 0, 9, 0
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda _: None)
    for name in (LATEST, BEST, FINAL, "checkpoint_calibrated.pth"):
        (tmp_path / f".123_0123abcd.{name}").touch()
    trainer.run_training()
    assert [file.name for file in tmp_path.iterdir()] == [".123_0123abcd.checkpoint_calibrated.pth"]


def test_two_processes_do_not_train_one_fold(tmp_path, monkeypatch, capsys):
    trainer = object.__new__(StoppableTrainer)
    trainer.output_folder, trainer.current_epoch, trainer.num_epochs = str(tmp_path / "fold_0"), 0, 9
    ranks = []
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: ranks.append(self.local_rank))
    with locked(tmp_path / "fold_0"):
        for trainer.local_rank in (1, 2):  # of the training that holds the lock
            trainer.run_training()
        trainer.local_rank = 0
        with pytest.raises(SystemExit):
            trainer.run_training()
        assert f"Another process is writing to {tmp_path / 'fold_0'}" in capsys.readouterr().err
    trainer.run_training()
    assert ranks == [1, 2, 0]


# ---------- other splits than those of the training


@pytest.fixture
def split_in(tmp_path, monkeypatch):
    """A trainer of fold 0, and the split that nnU-Net finds for it."""
    trainer, split = object.__new__(ScheduledTrainer), {"train": ["a", "b"], "val": ["c"]}
    trainer.output_folder, trainer.fold, trainer.local_rank = str(tmp_path), 0, 0
    trainer.preprocessed_dataset_folder_base, trainer.disable_checkpointing = str(tmp_path), False
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *_: None)
    monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", lambda _, file: Path(file).touch())
    monkeypatch.setattr(nnUNetTrainer, "do_split", lambda _: (split["train"], split["val"]))

    def datasets(self: ScheduledTrainer) -> tuple:
        return tuple(SimpleNamespace(identifiers=cases) for cases in self.do_split())

    monkeypatch.setattr(nnUNetTrainer, "get_tr_and_val_datasets", datasets)
    return trainer, split


def test_a_training_does_not_go_on_with_cases_of_its_training_to_validate_on(split_in, tmp_path, capsys):
    """Its Dice and its calibration would be those of cases that it knows."""
    trainer, split = split_in
    trainer.get_tr_and_val_datasets()
    trainer.save_checkpoint(str(tmp_path / LATEST))
    split["train"] = ["a", "b", "d"]  # more cases do no harm
    trainer.get_tr_and_val_datasets()
    trainer.save_checkpoint(str(tmp_path / LATEST))
    split |= {"train": ["a", "c"], "val": ["b", "d"]}
    with pytest.raises(SystemExit):
        trainer.get_tr_and_val_datasets()
    said = f"{tmp_path / LATEST} was trained on 2 of the cases that fold 0 is validated on (b, d), because"
    assert said in capsys.readouterr().err
    trainer.checkpoint_in_use = None  # without --c
    trainer.get_tr_and_val_datasets()
    trainer.save_checkpoint(str(tmp_path / LATEST))
    assert trainer.do_split() == (["a", "c"], ["b", "d"])


def test_fold_all_and_trainings_of_earlier_versions_have_any_split(split_in, tmp_path):
    trainer, split = split_in
    trainer.checkpoint_in_use = tmp_path / LATEST
    split |= {"train": ["c"], "val": ["a"]}
    assert trainer.do_split() == (["c"], ["a"])
    (tmp_path / "trained_on.json").write_text('["a"]')
    trainer.fold = "all"
    assert trainer.do_split() == (["c"], ["a"])


def test_a_validation_without_a_checkpoint_is_of_none(tmp_path, monkeypatch):
    """One of that name may be of an earlier training, and is not calibrated with probabilities of this one."""
    trainer = object.__new__(StoppableTrainer)
    trainer.local_rank, trainer.disable_checkpointing = 0, True
    monkeypatch.setattr(nnUNetTrainer, "save_checkpoint", lambda *_: None)
    trainer.save_checkpoint(str(tmp_path / FINAL))
    assert trainer.checkpoint_in_use is None


def test_a_training_that_is_complete_leaves_its_checkpoint_as_it_is(tmp_path, monkeypatch):
    """A calibration belongs to a file, which --c would write anew."""
    trainer, logged = object.__new__(StoppableTrainer), []
    trainer.output_folder, trainer.current_epoch, trainer.num_epochs = str(tmp_path), 2, 2
    trainer.local_rank = 0
    monkeypatch.setattr(trainer, "print_to_log_file", logged.append)
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda _: logged.append("trained"))
    for name, said in ((FINAL, f"The training is complete: {tmp_path / FINAL} stays as it is."), (BEST, "trained")):
        trainer.checkpoint_in_use = tmp_path / name
        trainer.run_training()
        assert logged.pop() == said
        assert not logged


def test_a_worse_epoch_does_not_pass_for_the_best_after_an_interruption(tmp_path, monkeypatch):
    """nnU-Net notes the best moving average after it has saved the latest checkpoint."""
    trainer = object.__new__(StoppableTrainer)

    def load(self: StoppableTrainer, _: str) -> None:
        self._best_ema, self.logger = 0.5, MetaLogger(str(tmp_path), False)
        for epoch, dice in enumerate([0.5, 0.9, 0.4]):
            self.logger.log("mean_fg_dice", dice, epoch)

    monkeypatch.setattr(nnUNetTrainer, "load_checkpoint", load)
    trainer.load_checkpoint(str(tmp_path / LATEST))
    assert trainer._best_ema == pytest.approx(0.9 * 0.5 + 0.1 * 0.9)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("hits", "averages", "best"),
    [([0, 2, None, 4], [0.0, 0.05, 0.05, 0.9 * 0.05 + 0.1 * 2 / 3], 3), ([None, 2, 0], [None, 0.5, 0.45], 1)],
)
def test_epochs_without_foreground_do_not_keep_later_ones_from_being_the_best(
    tmp_path, monkeypatch, hits, averages, best
):
    """Dice is 0 / 0 where nothing is there and nothing is found."""
    trainer, saved = object.__new__(StoppableTrainer), {}
    trainer.logger, trainer.output_folder = MetaLogger(str(tmp_path), False), str(tmp_path)
    trainer.is_ddp, trainer.local_rank, trainer.current_epoch, trainer.num_epochs = False, 1, 0, 9
    trainer._best_ema, trainer.save_every = None, 1
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *_: None)
    monkeypatch.setattr(trainer, "save_checkpoint", lambda file: saved.update({Path(file).name: trainer.current_epoch}))
    for epoch, hit in enumerate(hits):
        for name in ("train_losses", "epoch_start_timestamps"):
            trainer.logger.log(name, 0.0, epoch)
        tp, missed = (0, 0) if hit is None else (hit, 4)
        counts = {"tp_hard": tp, "fp_hard": 0, "fn_hard": missed}
        trainer.on_validation_epoch_end([{name: np.array([value]) for name, value in counts.items()} | {"loss": 0.0}])
        trainer.on_epoch_end()
    expected = [math.nan if average is None else average for average in averages]
    assert trainer.logger.get_value("ema_fg_dice", step=None) == pytest.approx(expected, nan_ok=True)
    assert saved == {LATEST: len(hits) - 1, BEST: best}


# ---------- another network than the plans'


def plans_of(network: dict) -> dict:
    return {"configurations": {CONFIGURATION: {"vit_mae": Settings.from_dict({"network": network}).to_dict()}}}


def refuse(trained: dict, now: dict) -> None:
    """Go on from a checkpoint of a network with the same weights."""
    network = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW([{"params": network.parameters(), "pretrained": False, "lr_scale": 1.0}])
    checkpoint = {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "init_args": {"plans": plans_of(trained), "configuration": CONFIGURATION},
    }
    planned = Settings.from_dict({"network": now}).network
    refuse_other_network(checkpoint, Path("fold_0", FINAL), network, optimizer, planned)


@pytest.mark.parametrize("setting", SAME_SHAPES)
def test_a_training_is_not_gone_on_with_a_network_of_other_settings_and_equal_weights(setting):
    refuse(NETWORK, NETWORK)
    with pytest.raises(UserError, match=rf"was started with other settings of the network: {setting} \(.* now\)"):
        refuse(NETWORK, NETWORK | {setting: SAME_SHAPES[setting]})


def test_what_changes_no_network_may_change():
    network = Settings.from_dict({"network": NETWORK})
    other = network.updated({"finetuning": {"epochs": 60, "lr": 0.1}})
    assert plans_of(NETWORK)["configurations"][CONFIGURATION]["vit_mae"] != other.to_dict()
    refuse(NETWORK, other.to_dict()["network"])


@pytest.fixture
def model(tmp_path):
    """A model whose fold 1 is trained; fold 0 has its folder and no checkpoint."""
    (tmp_path / "plans.json").write_text(json.dumps(plans_of(NETWORK)))
    for fold in range(2):
        (tmp_path / f"fold_{fold}").mkdir()
    (tmp_path / "fold_1" / LATEST).touch()
    return tmp_path


@pytest.mark.parametrize("setting", SAME_SHAPES)
def test_the_plans_of_a_fold_leave_the_network_of_the_others_as_it_is(model, setting):
    same, other = (
        Settings.from_dict({"network": NETWORK | change}).network for change in ({}, {setting: SAME_SHAPES[setting]})
    )
    for fold in ("fold_0", "fold_1"):
        refuse_network_of_other_folds(model / fold, CONFIGURATION, same)
    refuse_network_of_other_folds(model / "fold_1", CONFIGURATION, other)  # it is trained anew, and alone
    with pytest.raises(UserError, match=rf"training of fold_1 in .* had other settings of the network: {setting} "):
        refuse_network_of_other_folds(model / "fold_0", CONFIGURATION, other)


def test_a_first_fold_and_plans_without_a_block_are_fine(tmp_path, model):
    refuse_network_of_other_folds(tmp_path / "new" / "fold_0", CONFIGURATION, Network())
    (model / "plans.json").write_text(json.dumps({"configurations": {CONFIGURATION: {}}}))
    refuse_network_of_other_folds(model / "fold_0", CONFIGURATION, Network())
