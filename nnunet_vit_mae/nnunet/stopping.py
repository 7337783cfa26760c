"""Trainings that a signal ends in order, and that lose one epoch at most, whatever ends them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist

from nnunet_vit_mae.errors import exit_on_user_error
from nnunet_vit_mae.imaging.channels import cases_in
from nnunet_vit_mae.processes.memory import refuse_without_shared_memory
from nnunet_vit_mae.processes.signals import forks_follow, stoppable, tell
from nnunet_vit_mae.storage.files import file_hash, locked, remove_unfinished, replacing, set_aside, write_json
from nnunet_vit_mae.storage.layout import BEST, CHECKPOINT_NOTE, FINAL, LATEST, VALIDATION


class StoppableTrainer(nnUNetTrainer):
    """nnU-Net's trainer with a checkpoint after each epoch, which is whole at any time."""

    saved_since = 0.0  # files that are older belong to an earlier training
    checkpoint_in_use: Path | None = None  # once one was loaded or saved
    starts_anew = False  # until its first epoch is saved

    @exit_on_user_error
    def run_training(self) -> None:
        """Train as nnU-Net does. A signal ends it with a sentence; the last whole epoch is saved.

        A fold that another process is training is refused.

        Of a training that is complete (`--c`) nothing is saved: the same weights in another file would make its
        calibration look like that of other weights.
        """
        final = Path(self.output_folder, FINAL)
        if self.current_epoch >= self.num_epochs and self.checkpoint_in_use == final:
            self.print_to_log_file(f"The training is complete: {final} stays as it is.")
            return
        self.save_every = 1
        self.starts_anew = not self.current_epoch
        self.saved_since = time.time() if self.starts_anew else 0.0
        # of two trainings of one fold, the second would write over the checkpoints of the first
        held = nullcontext() if self.local_rank else locked(Path(self.output_folder))
        with held, self._stoppable(), forks_follow():
            for name in () if self.local_rank else (LATEST, BEST, FINAL):
                remove_unfinished(Path(self.output_folder), name)  # of trainings that were killed while they saved
            super().run_training()

    @exit_on_user_error
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, and note with which checkpoint. A signal ends it with a sentence.

        Predictions of other cases, which an earlier split left there, are moved aside: nnU-Net would measure them too.
        """
        folder = Path(self.output_folder, VALIDATION)
        note = folder / CHECKPOINT_NOTE
        if self.local_rank == 0:
            if {*cases_in(folder, self.dataset_json["file_ending"])} - {*self.do_split()[1]}:
                self.print_to_log_file(f"Predictions of an earlier split are now in {set_aside(folder).name}.")
            write_json({"checkpoint": ""}, note)  # until all are there
        if self.is_ddp:
            dist.barrier()
        with self._stoppable(), forks_follow():
            super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0 and (used := self.checkpoint_in_use):
            write_json({"checkpoint": used.name, "sha256": file_hash(used)}, note)  # another may take its name

    def load_checkpoint(self, filename: str) -> None:
        """Load a checkpoint as nnU-Net does, with the best moving average of Dice up to then.

        The one that a checkpoint notes lacks its own epoch, after which a worse epoch would pass for the best.
        """
        super().load_checkpoint(filename)
        known = (average for average in self.logger.get_value("ema_fg_dice", step=None) if not math.isnan(average))
        self._best_ema = max(known, default=None)
        self.checkpoint_in_use = Path(filename)

    @exit_on_user_error
    def get_dataloaders(self) -> tuple:
        """Return nnU-Net's loaders, unless their batches do not fit into shared memory: it would wait for ever."""
        loaders = get_allowed_n_proc_DA()
        batches = loaders + max(6, loaders // 2) if loaders else 0  # at work on one, and in nnU-Net's queue
        processes = dist.get_world_size() if self.is_ddp else 1
        voxels = math.prod(self.loaded_patch_size())
        batch = self.batch_size * voxels * (4 * int(self.num_input_channels or 0) + 2)  # float32, labels int16
        refuse_without_shared_memory(processes * batches, batch, without="nnUNet_n_proc_DA=0")
        return super().get_dataloaders()

    def loaded_patch_size(self) -> Sequence[int]:
        """Return the voxels along each axis of what the loaders hand over: they augment, and cut the planned patch."""
        return self.configuration_manager.patch_size

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """End as nnU-Net does; an epoch whose Dice is NaN, for lack of any foreground, leaves its average as it was.

        Otherwise that would be NaN from then on, and no later epoch the best.
        """
        super().on_validation_epoch_end(val_outputs)
        averages, dice = self.logger.get_value("ema_fg_dice", step=None), self.logger.get_value("mean_fg_dice", step=-1)
        if math.isnan(averages[-1]):
            averages[-1] = averages[-2] if math.isnan(dice) and len(averages) > 1 else dice
            for logger in self.logger.loggers:  # the local one would suspect a mistake
                logger.log("ema_fg_dice", averages[-1], self.current_epoch)
        if self._best_ema is not None and math.isnan(self._best_ema):
            self._best_ema = None

    def save_checkpoint(self, filename: str) -> None:
        """Save a checkpoint in place of an earlier one of that name.

        The first one of a training moves `checkpoint_final.pth` of an earlier training aside, which `--c` would load
        before all others. Without `--c` it also moves what an earlier training has saved before its end: whoever has
        forgotten that flag loses nothing.
        """
        # a checkpoint of that name may be there, of an earlier training
        self.checkpoint_in_use = None if self.disable_checkpointing else Path(filename)
        if self.local_rank or self.disable_checkpointing:
            return super().save_checkpoint(filename)
        file = Path(filename)
        with replacing(file) as temporary:
            super().save_checkpoint(str(temporary))
            for earlier in (file.with_name(name) for name in (LATEST, BEST) if self.starts_anew):
                if earlier.is_file():
                    moved = set_aside(earlier).name
                    self.print_to_log_file(f"{earlier} of an earlier training is now {moved}: --c would continue it.")
        self.starts_anew = False
        if file.name != FINAL and file.with_name(FINAL).is_file():
            self._move_aside(file.with_name(FINAL))
        tell(what_training_keeps(file.parent, self.saved_since))
        return None

    def _move_aside(self, final: Path) -> None:
        moved = set_aside(final)
        self.print_to_log_file(
            f"{final} of an earlier training is now {moved.name}, so that --c goes on with this training. Until it is "
            f"complete, nnUNetv2_predict finds the earlier model with -chk {moved.name} alone."
        )

    def _stoppable(self) -> AbstractContextManager[None]:
        # the first process speaks for all
        say = partial(self.print_to_log_file, also_print_to_console=True) if self.local_rank == 0 else lambda _: None
        return stoppable(what_training_keeps(Path(self.output_folder), self.saved_since), say)


def what_training_keeps(folder: Path, since: float) -> str:
    """Return a sentence about what a training has saved since a time, and how `nnUNetv2_train` goes on from it."""
    final, latest, best = (folder / name for name in (FINAL, LATEST, BEST))
    saved = [file for file in (final, latest, best) if file.is_file() and file.stat().st_mtime >= since]
    if not saved:
        return "No epoch was finished, so that nothing is saved, and the same command starts again."
    if max(saved, key=lambda file: file.stat().st_mtime_ns) == final:
        return f"The training is complete and saved in {final}, and the same command with --val validates it."
    before = f", after {final} of an earlier training has been moved away" if final.is_file() else ""
    last = latest if latest in saved else best
    return f"The last whole epoch is saved in {last}, and the same command with --c goes on from there{before}."
