"""What a pre-training tells about its epochs: a line of the log, numbers for trackers, and pictures now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_vit_mae.networks.build import Autoencoder
from nnunet_vit_mae.plots import plot_contrasts, plot_progress, plot_views
from nnunet_vit_mae.pretraining.crops import Samples
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.pictures import rebuild
from nnunet_vit_mae.tracking import StepClock, Trackers

logger = logging.getLogger(__name__)

PROGRESS = "progress.png"  # the figure of losses and learning rates


@dataclass
class RunReport:
    """The report of a run to its folder and to trackers, of which other ranks than 0 have none."""

    job: PretrainingJob
    output: Path
    trackers: Trackers

    def tell(self, losses: Sequence[float], norms: Mapping[str, float], clock: StepClock) -> str:
        """Report the epoch that has just ended, and return its speed in words.

        Args:
            losses: Means of all epochs so far.
            norms: The epoch's gradient norms, under their names as metrics; none if its steps were taken before.
            clock: The times of its steps, as far as this process has taken them.
        """
        job, epoch = self.job, len(losses) - 1
        now, seconds = time.time(), time.monotonic() - clock.started
        rate = job.last_rate(epoch)
        metrics = {"train_losses": losses[-1], "lrs": rate, **norms, **clock.metrics, "seconds_per_epoch": seconds}
        self.trackers.log(epoch, metrics | {"epoch_start_timestamps": now - seconds, "epoch_end_timestamps": now})
        speed = f"{clock.steps * job.protocol.batch_size / seconds:.1f} samples/s"
        said = ", gradient norm {gradient_norms:.3g}, at most {gradient_norms_max:.3g}".format(**norms) if norms else ""
        logger.info(
            "epoch %d: loss %.6f%s, learning rate %.2e, %.1f s (%.1f%% waiting for crops), %s%s",
            epoch + 1, losses[-1], " (norm-pix)" if job.protocol.norm_pix_in(epoch) else "", rate, seconds,
            100 * clock.metrics.get("waiting_share", 0.0), speed, said,
        )  # fmt: skip
        return speed

    def draw(self, network: Autoencoder, losses: list[float], sample: Samples) -> None:
        """Draw the losses so far, and a sample as it is rebuilt now."""
        job, names = self.job, [self.job.channel_names[channel] for channel in sample.present[0]]
        rates = list(map(job.last_rate, range(len(losses))))
        plot_progress(losses, rates, self.output / PROGRESS, plain=job.protocol.plain_epochs)
        norm_pix = job.protocol.norm_pix_in(len(losses) - 1)
        views = rebuild(network, job.masking, sample, norm_pix=norm_pix)
        title = f"epoch {len(losses)}, loss {losses[-1]:.4f}"
        if norm_pix:
            title += "\nmasked tokens: predicted pattern, brightness and contrast interpolated from visible tokens"
        if job.protocol.skip_background:
            title += "\nblank in the rebuilt image: tokens without content, left out"
        file = self.output / "reconstructions" / f"epoch_{len(losses):04d}.png"
        if len(names) > 1:
            plot_contrasts(views._asdict(), names, job.spacing, title, file)
        else:
            plot_views([view[0] for view in views], views._fields, job.spacing, f"{names[0]}, {title}", file)
        self.trackers.show(len(losses) - 1, "reconstructions", file)
