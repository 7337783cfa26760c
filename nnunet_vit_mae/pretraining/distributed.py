"""One pre-training in several processes: `-num_gpus` on one machine, or `torchrun` on any number of them.

Each process reads and computes its share of every batch, torch's DistributedDataParallel averages the gradients, and
only rank 0 writes. In a process that works alone, all of this does nothing.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.pretraining import NOT_STARTED
from nnunet_vit_mae.processes.signals import Stopped, end_children, end_with_parent, held, stoppable
from nnunet_vit_mae.progress import keep_progress_to_this_process

logger = logging.getLogger(__name__)

R = TypeVar("R")
Task = Callable[[torch.device], None]

STOPPING_SECONDS = 60.0  # for all processes to finish their step and save
GRACE_SECONDS = 2.0  # for the launcher to see who ended first, before the others end as well


class LostProcessError(UserError):
    """A process was killed, and all others have ended."""


class CommonError(UserError):
    """What all processes raise after the same step, so that rank 0 alone has to report it."""


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


def own_device(device: torch.device) -> torch.device:
    """Return the GPU of this process, where torchrun has started it; else the device as it is.

    All processes would otherwise ask the first GPU for its memory, and each of them would take some of it to do so.
    """
    if device.type != "cuda" or not _under_torchrun():
        return device
    local_rank = int(os.environ["LOCAL_RANK"])
    return torch.device("cuda", local_rank) if local_rank < torch.cuda.device_count() else device


@contextmanager
def reported_once() -> Iterator[None]:
    """Let rank 0 alone report what ends all processes, such as a `CommonError`, a signal or a wrong flag.

    The others wait a moment, in which they are ended if rank 0 has reported something. If they are not, a `UserError`
    is their own, and they report it.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt) as error:
        if is_rank_0():
            raise
        time.sleep(GRACE_SECONDS)
        if isinstance(error, UserError) and not isinstance(error, CommonError):
            raise
        sys.exit(128 + error.number if isinstance(error, Stopped) else 2)


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
    """Call a function on rank 0 alone; all processes get its (picklable) result, or raise the `UserError` it raised."""
    if not _is_joint():
        return function()
    outcome: list = [None, None]
    if is_rank_0():
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = CommonError(str(error))
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


def largest(number: int) -> int:
    """Return the largest number of all processes, for which they wait for each other, but not for their GPUs."""
    if not _is_joint():
        return number
    found = torch.tensor(number)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return int(found)


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
    """Start the processes and wait for them; when one of them ends with an error, all others are stopped.

    A signal is passed on: all of them stop after the same step, and rank 0 says what is kept.
    """
    # It would report each process that it stops.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (task, device, processes, (Path(folder) / "store").as_uri())
        with held():
            context: Any = spawn(_worker, arguments, processes, join=False)
        try:
            while not context.join():
                pass
        except Stopped as stop:
            for process in context.processes:
                os.kill(process.pid, stop.number)
            deadline = time.monotonic() + STOPPING_SECONDS
            for process in context.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            if context.processes[0].exitcode == 128 + stop.number:
                sys.exit(128 + stop.number)  # it has said what is kept
            raise
        except ProcessExitedException as error:
            if error.signal_name is None:
                sys.exit(error.exit_code)  # the process has reported why
            raise LostProcessError(
                f"A process of this pre-training was ended by {error.signal_name}, as the system does when memory runs "
                "out: use fewer processes, a smaller batch or a smaller --cache."
            ) from None
        finally:
            end_children(set(context.processes))
            if context.processes[0].exitcode < 0:
                sys.stderr.write("\n")  # its progress bar is still there


def _worker(number: int, task: Task, device: torch.device, processes: int, store: str) -> None:
    """Run a process of `_supervise`; it ends without a message when the launcher ends."""
    end_with_parent()
    keep_progress_to_this_process()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    place = {"init_method": store, "rank": number, "world_size": processes}
    say = None if number == 0 else logger.debug  # rank 0 speaks for all
    with stoppable(NOT_STARTED, say):
        exit_on_user_error(partial(_take_part, task, device, number, **place))()


def _take_part(task: Task, device: torch.device, local_rank: int, **place: Any) -> None:
    """Run the task as one of several processes."""
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # gloo for what concerns the processes themselves, so that they never wait for their GPUs to agree on it
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **place)
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
