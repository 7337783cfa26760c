"""Pre-training from the first crop to the encoder (He et al. 2022, appendix A.1; ViTiac, section 2.2).

A run is a function of its job: samples depend on seed and index, the learning rate on the step. So a run that was
killed and goes on (`resume`) has the same losses, to the digit on a CPU, as one that was never interrupted. The batch
is what all processes read together (see `distributed`): with several of them the losses are the same but for
rounding, and for tokens that take no part, which each of them counts by itself.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nnunet_vit_mae.divergence import divergence, first_bad_step, has_exploded
from nnunet_vit_mae.entries import read_entries
from nnunet_vit_mae.errors import UserError, WriteError
from nnunet_vit_mae.files import remove_unfinished, write_json
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import Autoencoder, build_autoencoder
from nnunet_vit_mae.networks.masking import BACKGROUND_DEVIATION, Masking, count_rebuilt, count_visible
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.optimisation import parameter_groups, set_learning_rate, warmup_cosine
from nnunet_vit_mae.plots import plot_contrasts, plot_progress, plot_views
from nnunet_vit_mae.presets import PRETRAINING_DECODERS, Network, Pretraining, to_json_types, token_grid
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining.affines import SHARE, AffineDrawing
from nnunet_vit_mae.pretraining.crops import ConsecutiveBatches, MaskDrawing, RandomCrops, Samples
from nnunet_vit_mae.pretraining.pictures import rebuild
from nnunet_vit_mae.pretraining.readers import read_batches, reader_failures
from nnunet_vit_mae.pretraining.saved_state import STATE, read_state, save_state
from nnunet_vit_mae.pretraining.volumes import Cache
from nnunet_vit_mae.signals import Stopped, postponed

logger = logging.getLogger(__name__)

PICTURES = 20  # over a whole run
SAVE_EVERY_SECONDS = 120.0  # and after the last epoch
SAVING_SHARE = 0.05  # of the time may go into saving more often than that
LOOK_EVERY_STEPS = 100  # at the losses, which stay on the device until then; and before each save
TINY_LR, LARGE_LR = 1e-5, 5e-3


@dataclass(frozen=True, kw_only=True)
class PretrainingRun:
    """Everything that decides what a run computes."""

    files: Sequence[Path]  # preprocessed volumes, c z y x
    channel_names: Sequence[str]
    patch_size: tuple[int, ...]  # voxels, z y x
    spacing: tuple[float, ...]  # mm, z y x; for pictures
    network: Network
    protocol: Pretraining
    cache: Cache | None = None

    @property
    def drawing(self) -> MaskDrawing:
        """How the masks of a crop are drawn."""
        return MaskDrawing(
            masking=Masking(mask_ratio=self.protocol.mask_ratio, rebuilt_share=self.protocol.rebuilt_share),
            token=self.network.token,
            adaptive=self.network.adaptive,
            skip_background=self.protocol.skip_background,
            masks_per_crop=self.protocol.masks_per_crop,
        )

    @property
    def affines(self) -> AffineDrawing | None:
        """How crops are rotated and scaled, if they are."""
        rotation, scaling = self.protocol.rotation, self.protocol.scaling
        if not rotation and scaling == (1.0, 1.0):
            return None
        return AffineDrawing(rotation=rotation, scaling=scaling, spacing=self.spacing)

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of an epoch: a sample for each case, rounded up to whole batches.

        The next epoch starts where it ended. With several samples per volume an epoch reads only some of the cases, and
        the next one others.
        """
        return math.ceil(len(self.files) / self.protocol.batch_size)

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return self.protocol.epochs * self.steps_per_epoch

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, for `config.json`."""
        return {
            "cases": [file.stem for file in self.files],
            "channel_names": list(self.channel_names),
            "patch_size": list(self.patch_size),
            "spacing": list(self.spacing),
            "network": to_json_types(self.network),
            "pretraining": to_json_types(self.protocol),
            "half_precision_crops": self.cache is not None,
        }


@dataclass
class PretrainingResult:
    """What a finished pre-training gives."""

    network: Autoencoder
    losses: list[float]  # mean of each epoch


def run(
    job: PretrainingRun, output: Path, *, device: torch.device, resume: bool, readers: int = 0
) -> PretrainingResult:
    """Pre-train; writes `config.json`, `log.txt`, `progress.png`, `reconstructions/` and `state.pt` to `output`.

    Crops are read by as many processes as `readers` says; with 0, by the loop itself between two steps.

    With `resume`, goes on from `state.pt` if there is one. Raises `UserError` when that belongs to a different job, or
    when the training diverges (the last good state is kept).
    """
    torch.manual_seed(job.protocol.seed)
    network = build_autoencoder(job.network, len(job.channel_names), job.protocol, spacing=job.spacing).to(device)
    groups = parameter_groups(network.named_parameters(), weight_decay=job.protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu"))
    state = distributed.from_rank_0(lambda: _prepare(output, job, network, optimizer, resume=resume))
    losses, begun = _restore(state, network, optimizer)
    with _logging_to(output / "log.txt") if distributed.is_rank_0() else nullcontext():
        _announce(job, network, device, done=len(losses) * job.steps_per_epoch + len(begun))
        _train(job, output, network, optimizer, losses, begun, device, readers)
    return PretrainingResult(network, losses)


def _train(
    job: PretrainingRun,
    output: Path,
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
    is_first, model = distributed.is_rank_0(), distributed.synchronised(network)
    first_step = len(losses) * job.steps_per_epoch + len(begun)
    crops = RandomCrops(
        job.files,
        job.patch_size,
        job.drawing,
        job.protocol.seed,
        job.cache,
        crops_per_volume=job.protocol.crops_per_volume,
        affines=job.affines,
    )
    reads = _reads(job, first_step)
    batches = read_batches(crops, reads, readers, pin_memory=device.type == "cuda")
    sample = crops[[0]].samples(device).first() if is_first else None
    saved, cost = time.monotonic(), 0.0
    network.train()
    with (
        postponed() as signal,
        reader_failures(),
        closing(batches),
        tqdm(total=job.steps, initial=first_step, unit="step", desc="pre-training", disable=not is_first) as bar,
    ):
        for epoch in range(len(losses), job.protocol.epochs):
            started, waited = time.monotonic(), 0.0
            watched, begun = _Watched(job, crops, reads, output, epoch, begun), []
            for step in range(epoch * job.steps_per_epoch + watched.looked, (epoch + 1) * job.steps_per_epoch):
                set_learning_rate(optimizer, _learning_rate(job, step))
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                watched.add(*_step(job, epoch, model, optimizer, batch.samples(device)))
                number = distributed.largest(signal())
                if number or len(watched.norms) % LOOK_EVERY_STEPS == 0:
                    watched.look()
                if number:
                    save_state(output, network, optimizer, losses, watched.losses)
                    logger.info("stopped by a signal after step %d of %d", step + 1, job.steps)
                    raise Stopped(number)
                bar.update()
            losses.append(watched.checked_mean(losses))

            kind = " (norm-pix)" if job.protocol.norm_pix_in(epoch) else ""
            rate = _learning_rate(job, (epoch + 1) * job.steps_per_epoch - 1)
            seconds = time.monotonic() - started
            speed = job.steps_per_epoch * job.protocol.batch_size / seconds
            bar.set_postfix(loss=f"{losses[-1]:.4f}", samples_per_s=f"{speed:.1f}")
            logger.info(
                "epoch %d: loss %.6f%s, learning rate %.2e, %.1f s (%.1f%% waiting for crops), %.1f samples/s%s",
                epoch + 1, losses[-1], kind, rate, seconds, 100 * waited / seconds, speed, watched.norms_in_words,
            )  # fmt: skip
            if sample is None:  # rank 0 alone writes
                continue
            is_last = epoch + 1 == job.protocol.epochs
            if is_last or time.monotonic() - saved > min(SAVE_EVERY_SECONDS, cost / SAVING_SHARE):
                cost = save_state(output, network, optimizer, losses)
                saved = time.monotonic()
            if is_last or (epoch + 1) % math.ceil(job.protocol.epochs / PICTURES) == 0:
                _draw(job, output, network, losses, sample)


def _step(
    job: PretrainingRun, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, samples: Samples
) -> tuple[Tensor, Tensor]:
    """Take a step of an epoch on a batch; loss and gradient norm stay on the device, so that a GPU is not waited for.

    `model` is the network, or what averages its gradients over the processes.
    """
    masks = job.drawing.masking.rounds(samples.masks)[0]
    with autocast(samples.volume.device):
        rebuilt = model(samples.volume, masks, samples.present)
        loss = reconstruction_loss(rebuilt, norm_pix=job.protocol.norm_pix_in(epoch))
    if distributed.process_count() > 1:  # studies differ in their contrasts, and so do processes in their voxels
        loss = distributed.part_of_joint_mean(loss, rebuilt.counted.sum())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), job.protocol.gradient_clip)
    optimizer.step()
    return loss.detach(), norm


def _reads(job: PretrainingRun, first_step: int) -> ConsecutiveBatches:
    """Return what this process reads for each of the steps to come."""
    place = {"rank": distributed.rank(), "processes": distributed.process_count()}
    return ConsecutiveBatches(first_step, job.steps, job.protocol.reads, **place)


def _learning_rate(job: PretrainingRun, step: int) -> float:
    """Return the learning rate of a step: warm-up and cosine, as in the original."""
    return job.protocol.lr * warmup_cosine((step + 1) / (job.steps + 1), job.protocol.warmup)


@dataclass
class _Watched:
    """An epoch whose losses and gradient norms are looked at now and then, on all processes at the same steps."""

    job: PretrainingRun
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
    def norms_in_words(self) -> str:
        """Return the mean and the largest gradient norm for the log."""
        if not self.norms:
            return ""
        norms = torch.stack(self.norms)
        return f", gradient norm {norms.mean():.3g}, at most {norms.max():.3g}"

    def look(self) -> None:
        """Look at the steps since the last time; raise `UserError`, the same on all processes, if one is bad."""
        start, self.looked = self.looked, len(self.losses)
        if start == self.looked:
            return
        found = first_bad_step(self.losses[start:], self.norms[start - self.earlier :])
        own = found and (found.step, found.by_gradient_alone, str(self._error(start + found.step, found.clause)))
        if bad := sorted(filter(None, distributed.gathered(own))):
            raise UserError(bad[0][2])

    def checked_mean(self, before: list[float]) -> float:
        """Return the mean loss of the epoch, given those before; raise `UserError` if the training has diverged."""
        self.look()
        mean = float(distributed.averaged(torch.stack(self.losses).mean()))
        norm_pix_in = self.job.protocol.norm_pix_in
        alike = [loss for number, loss in enumerate(before) if norm_pix_in(number) == norm_pix_in(self.epoch)]
        first = alike[0] if alike else float(distributed.averaged(self.losses[0]))
        if has_exploded(mean, first):
            worst = int(torch.stack(self.losses).argmax())
            raise self._error(worst, f"The loss of an epoch was {first:.3g} and has grown to {mean:.3g}, most of all")
        return mean

    def _error(self, step: int, what: str) -> UserError:
        numbers = self.reads.of(self.epoch * self.job.steps_per_epoch + step)
        cases = [self.crops.file_of(number).stem for number in numbers for _ in range(self.crops.crops_per_volume)]
        return divergence(
            what,
            f"step {step + 1} of epoch {self.epoch + 1}",
            cases,
            self.crops[numbers].crops,
            kept=f"the last good state, if any, is kept in {self.output}",
            advice="start again with a lower --lr, and look for extreme voxels in these images",
        )


def _prepare(
    output: Path, job: PretrainingRun, network: nn.Module, optimizer: torch.optim.Optimizer, *, resume: bool
) -> dict[str, Any] | None:
    """Make the folder, and return the state to continue from (on the CPU), None for a new run.

    An earlier run that is not continued is moved aside.
    """
    if not (resume and (output / STATE).is_file()):
        _move_aside(output)
        output.mkdir(parents=True, exist_ok=True)
        write_json(job.to_dict(), output / "config.json")
        return None
    remove_unfinished(output)
    before = read_entries(dict[str, Any], output / "config.json", "start again without --c, which moves this run aside")
    now = job.to_dict()
    different = [name for name in now if before.get(name) != now[name]]
    if different:
        raise UserError(
            f"The run in {output} was started with other {', '.join(different)} (see its config.json): "
            "give the same flags and data to continue it, or start again without --c."
        )
    return read_state(output / STATE, network, optimizer, job.protocol.epochs, job.steps_per_epoch)


def _move_aside(output: Path) -> None:
    if output.exists():
        moved = output.with_name(f"{output.name}_until_{datetime.now():%Y-%m-%d_%H-%M-%S}")
        output.rename(moved)
        logger.warning("An earlier run was moved to %s (--c continues one that has a saved state).", moved)


def _restore(
    state: dict[str, Any] | None, network: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[float], list[Tensor]]:
    """Load a state, if there is one; returns the losses of all epochs so far, and of the steps after them."""
    if state is None:
        return [], []
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"]), list(state["begun"].to(next(network.parameters()).device))


def _announce(job: PretrainingRun, network: nn.Module, device: torch.device, *, done: int) -> None:
    protocol = job.protocol
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    logger.info(
        "cases %d, channels %s, crops of %s voxels (z y x)", len(job.files), list(job.channel_names), job.patch_size
    )
    if job.cache is not None:
        logger.info("%d of the cases in memory, all crops in half precision", len(job.cache))
    if protocol.reads < protocol.batch_size:
        logger.info(
            "%d volumes read for a batch, %d crops of each, %d masks of each crop",
            protocol.reads, protocol.crops_per_volume, protocol.masks_per_crop,
        )  # fmt: skip
    sequences = job.network.token_sequences(len(job.channel_names))
    tokens = math.prod(token_grid(job.patch_size, job.network.token))
    visible = count_visible(tokens, protocol.mask_ratio)
    hidden = tokens - visible
    logger.info(
        "size %s (%.1f M parameters), token %s: %s%d tokens, %d of them visible (mask ratio %s)",
        job.network.size, millions, job.network.token, "with all contrasts " if job.network.adaptive else "",
        sequences * tokens, sequences * visible, protocol.mask_ratio,
    )  # fmt: skip
    logger.info(
        "decoder: %s; in a step it rebuilds %d of %d hidden tokens", PRETRAINING_DECODERS[protocol.decoder],
        sequences * count_rebuilt(hidden, protocol.rebuilt_share), sequences * hidden,
    )  # fmt: skip
    if protocol.skip_background:
        logger.info(
            "tokens without content (standard deviation below %s) are left out, so these numbers are the largest",
            BACKGROUND_DEVIATION,
        )
    logger.info(
        "%d epochs of %d steps, batch %d, learning rate %.2e (base rate %.2e x batch / 256), on %s%s",
        protocol.epochs, job.steps_per_epoch, protocol.batch_size, protocol.lr, protocol.base_lr,
        f"{distributed.process_count()} x " if distributed.process_count() > 1 else "", device.type,
    )  # fmt: skip
    logger.info("loss: %s", _loss_in_words(norm_pix=protocol.norm_pix_in(0)))
    if protocol.plain_epochs:
        logger.info("from epoch %d on: %s", protocol.plain_epochs + 1, _loss_in_words(norm_pix=True))
    if job.affines:
        logger.info(
            "%.0f%% of the crops are rotated by up to %g degrees, and as many scaled by %g to %g",
            100 * SHARE, protocol.rotation, *protocol.scaling,
        )  # fmt: skip
    if protocol.lr < TINY_LR:
        logger.warning(
            "The learning rate %.1e is very low: the base rate is meant for large batches, see --lr.", protocol.lr
        )
    if protocol.lr > LARGE_LR:
        logger.warning(
            "The learning rate %.1e is very high: the base rate is meant for smaller batches, see --lr.", protocol.lr
        )
    if done:
        epochs, steps = divmod(done, job.steps_per_epoch)
        logger.info("continuing after epoch %d of %d, and %d steps", epochs, protocol.epochs, steps)


def _loss_in_words(*, norm_pix: bool) -> str:
    return f"mean squared error on hidden tokens{', normalised per token (norm-pix)' if norm_pix else ''}"


def _draw(job: PretrainingRun, output: Path, network: Autoencoder, losses: list[float], sample: Samples) -> None:
    rates = [_learning_rate(job, (epoch + 1) * job.steps_per_epoch - 1) for epoch in range(len(losses))]
    plot_progress(losses, rates, output / "progress.png", plain=job.protocol.plain_epochs)
    norm_pix = job.protocol.norm_pix_in(len(losses) - 1)
    views = rebuild(network, job.drawing.masking, sample, norm_pix=norm_pix)
    title = f"epoch {len(losses)}, loss {losses[-1]:.4f}"
    if norm_pix:
        title += "\nhidden tokens: predicted pattern, brightness and contrast interpolated from visible tokens"
    if job.protocol.skip_background:
        title += "\nblank in the rebuilt image: tokens without content, left out"
    names = [job.channel_names[channel] for channel in sample.present[0]]
    file = output / "reconstructions" / f"epoch_{len(losses):04d}.png"
    if len(names) > 1:
        plot_contrasts(views._asdict(), names, job.spacing, title, file)
    else:
        plot_views([view[0] for view in views], views._fields, job.spacing, f"{names[0]}, {title}", file)


class _LogFile(logging.FileHandler):
    """A log that a full disk ends, as it ends the run that the log is about."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        error = sys.exception()
        if isinstance(error, OSError) and error.errno:
            raise WriteError(error.errno, error.strerror, self.baseFilename) from None
        super().handleError(record)


@contextmanager
def _logging_to(file: Path) -> Iterator[None]:
    """Send the package's log to a file as well, and past the progress bar on the screen."""
    package = logging.getLogger("nnunet_vit_mae")
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    level = package.level
    package.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm():
            yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()
