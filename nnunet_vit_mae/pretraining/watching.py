"""An epoch of pre-training under watch: it stops where the training diverges, with the step and its cases."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nnunet_vit_mae.divergence import divergence, explosion, first_bad_step
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining.crops import ConsecutiveBatches, RandomCrops
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.tracking import metrics_of_norms


@dataclass
class WatchedEpoch:
    """An epoch whose losses and gradient norms are looked at now and then, on all processes at the same steps."""

    job: PretrainingJob
    crops: RandomCrops
    reads: ConsecutiveBatches
    output: Path
    epoch: int
    losses: list[Tensor]  # with those of an earlier process, of which there are no norms
    norms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.looked = self.earlier = len(self.losses)

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Note a step."""
        self.losses.append(loss)
        self.norms.append(norm)

    @property
    def norm_metrics(self) -> dict[str, float]:
        """Return the mean and the largest gradient norm, under their names in `METRICS`."""
        return metrics_of_norms(torch.stack(self.norms)) if self.norms else {}

    def look(self) -> None:
        """Look at the steps since the last time; raise `CommonError` if one is bad."""
        start, self.looked = self.looked, len(self.losses)
        if start == self.looked:
            return
        found = first_bad_step(self.losses[start:], self.norms[start - self.earlier :])
        own = found and (found.step, found.by_gradient_alone, self._sentence(start + found.step, found.clause))
        if bad := sorted(filter(None, distributed.gathered(own))):
            raise distributed.CommonError(bad[0][2])

    def checked_mean(self, before: list[float]) -> float:
        """Return the mean loss of the epoch, given those before; raise `CommonError` if the training has diverged."""
        self.look()
        mean = float(distributed.averaged(torch.stack(self.losses).mean()))
        norm_pix_in = self.job.protocol.norm_pix_in
        alike = [loss for number, loss in enumerate(before) if norm_pix_in(number) == norm_pix_in(self.epoch)]
        first = alike[0] if alike else float(distributed.averaged(self.losses[0]))
        if grown := explosion(mean, first):
            raise distributed.CommonError(self._sentence(int(torch.stack(self.losses).argmax()), grown))
        return mean

    def _sentence(self, step: int, what: str) -> str:
        numbers = self.reads.of(self.epoch * self.job.steps_per_epoch + step)
        cases = [self.crops.file_of(number).stem for number in numbers for _ in range(self.crops.crops_per_volume)]
        error = divergence(
            what,
            f"step {step + 1} of epoch {self.epoch + 1}",
            cases,
            self.crops[numbers].crops,
            kept=f"the last good state, if any, is kept in {self.output}",
            advice="start again with a lower --lr, and look for extreme voxels in these images",
        )
        return str(error)
