"""Progress of long work on stderr: a bar that moves in a terminal, and whole lines in the log file of a job."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, Self, TypeVar

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

T = TypeVar("T")

TENTHS = 10
PAUSE_SECONDS, LINE_SECONDS = 5.0, 60.0  # between two lines: at least, and at most if anything is done
LINE_SHARE = 0.05  # of the time so far: so a run of days writes some hundred lines, not thousands


class ProgressBar(Protocol):
    """What can be done with a bar or its lines."""

    @property
    def n(self) -> float:
        """Return how much is done."""
        ...

    def update(self, n: float = 1, /) -> object:
        """Say that so much more is done."""
        ...

    def set_postfix_str(self, s: str, /) -> None:
        """Show these words as well."""
        ...


def progress_bar(
    total: int, *, unit: str, desc: str, initial: int = 0, shown: bool = True
) -> AbstractContextManager[ProgressBar]:
    """Return what shows the progress of the block that it is opened for.

    Args:
        total: How much there is to do; nothing is shown if it is 0.
        unit: One of it, in the singular.
        desc: What is being done.
        initial: How much was done before.
        shown: Whether to show anything.
    """
    if not (shown and total) or sys.stderr.isatty():
        return tqdm(total=total, unit=unit, desc=desc, initial=initial, disable=not (shown and total))
    return ProgressLines(total, f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s", desc, initial)


def with_progress(
    items: Iterable[T], *, unit: str, desc: str, total: int | None = None, shown: bool = True
) -> Iterator[T]:
    """Yield the items, and show how many are done; see `progress_bar`. The total is their number if not given."""
    if total is None:
        items = list(items)
        total = len(items)
    with progress_bar(total, unit=unit, desc=desc, shown=shown) as bar:
        for item in items:
            yield item
            bar.update()


def logging_past_progress() -> AbstractContextManager[None]:
    """Return a block in which lines of the log do not run into the bar."""
    return logging_redirect_tqdm()


def keep_progress_to_this_process() -> None:
    """Let bars hold no semaphore, which is reported as leaked when the process is stopped."""
    tqdm.set_lock(threading.RLock())


class ProgressLines:
    """Lines about how much is done, the time so far and the time left.

    One comes at the start, at each tenth, after a minute without one, and at the end; they become rarer in a long run.
    """

    def __init__(self, total: int, units: str, desc: str, initial: int = 0):
        self.total, self.units, self.desc, self.initial = total, units, desc, initial
        self.n: float = initial
        self._postfix = ""

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._write()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # of work that was stopped, no line may follow the sentence about it: a generator ends later than its caller
        if error is None and self.n != self._written:
            self._write()

    def update(self, n: float = 1, /) -> None:
        """Say that so much more is done."""
        self.n += n
        now = time.monotonic()
        pause = now - self._wrote_at
        is_tenth = self.n * TENTHS // self.total > self._written * TENTHS // self.total
        if (is_tenth and pause >= PAUSE_SECONDS) or pause >= max(LINE_SECONDS, LINE_SHARE * (now - self._started)):
            self._write()

    def set_postfix_str(self, s: str, /) -> None:
        """Show these words in the lines to come."""
        self._postfix = f", {s}"

    def _write(self) -> None:
        self._wrote_at, self._written = time.monotonic(), self.n
        elapsed = self._wrote_at - self._started
        line = f"{self.desc}: {self.n:g} of {self.total} {self.units} ({self.n / self.total:.0%})"
        if done := self.n - self.initial:
            line += f", {tqdm.format_interval(elapsed)} so far"
            if left := self.total - self.n:
                line += f", about {tqdm.format_interval(elapsed * left / done)} left"
        sys.stderr.write(f"{line}{self._postfix}\n")
        sys.stderr.flush()
