"""Pre-training from the first crop to the encoder (He et al. 2022, appendix A.1; ViTiac, section 2.2).

A run is a function of its job: samples depend on seed and index, the learning rate on the step. So a run that was
killed and goes on (`resume`) has the same losses, to the digit on a CPU, as one that was never interrupted. The batch
is what all processes read together (see `distributed`): with several of them the losses are the same but for
rounding, and for tokens that take no part, which each of them counts by itself.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.build import Autoencoder, build_autoencoder
from nnunet_vit_mae.optimisation import parameter_groups, set_learning_rate
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining.crops import ConsecutiveBatches, Samples
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.loss import PretrainingLoss, compiled_where_it_pays, loss_of_step
from nnunet_vit_mae.pretraining.readers import read_batches, reader_failures
from nnunet_vit_mae.pretraining.run_log import announce, logging_to
from nnunet_vit_mae.pretraining.run_report import RunReport
from nnunet_vit_mae.pretraining.saved_state import STATE, read_state, save_state
from nnunet_vit_mae.pretraining.watching import WatchedEpoch
from nnunet_vit_mae.processes.signals import Stopped, postponed
from nnunet_vit_mae.progress import progress_bar
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import remove_unfinished, set_aside, write_json
from nnunet_vit_mae.storage.readme import write_readme
from nnunet_vit_mae.tracking import StepClock, Tracker, Trackers, open_trackers

logger = logging.getLogger(__name__)

PICTURES = 20  # over a whole run
SAVE_EVERY_SECONDS = 120.0  # and after the last epoch
SAVING_SHARE = 0.05  # of the time may go into saving more often than that
CONTENTS = {
    "encoder.safetensors": "the encoder with its card, once pre-training is complete",
    "state.pt": "what --c continues from",
    "config.json": "all settings, and the cases",
    "log.txt": "how it went",
    "metrics.csv": "loss, learning rate, gradient norm and times of each epoch",
    "tensorboard/": "the same for TensorBoard, if it is installed",
    "wandb/": "the same of Weights & Biases, if it is on",
    "progress.png": "loss and learning rate",
    "reconstructions/": "original, masked and rebuilt slices",
}
LOOK_EVERY_STEPS = 100  # at the losses, which stay on the device until then; and before each save

MoreTrackers = Callable[[PretrainingJob, Path, bool], Iterable[Tracker]]  # job, folder, whether it goes on


@dataclass
class PretrainingResult:
    """What a finished pre-training gives."""

    network: Autoencoder
    losses: list[float]  # mean of each epoch


def run(
    job: PretrainingJob,
    output: Path,
    *,
    device: torch.device,
    resume: bool,
    readers: int = 0,
    more_trackers: MoreTrackers = lambda *_: (),
) -> PretrainingResult:
    """Pre-train; writes to `output` what `CONTENTS` lists, except for the encoder.

    Crops are read by as many processes as `readers` says; with 0, by the loop itself between two steps. `more_trackers`
    opens those that the table and TensorBoard are not, on rank 0.

    With `resume`, goes on from `state.pt` if there is one. Raises `UserError` when that belongs to a different job, or
    when the training diverges (the last good state is kept).
    """
    torch.manual_seed(job.protocol.seed)
    network = build_autoencoder(job.network, len(job.channel_names), job.protocol, spacing=job.spacing).to(device)
    groups = parameter_groups(network.named_parameters(), weight_decay=job.protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    state = distributed.from_rank_0(lambda: _prepare(output, job, network, optimizer, resume=resume))
    losses, begun = _restore(state, network, optimizer)
    with ExitStack() as opened:
        trackers = Trackers()
        if distributed.is_rank_0():
            opened.enter_context(logging_to(output / "log.txt"))
            trackers = Trackers([*open_trackers(output), *more_trackers(job, output, state is not None)])
            opened.enter_context(closing(trackers))
        announce(job, network, device, done=len(losses) * job.steps_per_epoch + len(begun))
        _train(RunReport(job, output, trackers), network, optimizer, losses, begun, device, readers)
    return PretrainingResult(network, losses)


def _train(
    report: RunReport,
    network: Autoencoder,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    begun: list[Tensor],
    device: torch.device,
    readers: int,
) -> None:
    """Train until the last epoch; `losses` grows by one entry per epoch, and `begun` are those of the steps after it.

    Raises `Stopped` after the step in which a signal came to any process, with the state saved.
    """
    job, is_first = report.job, distributed.is_rank_0()
    first_step, crops = len(losses) * job.steps_per_epoch + len(begun), job.crops()
    place = {"rank": distributed.rank(), "processes": distributed.process_count()}
    reads = ConsecutiveBatches(first_step, job.steps, job.protocol.reads, **place)
    batches = read_batches(crops, reads, readers, pin_memory=device.type == "cuda")
    sample = crops[[0]].samples(device).first() if is_first else None
    network.train()
    module = compiled_where_it_pays(
        PretrainingLoss(network), job, len(losses), device, lambda: crops[reads.of(first_step)].samples(device)
    )
    model = distributed.synchronised(module)
    saved, cost = time.monotonic(), 0.0
    with (
        postponed() as signal,
        reader_failures(),
        closing(batches),
        progress_bar(job.steps, initial=first_step, unit="step", desc="pre-training", shown=is_first) as bar,
    ):
        for epoch in range(len(losses), job.protocol.epochs):
            clock = StepClock()
            watched, begun = WatchedEpoch(job, crops, reads, report.output, epoch, begun), []
            for step in range(epoch * job.steps_per_epoch + watched.looked, (epoch + 1) * job.steps_per_epoch):
                set_learning_rate(optimizer, job.learning_rate(step))
                batch = next(batches)
                clock.batch_came()
                watched.add(*_step(job, epoch, model, optimizer, batch.samples(device)))
                number = distributed.largest(signal())
                if number or len(watched.norms) % LOOK_EVERY_STEPS == 0:
                    watched.look()
                if number:
                    save_state(report.output, network, optimizer, losses, watched.losses)
                    logger.info("stopped by a signal after step %d of %d", step + 1, job.steps)
                    raise Stopped(number)
                bar.update()
                clock.step_done()
            losses.append(watched.checked_mean(losses))
            speed = report.tell(losses, watched.norm_metrics, clock)
            bar.set_postfix_str(f"loss {losses[-1]:.4f}, {speed}")
            if sample is None:  # rank 0 alone writes
                continue
            is_last = epoch + 1 == job.protocol.epochs
            if is_last or time.monotonic() - saved > min(SAVE_EVERY_SECONDS, cost / SAVING_SHARE):
                cost = save_state(report.output, network, optimizer, losses)
                saved = time.monotonic()
            if is_last or (epoch + 1) % math.ceil(job.protocol.epochs / PICTURES) == 0:
                report.draw(network, losses, sample)


def _step(
    job: PretrainingJob, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples
) -> tuple[Tensor, Tensor]:
    """Take a step of an epoch on a batch; loss and gradient norm stay on the device, so that a GPU is not waited for.

    `model` is the module of the loss, or what averages its gradients over the processes.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, counted = loss_of_step(job, epoch, model, samples)
    if distributed.process_count() > 1:  # studies differ in their contrasts, and so do processes in their voxels
        loss = distributed.part_of_joint_mean(loss, counted)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), job.protocol.gradient_clip)
    optimizer.step()
    return loss.detach().clone(), norm  # a CUDA graph writes the next loss into the same place


