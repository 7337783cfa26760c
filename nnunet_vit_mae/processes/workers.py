"""Run many jobs in several processes; a process that is killed does not stop the other jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import active_children, get_context
from typing import TypeVar

from nnunet_vit_mae.processes.signals import end_children, exit_in_order, follow_parent, held

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_each(
    function: Callable[[Item], Result],
    jobs: Iterable[Item],
    processes: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[Item, Result | None]]:
    """Call `function` for every job and yield each job with its result as soon as it is done.

    Args:
        function: Called with a job; what it raises ends everything.
        jobs: The arguments; with more than one process they must be picklable.
        processes: Number of processes; 1 runs everything in this one.
        initializer: Called once in each worker process, and not at all if `processes` is 1.

    Returns:
        Pairs of a job and its result; the result is None if its process died, usually because memory ran out.
    """
    jobs = list(jobs)
    if processes == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    suspects = []
    for job, result, lost in _run_in_pool(function, jobs, processes, initializer):
        if lost:
            suspects.append(job)  # the pool does not say which process died
        else:
            yield job, result
    for suspect in suspects:
        for job, result, _ in _run_in_pool(function, [suspect], 1, initializer):
            yield job, result


def _run_in_pool(
    function: Callable[[Item], Result], jobs: list[Item], processes: int, initializer: Callable[[], None] | None
) -> Iterator[tuple[Item, Result | None, bool]]:
    """Yield each job, its result, and whether it was lost because the pool broke."""
    context = get_context("spawn")  # ITK's threads do not survive a fork
    others = set(active_children())
    start = partial(_start_worker, initializer)
    with ProcessPoolExecutor(min(processes, max(1, len(jobs))), context, start) as pool:
        with held():
            futures = {pool.submit(_do, function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result(), False
                except BrokenProcessPool:
                    yield futures[future], None, True
        except BaseException:  # Ctrl+C, or whoever takes the results gives up: nobody waits for the remaining jobs
            pool.shutdown(wait=False, cancel_futures=True)
            end_children(set(active_children()) - others)
            raise


def _start_worker(initializer: Callable[[], None] | None) -> None:
    follow_parent(exit_in_order)
    if initializer:
        initializer()


def _do(function: Callable[[Item], Result], job: Item) -> Result:
    try:
        return function(job)
    except SystemExit as stop:  # the pool would take it for a result, and wait for a worker that it has ended
        os._exit(stop.code if isinstance(stop.code, int) else 1)
