"""Weights & Biases through nnU-Net's own logger and its switches, for pre-training too.

The logger is imported only when it is switched on, because it imports seaborn and what that needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import distributed as dist

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.tracking import Tracker, read_switch

SWITCH = "nnUNet_wandb_enabled"


class WandbTracker:
    """nnU-Net's logger for Weights & Biases as a tracker. It sends what it gets, unless `nnUNet_wandb_mode=offline`."""

    def __init__(self, folder: Path, *, resume: bool, config: Mapping[str, Any]):
        from nnunetv2.training.logging import nnunet_logger

        self._wandb = nnunet_logger.wandb
        try:
            self._logger = nnunet_logger.WandbLogger(str(folder), resume)
        except self._wandb.Error as error:
            raise UserError(
                f"Weights & Biases refuses a run ({error}): log in with wandb login, set nnUNet_wandb_mode to offline, "
                f"or unset {SWITCH}."
            ) from None
        self._logger.update_config(config)

    def log(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Send the numbers of an epoch, unless an earlier process has."""
        for name, value in metrics.items():
            self._logger.log(name, value, epoch)

    def show(self, epoch: int, name: str, picture: Path) -> None:
        """Send a picture of an epoch."""
        self._logger.log(name, self._wandb.Image(str(picture)), epoch)

    def close(self) -> None:
        """Send what is left."""
        self._logger.run.finish()


def wandb_tracker(job: PretrainingJob, folder: Path, resumed: bool) -> Iterable[Tracker]:
    """Return the tracker of a pre-training, if it is switched on; names of cases stay here."""
    if not check_wandb():
        return []
    config = {name: value for name, value in job.to_dict().items() if name != "cases"}
    return [WandbTracker(folder, resume=resumed, config=config)]


def check_wandb() -> bool:
    """Return whether Weights & Biases is on, and switch it off in all processes of a training but the first.

    Raises:
        UserError: If the switch is neither on nor off, or wandb is missing.
    """
    if not read_switch(SWITCH):
        return False
    from nnunetv2.training.logging import nnunet_logger

    if nnunet_logger.wandb is None:
        raise UserError(f"{SWITCH} is on, but wandb is missing: pip install wandb, or unset the variable.")
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        os.environ[SWITCH] = "0"  # each of them would report the same run
        return False
    return True