def _prepare(
    output: Path, job: PretrainingJob, network: nn.Module, optimizer: torch.optim.Optimizer, *, resume: bool
) -> dict[str, Any] | None:
    """Make the folder, and return the state to continue from (on the CPU), None for a new run.

    An earlier run that is not continued is moved aside.
    """
    if not (resume and (output / STATE).is_file()):
        if output.exists():
            logger.warning(
                "An earlier run was moved to %s, and this one makes a new encoder in its place (--c continues a run "
                "that has a saved state).",
                set_aside(output),
            )
        output.mkdir(parents=True, exist_ok=True)
        write_json(job.to_dict(), output / "config.json")
        write_readme(output, CONTENTS)
        return None
    remove_unfinished(output)
    before = read_entries(dict[str, Any], output / "config.json", "start again without --c, which moves this run aside")
    now = job.to_dict()
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        raise UserError(
            f"The run in {output} was started with other settings ({', '.join(different)}, see its config.json): "
            "give the same plans, flags and data to continue it, or start again without --c."
        )
    return read_state(output / STATE, network, optimizer, job.protocol.epochs, job.steps_per_epoch)


def _restore(
    state: dict[str, Any] | None, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[float], list[Tensor]]:
    """Load a state, if there is one; returns the losses of all epochs so far, and of the steps after them."""
    if state is None:
        return [], []
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"]), list(state["begun"].to(next(network.parameters()).device))
