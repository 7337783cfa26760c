"""Batches of crops from processes that read ahead, which hand them over in shared memory."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from signal import SIG_IGN
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.pretraining.crops import CropBatch, RandomCrops
from nnunet_vit_mae.processes.memory import NO_ROOM, SHARED_MEMORY
from nnunet_vit_mae.processes.signals import end_children, follow_parent, held

READY_BATCHES = 2  # that each reader prepares, as torch has it
READER_SECONDS = 600.0  # within which some reader has to give a batch


class _Shared(Dataset):
    """Batches that lie in shared memory before they are handed over, or the `UserError` that stands in their way.

    torch would put them there in a thread whose errors, such as a lack of memory, reach nobody: the training would wait
    for ever. Of an error that is raised here, torch would make a traceback.
    """

    def __init__(self, crops: RandomCrops):
        self.crops = crops

    def __getitem__(self, reads: Any) -> CropBatch | UserError:
        try:
            batch = self.crops[reads]
        except UserError as error:
            return error
        for part in (batch.crops, batch.flips, *batch.masks, batch.affines):
            if part is not None:
                part.share_memory_()
        return batch


def read_batches(
    crops: RandomCrops, steps: Sampler, readers: int, *, pin_memory: bool
) -> Generator[CropBatch, None, None]:
    """Yield the batches of all steps, read by as many processes as `readers` says, or by this one if that is 0.

    Close the iterator to end the readers; see `reader_failures` for what it raises.
    """
    if not readers:
        for reads in steps:
            yield crops[reads].pinned() if pin_memory else crops[reads]
        return
    others = set(active_children())
    loader = DataLoader(
        _Shared(crops), sampler=steps, batch_size=None, num_workers=readers, pin_memory=pin_memory,
        prefetch_factor=READY_BATCHES, timeout=READER_SECONDS, worker_init_fn=_start_reader,
    )  # fmt: skip
    try:
        with held():
            batches = iter(loader)
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    finally:
        batches = None  # which ends readers that listen
        end_children(set(active_children()) - others)


@contextmanager
def reader_failures() -> Iterator[None]:
    """Turn what torch raises for readers, in the middle of anything else too, into a `UserError`.

    That is when one has ended, when none gives a batch for a long time, and when shared memory runs out.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        raise _reason(error) or error from None


def _start_reader(_: int) -> None:
    torch.set_num_threads(1)
    follow_parent(SIG_IGN)  # the loop needs its batches until it has finished its step, whoever gets SIGTERM


def _reason(error: Exception) -> UserError | None:
    """Return what an error of torch about its readers means; None for an error of another kind."""
    message = str(error)
    if re.search("shared memory|Bus error", message):
        return UserError(f"The shared memory {SHARED_MEMORY} is full: {NO_ROOM} (-np 0).")
    if "timed out after" in message:
        return UserError(
            f"No reader has given a batch of crops for {math.ceil(READER_SECONDS / 60)} minutes: look whether the disk "
            "with the preprocessed files answers, and run the command again."
        )
    was_cut_off = isinstance(error, ConnectionError | EOFError | FileNotFoundError) and "Caught" not in message
    if was_cut_off or re.search("killed by signal|exited unexpectedly", message):
        return UserError(
            "A process that reads crops was killed, probably because memory ran out: use fewer of them (-np) or "
            "a smaller batch."
        )
    return None
