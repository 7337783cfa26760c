"""nnU-Net's trainer, watched: a training that diverges stops before a checkpoint of it is written."""

from __future__ import annotations

import math

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_vit_mae.divergence import BAD_LOSS, BAD_NORM, divergence, explosion
from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.tracking import metrics_of_norms


class WatchedTrainer(nnUNetTrainer):
    """Look at the loss of each step, which nnU-Net reads anyway, and at the gradient norms when an epoch ends.

    A subclass adds the norm of each step to `norms`, on the device. Steps that nnU-Net's fp16 skips have none.
    """

    norm_name = "gradient norm"
    cases: list[list[str]]  # of the batches of this epoch
    losses: list[float]
    norms: list[torch.Tensor]
    norm_metrics: dict[str, float]  # of the epoch that has ended, under their names in `METRICS`

    def on_train_epoch_start(self) -> None:
        """Begin an epoch as nnU-Net does."""
        self.cases, self.losses, self.norms = [], [], []
        super().on_train_epoch_start()

    @exit_on_user_error
    def train_step(self, batch: dict) -> dict:
        """Take a step; stop with the cases of the batch if its loss is NaN or infinite.

        nnU-Net's fp16 overflows now and then, skips the step and goes on, and so does this, unless the batch is to
        blame.
        """
        result = self.take_step(batch)
        self.losses.append(float(result["loss"]))
        self.cases.append([str(case) for case in batch["keys"]])
        if math.isfinite(self.losses[-1]) or (self.grad_scaler is not None and batch["data"].isfinite().all()):
            return result
        raise self._divergence(len(self.losses) - 1, BAD_LOSS.format(self.losses[-1]), batch["data"])

    def take_step(self, batch: dict) -> dict:
        """Take nnU-Net's own step."""
        return super().train_step(batch)

    @exit_on_user_error
    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """End an epoch as nnU-Net does, and log the gradient norm; stop if the training has diverged."""
        super().on_train_epoch_end(train_outputs)
        self.norm_metrics = {}
        if not np.isfinite(self.losses).any():
            raise self._divergence(0, BAD_LOSS.format(self.losses[0]))
        if self.norms:
            norms = torch.stack(self.norms).cpu()
            bad = (~norms.isfinite()).nonzero().flatten().tolist()
            if bad:
                raise self._divergence(bad[0], BAD_NORM.format(norms[bad[0]].item()))
            skipped = len(self.losses) - len(norms)
            said = f"; {skipped} steps skipped, because their gradients were too large for fp16" if skipped else ""
            self.norm_metrics = metrics_of_norms(norms)
            self.print_to_log_file(f"{self.norm_name} {norms.mean():.3g}, at most {norms.max():.3g}{said}")
        losses = self.logger.get_value("train_losses", step=None)
        first = losses[0] if len(losses) > 1 else self.losses[0]
        if grown := explosion(losses[-1], first):
            raise self._divergence(int(np.argmax(self.losses)), grown)

    def _divergence(self, step: int, what: str, volumes: torch.Tensor | None = None) -> UserError:
        error = divergence(
            what,
            f"step {step + 1} of epoch {self.current_epoch}",
            self.cases[step],
            volumes,
            kept=f"the checkpoints of earlier epochs, if any, are kept in {self.output_folder}",
            advice="look for extreme voxels in these images, or plan with a lower finetuning.lr",
        )
        self.print_to_log_file(f"Error: {error}", also_print_to_console=False)
        return error
