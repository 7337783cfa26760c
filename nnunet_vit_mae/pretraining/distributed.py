"""One pre-training in several processes: `-num_gpus` on one machine, or `torchrun` on any number of them.

Each process reads and computes its share of every batch, torch's DistributedDataParallel averages the gradients, and
only rank 0 writes. In a process that works alone, all of this does nothing.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from tqdm import tqdm

from nnunet_vit_mae.errors import UserError, exit_on_user_error

R = TypeVar("R")
Task = Callable[[torch.device], None]

GO_ON = "what was saved is kept, and the same command with --c continues from there."
GRACE_SECONDS = 2.0  # for the launcher to see who ended first, before the others end as well


def start(task: Task, device: torch.device, processes: int) -> None:
    """Run a task in this process, in several of this machine, or as one of torchrun's, each with a device of its own.

    A task for several processes has to be picklable. Raises `UserError` when there are too few GPUs or when a process
    was killed; then, and after Ctrl+C, all processes have ended.
    """
    under_torchrun = _under_torchrun()
    if under_torchrun and processes > 1:
        raise UserError("torchrun has set the number of processes already: leave out -num_gpus.")
    local = local_process_count() if under_torchrun else processes
    if device.type == "cuda" and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes on this machine need as many GPUs, but torch finds {torch.cuda.device_count()}: "
            "start fewer processes."
        )
    if under_torchrun:
        _take_part(task, device, int(os.environ["LOCAL_RANK"]))
    elif processes > 1:
        _supervise(task, device, processes)
    else:
        task(device)


@contextmanager
def reported_once() -> Iterator[None]:
    """Let rank 0 alone report a `UserError` that all processes meet; the others end a moment later.

    Ctrl+C, which reaches all of them, becomes such an error.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if not is_rank_0():
            time.sleep(GRACE_SECONDS)
            sys.exit(2)
        if isinstance(error, KeyboardInterrupt):
            raise UserError(f"The pre-training was interrupted: {GO_ON}") from None
        raise


def process_count() -> int:
    """Return the number of processes of this pre-training, on all machines."""
    if _is_joint():
        return distributed.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if _under_torchrun() else 1


def local_process_count() -> int:
    """Return the number of its processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _under_torchrun() else process_count()


def rank() -> int:
    """Return the rank of this process."""
    if _is_joint():
        return distributed.get_rank()
    return int(os.environ["RANK"]) if _under_torchrun() else 0


def is_rank_0() -> bool:
    """Return whether this process writes, draws and reports for all."""
    return rank() == 0


def log_to_console() -> None:
    """Show the log of rank 0, and errors of all processes."""
    logging.basicConfig(level=logging.INFO if is_rank_0() else logging.ERROR, format="%(message)s")


def from_rank_0(function: Callable[[], R]) -> R:
    """Call a function on rank 0 alone; all processes get its (picklable) result, or the `UserError` that it raised."""
    if not _is_joint():
        return function()
    outcome: list = [None, None]
    if is_rank_0():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = error
    distributed.broadcast_object_list(outcome)
    if outcome[1]:
        raise outcome[1]
    return outcome[0]


def gathered(value: R) -> list[R]:
    """Return the (picklable) values of all processes, in the order of their ranks."""
    if not _is_joint():
        return [value]
    values: list = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values


def synchronised(network: nn.Module) -> nn.Module:
    """Wrap the network so that its gradients are averaged over the processes in each backward pass."""
    return nn.parallel.DistributedDataParallel(network) if _is_joint() else network


def part_of_joint_mean(mean: Tensor, count: Tensor) -> Tensor:
    """Return this process's part of a mean over the elements of all processes; the parts average to the joint mean.

    `count` says how many elements the process's own mean is taken over.
    """
    total = count.clone()
    distributed.all_reduce(total)
    return mean * (count * process_count() / total.clamp(min=1))


def averaged(value: Tensor) -> Tensor:
    """Average a value over the processes."""
    if not _is_joint():
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / process_count()


def _is_joint() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _under_torchrun() -> bool:
    return distributed.is_available() and distributed.is_torchelastic_launched()


def _supervise(task: Task, device: torch.device, processes: int) -> None:
    """Start the processes and wait for them; when one of them ends with an error, all others are stopped."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(
        logging.ERROR
    )  # it would report each process that it stops
    with tempfile.TemporaryDirectory() as folder:
        arguments = (task, device, processes, (Path(folder) / "store").as_uri())
        # Ctrl+C is for this process: the others would answer it with a traceback each while they import
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
        context: Any = spawn(_worker, arguments, processes, join=False)
        signal.signal(signal.SIGINT, usual)
        try:
            while not context.join():
                pass
        except ProcessExitedException as error:
            if error.signal_name is None:
                sys.exit(error.exit_code)  # the process has reported why
            raise UserError(
                f"A process of this pre-training was ended by {error.signal_name}, as the system does when memory runs "
                f"out: {GO_ON}"
            ) from None
        finally:
            for process in context.processes:
                process.terminate()
                process.join()
            if context.processes[0].exitcode < 0:
                sys.stderr.write("\n")  # its progress bar is still there


def _worker(number: int, task: Task, device: torch.device, processes: int, store: str) -> None:
    """Run a process of `_supervise`; it ends without a message when the user or the launcher stops it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, reported as leaked when the process is stopped
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    place = {"init_method": store, "rank": number, "world_size": processes}
    exit_on_user_error(partial(_take_part, task, device, number, **place))()


def _take_part(task: Task, device: torch.device, local_rank: int, **place: Any) -> None:
    """Run the task as one of several processes."""
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", **place)
    log_to_console()
    try:
        with reported_once():
            task(device)
    except UserError:
        raise
    except Exception:
        time.sleep(GRACE_SECONDS)  # most often the connection to a process that was killed
        raise
    distributed.destroy_process_group()
