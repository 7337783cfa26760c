"""Many jobs over several processes, where none of them, not even one whose process is killed, stops another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_each(
    function: Callable[[Item], Result],
    jobs: Iterable[Item],
    processes: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[tuple[Item, Result | None]]:
    """Every job with its result as it is done, or with None when its process died (out of memory, most often).

    What `function` raises ends everything. `initializer` is called once in each process, unless there is only this one.
    """
    jobs = list(jobs)
    if processes == 1:
        yield from ((job, function(job)) for job in jobs)
        return
    suspects = []
    for job, result, lost in _pooled(function, jobs, processes, initializer):
        if lost:
            suspects.append(job)  # the pool does not say whose process it was
        else:
            yield job, result
    for suspect in suspects:
        for job, result, _ in _pooled(function, [suspect], 1, initializer):
            yield job, result


def _pooled(
    function: Callable[[Item], Result], jobs: list[Item], processes: int, initializer: Callable[[], None] | None
) -> Iterator[tuple[Item, Result | None, bool]]:
    context = get_context("spawn")  # ITK has threads, which a fork does not survive
    with ProcessPoolExecutor(min(processes, max(1, len(jobs))), context, initializer) as pool:
        futures = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result(), False
                except BrokenProcessPool:
                    yield futures[future], None, True
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl+C, nobody waits for the rest
