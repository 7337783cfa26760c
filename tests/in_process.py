"""Commands in the process of the tests: most take less time than an interpreter needs to import torch and nnU-Net."""

import io
import logging
import multiprocessing
import os
import queue
import subprocess
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import entry_points
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from forked_commands import forked_scripts

OWN_CONTEXT = multiprocessing.get_context
OWN_PATH = sysconfig.get_path
THREADS = SimpleNamespace(Pool=ThreadPool, Process=threading.Thread)  # what nnU-Net takes from a context
SHARED = SimpleNamespace(Event=threading.Event, Queue=queue.Queue)  # and from a manager


def run_in_process(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a console script as a shell does, but here; what it changes in this process is put back."""
    output, errors = io.StringIO(), io.StringIO()
    with ExitStack() as stack:
        for context in (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(sys, "argv", list(command)),
            redirect_stdout(output),
            redirect_stderr(errors),
            _log_as_at_start(),
            _warnings_of_others_ignored(),
            _nnunet_without_processes(),
            _commands_of_commands_forked(),
        ):
            stack.enter_context(context)
        (script,) = entry_points(group="console_scripts", name=command[0])
        code = _exit_code(script.load())
    return subprocess.CompletedProcess(list(command), code, output.getvalue(), errors.getvalue())


def _exit_code(function: Any) -> int:
    try:
        function()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except Exception:  # noqa: BLE001 (an interpreter ends in the same way)
        traceback.print_exc()
        return 1
    return 0


@contextmanager
def _log_as_at_start() -> Iterator[None]:
    """Let `logging.basicConfig` work, which does nothing where pytest has its handlers."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _warnings_of_others_ignored() -> Iterator[None]:
    """Only warnings of this package are errors, for nnU-Net has its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="nnunet_vit_mae")
        yield


@contextmanager
def _nnunet_without_processes() -> Iterator[None]:
    """Threads in place of the processes that nnU-Net starts, and no figure of 30 by 54 inches after each epoch.

    To list the cases of a folder it forks 12 processes, and one to predict: slow and unsafe here, where torch and ITK
    have threads. The figure changes the defaults of matplotlib, too.
    """
    from nnunetv2.inference import data_iterators
    from nnunetv2.training.logging.nnunet_logger import LocalLogger
    from nnunetv2.utilities import utils

    with (
        mock.patch.object(multiprocessing, "get_context", _context),
        mock.patch.object(utils, "Pool", ThreadPool),
        mock.patch.object(data_iterators, "Manager", return_value=SHARED),
        mock.patch.object(torch, "set_num_threads"),  # the tests share the cores
        mock.patch.object(LocalLogger, "plot_progress_png"),
    ):
        yield


def _context(method: str | None = None) -> Any:
    caller = sys._getframe(1).f_globals["__name__"]
    return THREADS if caller.startswith("nnunetv2.") else OWN_CONTEXT(method)


@contextmanager
def _commands_of_commands_forked() -> Iterator[None]:
    """Let commands find the scripts of `forked_commands`, unless a test has others."""
    if sysconfig.get_path is not OWN_PATH:
        yield
        return
    with mock.patch.object(sysconfig, "get_path", path_of_forked_scripts):
        yield


def path_of_forked_scripts(name: str, *arguments: Any, **options: Any) -> str:
    """In place of `sysconfig.get_path`."""
    return str(forked_scripts()) if name == "scripts" else OWN_PATH(name, *arguments, **options)
