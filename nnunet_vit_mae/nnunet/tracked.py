"""nnU-Net's trainer, tracked: all that nnU-Net logs of an epoch, and how its steps went, goes to trackers as well."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_vit_mae.nnunet.watched import WatchedTrainer
from nnunet_vit_mae.tracking import StepClock, Trackers, open_trackers

LAST = "epoch_end_timestamps"  # of what nnU-Net logs in an epoch, just before it saves


class TrackedTrainer(WatchedTrainer):
    """Give the numbers of each epoch to the trackers, in the first process alone."""

    clock: StepClock

    def on_train_start(self) -> None:
        """Begin as nnU-Net does, and open the trackers beside nnU-Net's own loggers."""
        super().on_train_start()
        if self.local_rank == 0:
            self.logger.loggers.append(EpochLogger(Trackers(open_trackers(Path(self.output_folder)))))

    def on_train_epoch_start(self) -> None:
        """Begin an epoch as nnU-Net does."""
        super().on_train_epoch_start()
        self.clock = StepClock()

    def train_step(self, batch: dict) -> dict:
        """Take a step; what passes between two of them is the wait for a batch."""
        self.clock.batch_came()
        result = super().train_step(batch)
        self.clock.step_done()
        return result

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """End an epoch as nnU-Net does, and log how its steps went."""
        super().on_train_epoch_end(train_outputs)
        for name, value in (self.clock.metrics | self.norm_metrics).items():
            for logger in self.logger.loggers:  # nnU-Net's local one takes no names but its own
                logger.log(name, value, self.current_epoch)

    def on_train_end(self) -> None:
        """End as nnU-Net does, and close the trackers."""
        super().on_train_end()
        for logger in self.logger.loggers:
            if isinstance(logger, EpochLogger):
                logger.trackers.close()


class EpochLogger:
    """A logger as nnU-Net has them, that gives all numbers of an epoch to trackers at once."""

    def __init__(self, trackers: Trackers):
        self.trackers = trackers
        self._metrics: dict[str, float] = {}

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Leave out the plans, which are in the folder of the model."""

    def log(self, key: str, value: float, step: int) -> None:
        """Note a number; with the last of an epoch, pass all of them on."""
        self._metrics[key] = float(value)
        if key == LAST:
            seconds = self._metrics[LAST] - self._metrics["epoch_start_timestamps"]
            self.trackers.log(step, self._metrics | {"seconds_per_epoch": seconds})
            self._metrics = {}

    def log_summary(self, key: str, value: Any) -> None:
        """Leave out what the final validation writes to `summary.json`."""
