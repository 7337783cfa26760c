"""The log of a pre-training: what is run, on the screen and in `log.txt`."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from nnunet_vit_mae.errors import WriteError
from nnunet_vit_mae.networks.masking import BACKGROUND_DEVIATION, count_rebuilt
from nnunet_vit_mae.presets import PRETRAINING_DECODERS
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining.affines import SHARE
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.volumes import DeviceCache
from nnunet_vit_mae.progress import logging_past_progress
from nnunet_vit_mae.settings import count_visible, token_grid

logger = logging.getLogger(__name__)

TINY_LR, LARGE_LR = 1e-5, 5e-3


@contextmanager
def logging_to(file: Path) -> Iterator[None]:
    """Send the package's log to a file as well, and past the progress bar on the screen."""
    package = logging.getLogger("nnunet_vit_mae")
    handler = _LogFile(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package.addHandler(handler)
    level = package.level
    package.setLevel(logging.INFO)
    try:
        with logging_past_progress():
            yield
    finally:
        package.setLevel(level)
        package.removeHandler(handler)
        handler.close()


def announce(job: PretrainingJob, network: nn.Module, device: torch.device, *, done: int) -> None:
    """Log what is run, and how many steps of it are done."""
    protocol = job.protocol
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    logger.info(
        "cases %d, channels %s, crops of %s voxels (z y x)", len(job.files), list(job.channel_names), job.patch_size
    )
    if job.cache is not None:
        where = "the memory of the device" if isinstance(job.cache, DeviceCache) else "memory"
        logger.info("%d of the cases in %s, all crops in half precision", len(job.cache), where)
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
        "decoder: %s; in a step it rebuilds %d of %d masked tokens", PRETRAINING_DECODERS[protocol.decoder],
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
    return f"mean squared error on masked tokens{', normalised per token (norm-pix)' if norm_pix else ''}"


class _LogFile(logging.FileHandler):
    """A log that a full disk ends, as it ends the run that the log is about."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        error = sys.exception()
        if isinstance(error, OSError) and error.errno:
            raise WriteError(error.errno, error.strerror, self.baseFilename) from None
        super().handleError(record)
