"""Ctrl+C, SIGTERM and SIGHUP end a command in order, say what is kept, and end its child processes with it.

Schedulers send SIGTERM or SIGHUP before they end a job for good, and a terminal that is closed sends SIGHUP. A signal
that was ignored from the start (`nohup`, jobs in the background) stays so.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import active_children, parent_process
from typing import Any, ParamSpec, TypeVar

from nnunet_vit_mae.errors import exit_on_user_error

P = ParamSpec("P")
R = TypeVar("R")

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
REPEATED_SECONDS = 1.0  # launchers and terminals send a signal more than once; later the user means "at once"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux
GRACE_SECONDS = 5.0  # for a child to end by itself
LAST_SENTENCE = "Files that are written are whole, and the same command starts again."


class Stopped(KeyboardInterrupt):
    """A signal asks this process to end; libraries treat it as Ctrl+C."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal_name(number)}")
        self.number = number


@dataclass
class _Request:
    """The signal that was sent to this process, and how it is to be handled."""

    listening: bool = False
    number: int = 0  # of the first signal; 0: none has come
    since: float = 0.0
    postponed: int = 0  # blocks of `postponed` that are open
    kept: str = ""
    children_follow: bool = False


_request = _Request()


def signal_name(number: int) -> str:
    """Return the name of a signal for the user.

    >>> signal_name(signal.SIGINT), signal_name(signal.SIGTERM)
    ('Ctrl+C', 'SIGTERM')
    """
    return "Ctrl+C" if number == signal.SIGINT else signal.Signals(number).name


def command(kept: str = LAST_SENTENCE) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the entry point of a command: what the user can fix, and signals, end it with one sentence.

    The exit code is 2, or 128 plus the number of the signal.

    Args:
        kept: Sentences for a stopped command: what is kept, and how to go on; see also `tell`.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        reported = exit_on_user_error(function)

        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
            with stoppable(kept):
                return reported(*args, **kwargs)

        return wrapped

    return decorated


@contextmanager
def stoppable(kept: str, say: Callable[[str], None] | None = None) -> Iterator[None]:
    """End the process with one sentence when a signal stops the block, after its child processes.

    Args:
        kept: What is kept, and how to go on; see also `tell`.
        say: Called with the sentence; by default it goes to stderr.
    """
    if _request.listening or threading.current_thread() is not threading.main_thread():
        yield  # the outer block handles them; other threads are not interrupted
        return
    with _listening():
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            if not isinstance(error, KeyboardInterrupt) and not _request.number:
                raise
            # what else is raised after a signal is its consequence: a lost terminal, a child that ended first
            number = error.number if isinstance(error, Stopped) else _request.number or signal.SIGINT
            for other in SIGNALS:
                signal.signal(other, signal.SIG_IGN)
            end_children()
            _wait_for_threads()
            with suppress(OSError):  # the terminal has gone
                (say or _to_stderr)(f"Stopped by {signal_name(number)}. {_request.kept or kept}")
            sys.exit(128 + number)


