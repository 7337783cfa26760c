"""What a training reports while it runs: a table in its folder, and TensorBoard.

Pre-training and our trainers give the numbers of each epoch to the same trackers, under nnU-Net's names where it has
one. Epochs count from 0, as nnU-Net counts them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.storage.csv_tables import read_rows, write_records

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard.writer import SummaryWriter

TABLE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard"
TENSORBOARD_SWITCH = "MAE3D_TENSORBOARD"
SWITCH_VALUES = {"0": False, "False": False, "false": False, "1": True, "True": True, "true": True}  # nnU-Net's own

METRICS = {  # in the order of the table's columns, before the Dice of each class
    "train_losses": "mean loss of the steps",
    "val_losses": "mean loss of the validation steps",
    "mean_fg_dice": "pseudo-Dice on validation patches, mean of the classes",
    "ema_fg_dice": "its moving average, which decides which checkpoint is the best",
    "lrs": "learning rate: of the epoch's last step in pre-training, of its first in a training",
    "gradient_norms": "mean norm of the gradients, before they are clipped",
    "gradient_norms_max": "the largest of them",
    "seconds_per_step": "time of a training step, with the wait for its batch",
    "seconds_per_epoch": "time of the epoch, with validation",
    "waiting_share": "share of the time of the training steps that went into waiting for batches",
    "epoch_start_timestamps": "when it started, in seconds since 1970",
    "epoch_end_timestamps": "when it ended",
}


def metrics_of_norms(norms: Tensor) -> dict[str, float]:
    """Return what is reported of the gradient norms of an epoch's steps (n)."""
    return {"gradient_norms": float(norms.mean()), "gradient_norms_max": float(norms.max())}


class Tracker(Protocol):
    """One place to which a training reports."""

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers of an epoch. Whatever there is of it and later epochs is of a run that was cut off."""
        ...

    def show(self, epoch: int, name: str, picture: Path) -> None:
        """Take a picture (PNG) of an epoch, after its numbers."""
        ...

    def close(self) -> None:
        """End the report."""
        ...


class MetricsTable:
    """A CSV file with a row for each epoch, which is whole at any time."""

    def __init__(self, folder: Path):
        """Read what an earlier run has left; raises `UserError` if that is not such a table."""
        self.file = folder / TABLE
        self._rows: list[dict[str, Any]] = _read(self.file) if self.file.is_file() else []

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the row of an epoch; a number that is NaN or infinite is an empty cell."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._rows = [row for row in self._rows if int(row["epoch"]) < epoch] + [{"epoch": epoch} | finite]
        names = dict.fromkeys(name for row in self._rows for name in row)
        known = [name for name in ("epoch", *METRICS) if name in names]
        write_records(self._rows, [*known, *(name for name in names if name not in known)], self.file)

    def show(self, epoch: int, name: str, picture: Path) -> None:
        """Leave out pictures: they are files in the same folder."""

    def close(self) -> None:
        """Leave the file, which is whole."""


class TensorBoard:
    """TensorBoard's event files, in a folder inside the run's; no other machine is asked or told anything."""

    def __init__(self, folder: Path):
        self.folder = folder / TENSORBOARD_FOLDER
        self._writer: SummaryWriter | None = None

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the numbers of an epoch; those that are NaN or infinite are left out."""
        writer = self._open(epoch)
        for name, value in metrics.items():
            if math.isfinite(value):
                writer.add_scalar(name, value, epoch)
        writer.flush()  # so that a killed run has lost nothing

    def show(self, epoch: int, name: str, picture: Path) -> None:
        """Write a picture."""
        from matplotlib.image import imread

        writer = self._open(epoch)
        writer.add_image(name, imread(picture), epoch, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer:
            self._writer.close()

    def _open(self, epoch: int) -> SummaryWriter:
        """Return the writer; its first event lets readers forget this epoch and later ones of earlier runs."""
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=epoch)
        return self._writer


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Iterable[Tracker] = ()):
        self.trackers = list(trackers)

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Give the numbers of an epoch to all."""
        for tracker in self.trackers:
            tracker.log(epoch, metrics)

    def show(self, epoch: int, name: str, picture: Path) -> None:
        """Give a picture of an epoch to all."""
        for tracker in self.trackers:
            tracker.show(epoch, name, picture)

    def close(self) -> None:
        """Close all."""
        for tracker in self.trackers:
            tracker.close()


class StepClock:
    """How long the training steps of an epoch take, and how long they wait for their batches."""

    def __init__(self) -> None:
        self.steps, self.waited = 0, 0.0
        self.started = self.stepped = time.monotonic()

    def batch_came(self) -> None:
        """Note that the wait for a batch is over."""
        self.waited += time.monotonic() - self.stepped

    def step_done(self) -> None:
        """Note that its step is done, so that the wait for the next one begins."""
        self.steps, self.stepped = self.steps + 1, time.monotonic()

    @property
    def seconds(self) -> float:
        """Return the time until the last step was done."""
        return self.stepped - self.started

    @property
    def metrics(self) -> dict[str, float]:
        """Return the numbers for trackers; none for an epoch whose steps were all taken before."""
        if not self.steps:
            return {}
        return {"seconds_per_step": self.seconds / self.steps, "waiting_share": self.waited / self.seconds}


def open_trackers(folder: Path) -> list[Tracker]:
    """Return the trackers that need nothing but the run's folder: the table, and TensorBoard if it is wanted."""
    return [MetricsTable(folder), *([TensorBoard(folder)] if wants_tensorboard() else [])]


def wants_tensorboard() -> bool:
    """Return whether to write for TensorBoard: as the switch says, else if it is installed.

    Raises:
        UserError: If the switch is on and TensorBoard is not installed, or if the switch has another value.
    """
    installed, wanted = find_spec("tensorboard") is not None, read_switch(TENSORBOARD_SWITCH)
    if wanted and not installed:
        raise UserError(
            f'{TENSORBOARD_SWITCH} is on, but TensorBoard is missing: pip install "nnunet-vit-mae[tracking]", or unset '
            "the variable."
        )
    return installed if wanted is None else wanted


def read_switch(variable: str) -> bool | None:
    """Return the value of an environment variable that is on (1) or off (0), None if it is unset.

    Raises:
        UserError: If it is neither.
    """
    text = os.environ.get(variable)
    if text is not None and text not in SWITCH_VALUES:
        raise UserError(f"The variable {variable} is {text!r}: set it to 1 (on) or 0 (off).")
    return None if text is None else SWITCH_VALUES[text]


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        rows = read_rows(file)
        return [row | {"epoch": int(row["epoch"])} for row in rows]
    except (ValueError, KeyError):
        raise UserError(f"{file} is not the table of a training: move it away, and run the command again.") from None
