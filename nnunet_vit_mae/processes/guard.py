"""Run a command that ends, with every process that it has started, when the process that asked for it does.

`python -m nnunet_vit_mae.processes.guard SECONDS COMMAND ...`: the guard lives in a session of its own, where no signal
for the asking process reaches it. It ends the command as soon as its standard input is closed, which the system does
for a process that was killed, and kills what is still there after a given number of seconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from nnunet_vit_mae.processes.signals import adopt_orphans, end_with_parent

ENDING_SECONDS = 30.0  # for the command to save what it has
LEFTOVER_SECONDS = 2.0  # for processes that outlive their command


@contextmanager
def guarded(
    command: Sequence[str | os.PathLike[str]], *, seconds: float = ENDING_SECONDS, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start a command under a guard, and end it and all its processes when the block ends.

    Its processes are sent SIGTERM and killed after some seconds. `options` are those of `subprocess.Popen`. The exit
    code is the command's, or 128 plus the number of the signal that ended it.
    """
    guard = [sys.executable, "-m", "nnunet_vit_mae.processes.guard", str(seconds), *command]
    process = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True, **options)
    assert process.stdin
    try:
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def main(command: Sequence[str], seconds: float) -> int:
    """Run a command until it ends or standard input is closed, and return its exit code."""
    options: dict[str, Any] = {}
    if os.name == "posix":
        adopt_orphans()
        options = {"start_new_session": True, "preexec_fn": partial(end_with_parent, signal.SIGTERM)}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    closed = threading.Event()
    ending = threading.Thread(target=_end_when_closed, args=(process, closed, seconds), daemon=True)
    ending.start()
    code = process.wait()
    if closed.is_set():
        ending.join()
    else:
        _end_all(process, LEFTOVER_SECONDS)
    return 128 - code if code < 0 else code


def _end_when_closed(process: subprocess.Popen[Any], closed: threading.Event, seconds: float) -> None:
    while os.read(0, 1024):
        pass
    closed.set()
    _end_all(process, seconds)


def _end_all(process: subprocess.Popen[Any], patience: float) -> None:
    """End the processes of the command's session, and kill those that are still there after some seconds."""
    if os.name != "posix":
        return process.terminate()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            _reap(process)
            os.killpg(process.pid, 0)
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    return None


def _reap(process: subprocess.Popen[Any]) -> None:
    """Let go of adopted processes that have ended."""
    if process.returncode is not None:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], float(sys.argv[1])))