def _wait_for_threads() -> None:
    """Wait for threads that notice that their workers are gone: the interpreter would complain of them at its end."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join(GRACE_SECONDS)


def tell(kept: str) -> None:
    """Set what a stopped command says instead of its own sentence."""
    _request.kept = kept


@contextmanager
def postponed() -> Iterator[Callable[[], int]]:
    """Let the block finish what must be whole: a signal takes effect when it ends, a second one a moment later at once.

    Yields a function that gives the number of the signal that has come, or 0.
    """
    _request.postponed += 1
    try:
        yield lambda: _request.number
    finally:
        _request.postponed -= 1
    if _request.number and not _request.postponed:
        raise Stopped(_request.number)


@contextmanager
def held() -> Iterator[None]:
    """Block signals while child processes are started, and in these until they have handlers of their own.

    The children call `follow_parent` or open a `stoppable` block.
    """
    with postponed():
        _mask("SIG_BLOCK")
        try:
            yield
        finally:
            _mask("SIG_UNBLOCK")


def follow_parent(on_sigterm: Any = signal.SIG_DFL) -> None:
    """Make this child process end with its parent, whatever ends that, and leave it to the parent to handle signals.

    `on_sigterm` is the handler of SIGTERM, with which a parent ends its children.
    """
    _request.listening, _request.number, _request.postponed = False, 0, 0
    for number in SIGNALS:
        signal.signal(number, on_sigterm if number == signal.SIGTERM else signal.SIG_IGN)
    end_with_parent()
    _mask("SIG_UNBLOCK")


def exit_in_order(number: int, _frame: Any) -> None:
    """Handle a signal by leaving all open blocks, which remove their temporary files."""
    sys.exit(128 + number)


def end_with_parent(number: int = getattr(signal, "SIGKILL", signal.SIGTERM)) -> None:
    """Let the system send this process a signal when its parent ends; where it cannot, a thread waits for that."""
    parent = parent_process()
    if sys.platform == "linux" and (parent is None or parent.pid == os.getppid()):
        before = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != before:
            os._exit(1)
    elif parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def adopt_orphans() -> None:
    """Become the parent of processes whose parent ends, if they descend from this one (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


@contextmanager
def forks_follow() -> Iterator[None]:
    """Let processes that others fork in this block end with this one."""
    if not _request.children_follow and hasattr(os, "register_at_fork"):
        _follow_after_forks()
    _request.children_follow = True
    try:
        yield
    finally:
        _request.children_follow = False


@functools.cache
def _follow_after_forks() -> None:
    def after_fork() -> None:
        if _request.children_follow:
            follow_parent()

    os.register_at_fork(after_in_child=after_fork)


def end_children(children: set[Any] | None = None) -> None:
    """End child processes, by default all of this one; those that do not answer are killed."""
    children = set(active_children()) if children is None else children
    with _no_reports_of_children():
        for child in children:
            child.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for child in children:
            child.join(max(0.0, deadline - time.monotonic()))
            if child.is_alive():
                child.kill()
                child.join(GRACE_SECONDS)


@contextmanager
def _no_reports_of_children() -> Iterator[None]:
    """Keep torch from raising an error for each of its workers that is ended."""
    in_main = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    usual = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    try:
        yield
    finally:
        if usual is not None:
            signal.signal(signal.SIGCHLD, usual)


@contextmanager
def _listening() -> Iterator[None]:
    """Handle signals by raising `Stopped`, unless they are ignored."""
    usual: dict[int, Any] = {}
    hook, thread_hook = sys.unraisablehook, threading.excepthook
    _request.listening, _request.number, _request.kept = True, 0, ""

    def unraisable(lost: Any) -> None:
        if not isinstance(lost.exc_value, Stopped):
            return hook(lost)
        # raised where Python has to ignore errors, such as in a finaliser: raise it again elsewhere
        _request.number = 0
        threading.Timer(0.01, os.kill, (os.getpid(), lost.exc_value.number)).start()
        return None

    def in_thread(failure: threading.ExceptHookArgs) -> None:
        if not _request.number:  # what fails afterwards, such as a queue without its workers, is a consequence
            thread_hook(failure)

    sys.unraisablehook, threading.excepthook = unraisable, in_thread
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            usual[number] = signal.signal(number, _on_signal)
    _mask("SIG_UNBLOCK")
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = hook, thread_hook
        for number, handler in usual.items():
            signal.signal(number, handler)
        if signal.SIGINT in usual:
            _end_quietly()
        _request.listening, _request.number, _request.kept = False, 0, ""


@functools.cache
def _end_quietly() -> None:
    """Let Ctrl+C end an interpreter that is ending anyway, instead of interrupting how it tidies up."""
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def _on_signal(number: int, _frame: Any) -> None:
    again = bool(_request.number)
    if again and time.monotonic() - _request.since < REPEATED_SECONDS:
        return
    _request.number, _request.since = number, time.monotonic()
    if number not in (signal.SIGINT, signal.SIGTERM):
        _leave_lost_terminal()
    if again or not _request.postponed:
        raise Stopped(number)


def _leave_lost_terminal() -> None:
    """Write nowhere if the terminal has been closed: everything that is printed would be an error."""
    for stream in (1, 2):
        try:
            os.get_terminal_size(stream)
        except OSError as error:
            if error.errno == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _mask(how: str) -> None:
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), SIGNALS)


def _to_stderr(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
