"""Commands that are told to end: one sentence, one exit code, and neither processes nor temporary files are left."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent, indent

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.signals import signal_name
from nnunet_vit_mae.storage.unfinished import MARK, new_folder

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SCRIPT = """
import sys, time, os, signal, threading
from pathlib import Path
from nnunet_vit_mae.storage.files import replacing
from nnunet_vit_mae.processes.guard import guarded
from nnunet_vit_mae.processes.signals import command, end_with_parent, postponed, tell
from nnunet_vit_mae.processes.workers import run_each

def say(word):
    print(word, flush=True)

def write_slowly(folder):
    with replacing(Path(folder, f"{os.getpid()}.txt")) as temporary:
        temporary.write_text("half of the n")
        Path(folder, f"begun_{os.getpid()}").touch()
        time.sleep(60)

@command("All is kept.")
def main():
"""


def processes_of(session: int) -> list[int]:
    """Return the processes of a session and of the sessions that they have opened, but not those that have ended."""
    found, sessions = [], {session}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            state, parent, _, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) in sessions or int(parent) in found:
            sessions.add(int(own))
            if state != "Z":
                found.append(int(folder.name))
    return found


def assert_all_end(processes: list[int], seconds: float = 20.0) -> None:
    def is_there(number: int) -> bool:
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while left := [number for number in processes if is_there(number)]:
        assert time.monotonic() < deadline, [Path(f"/proc/{number}/status").read_text() for number in left]
        time.sleep(0.02)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a script whose command has the given lines, and wait for its first line."""
    started = []

    def start(lines: str, before: Callable[[], object] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(write_script(tmp_path / "script.py", lines))], text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before or allow_signals,
        )  # fmt: skip
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def write_script(file: Path, lines: str) -> Path:
    file.write_text(f'{SCRIPT}{indent(dedent(lines), " " * 4)}\nif __name__ == "__main__":\n    main()\n')
    return file


def allow_signals() -> None:
    for number in SIGNALS:  # the tests may run in the background, where they are ignored
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_with_a_sentence(running, number):
    process = running("say('ready')\ntime.sleep(60)")
    process.send_signal(number)
    output, error = process.communicate(timeout=20)
    assert (output, error) == ("", f"Stopped by {signal_name(number)}. All is kept.\n")
    assert process.returncode == 128 + number


def test_a_command_says_what_it_was_told_last(running):
    process = running("tell('Half is kept.')\nsay('ready')\ntime.sleep(60)")
    process.terminate()
    assert process.communicate(timeout=20)[1] == "Stopped by SIGTERM. Half is kept.\n"


def test_what_is_ignored_from_the_start_stays_so(running):
    process = running("say('ready')\ntime.sleep(1)\nsay('done')", lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20) == ("done\n", "")
    assert process.returncode == 0


def test_a_step_is_finished_first_and_a_second_signal_ends_it_at_once(running):
    step = """
        with postponed() as asked:
            say("ready")
            while not (asked() and {}):
                time.sleep(0.1)
        say("never")
    """
    process = running(step.format("True"))
    process.terminate()
    assert process.communicate(timeout=20) == ("", "Stopped by SIGTERM. All is kept.\n")
    process = running(step.format("False"))
    process.terminate()
    process.terminate()  # launchers send a signal more than once
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == "Stopped by Ctrl+C. All is kept.\n"
    assert process.returncode == 130


def test_a_signal_that_python_loses_comes_again(running):
    """An exception in a finaliser is printed and forgotten."""
    process = running(
        """
        class Slow:
            def __del__(self):
                say("ready")
                time.sleep(60)
        Slow()
        time.sleep(60)
        say("never")
        """
    )
    process.terminate()
    assert process.communicate(timeout=20) == ("", "Stopped by SIGTERM. All is kept.\n")


def test_what_fails_because_of_a_signal_is_no_error(running):
    process = running("say('ready')\ntry:\n  time.sleep(60)\nfinally:\n  raise BrokenPipeError('the terminal')")
    process.terminate()
    assert process.communicate(timeout=20) == ("", "Stopped by SIGTERM. All is kept.\n")
    assert process.returncode == 143


def test_a_closed_terminal_is_survived(tmp_path):
    """After it every attempt to print is an error, which comes before the state is saved."""
    controller, terminal = pty.openpty()
    lines = """
        import fcntl, termios
        fcntl.ioctl(2, termios.TIOCSCTTY)
        Path("ready").touch()
        with postponed() as asked:
            while not asked():
                time.sleep(0.1)
            say("The step is done.")
            Path("saved").touch()
    """
    script = write_script(tmp_path / "script.py", lines)
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen(
        [sys.executable, script], cwd=tmp_path, start_new_session=True, preexec_fn=allow_signals, **streams
    )
    os.close(terminal)
    wait_for(tmp_path / "ready")
    os.close(controller)
    assert process.wait(timeout=20) == 129
    assert (tmp_path / "saved").exists()


def wait_for(file: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------- child processes


@contextmanager
def two_workers(running, folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    process = running(f"say('ready')\nlist(run_each(write_slowly, [{str(folder)!r}] * 2, 2))")
    deadline = time.monotonic() + 60
    while len(list(folder.glob("begun_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process, processes_of(process.pid)


@pytest.mark.parametrize("to_all", [False, True])
def test_workers_end_and_clean_up_with_their_command(running, tmp_path, to_all):
    """Ctrl+C reaches all processes of a terminal, and Slurm tells all processes of a job."""
    folder = tmp_path / "out"
    folder.mkdir()
    with two_workers(running, folder) as (process, processes):
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.terminate()
        error = process.communicate(timeout=20)[1]
    assert error == f"Stopped by {'Ctrl+C' if to_all else 'SIGTERM'}. All is kept.\n"
    assert len(processes) > 2
    assert_all_end(processes)
    assert all(file.name.startswith("begun") for file in folder.iterdir())


def test_workers_do_not_outlive_a_killed_command(running, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with two_workers(running, folder) as (process, processes):
        process.kill()
        process.wait()
    assert len(processes) > 2
    assert_all_end(processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_guarded_command_ends_with_all_its_processes(running, number):
    """The grandchild ignores SIGTERM, as a worker of another package may."""
    program = "import subprocess,sys,time; subprocess.Popen(['sh','-c','trap \"\" TERM; sleep 61']); time.sleep(60)"
    process = running(f"""
        with guarded([sys.executable, "-c", {program!r}], seconds=1.0):
            time.sleep(1)
            say("ready")
            time.sleep(60)
    """)
    processes = processes_of(process.pid)
    assert len(processes) >= 4
    process.send_signal(number)
    assert_all_end(processes)
    process.wait(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)


def test_the_guard_passes_on_the_exit_code_and_ends_what_is_left(running):
    process = running("""
        say("ready")
        codes = []
        for end in ("exit 7", "kill -9 $$"):
            with guarded(["sh", "-c", f"sleep 61 & echo $!; {end}"]) as inner:
                codes.append(inner.wait())
        say(codes)
        time.sleep(60)
    """)
    left = [int(process.stdout.readline()) for _ in range(2)]
    assert process.stdout.readline() == f"[7, {128 + signal.SIGKILL}]\n"
    assert_all_end(left, seconds=1.0)
    assert processes_of(process.pid) == [process.pid]


# ---------- folders that were left unfinished


def stopped_in(folder: Path, arguments: dict) -> None:
    with new_folder(folder, arguments):
        (folder / "case.txt").touch()
        (folder / f".{os.getpid()}_0123abcd.half.txt").touch()
        raise KeyboardInterrupt


def test_the_same_call_goes_on_and_no_other_does(tmp_path):
    folder, call = tmp_path / "report", {"images": tmp_path, "processes": 4}
    with pytest.raises(KeyboardInterrupt):
        stopped_in(folder, call)
    assert str(tmp_path) not in (folder / MARK).read_text()
    with pytest.raises(UserError, match="by a call with other arguments"), new_folder(folder, {"images": 1}):
        pytest.fail("another call goes on")
    with new_folder(folder, call | {"processes": 1}):
        assert {file.name for file in folder.iterdir()} == {"case.txt", MARK}
    with pytest.raises(UserError, match="already exists"), new_folder(folder, call):
        pytest.fail("a finished folder is written again")


def test_a_call_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no images"), new_folder(tmp_path / "report", {}):
        raise UserError("There are no images.")
    assert not (tmp_path / "report").exists()


def test_a_folder_is_for_one_process(running, tmp_path):
    process = running(f"""
        from nnunet_vit_mae.storage.unfinished import new_folder
        with new_folder(Path({str(tmp_path / "out")!r}), {{}}):
            say("ready")
            time.sleep(60)
    """)
    with pytest.raises(UserError, match="Another process is writing"), new_folder(tmp_path / "out", {}):
        pytest.fail("two at a time")
    process.kill()
    process.wait()
    with new_folder(tmp_path / "out", {}):
        pass


def test_a_segmentation_that_was_cut_off_is_predicted_again(tmp_path):
    from nnunet_vit_mae.nnunet.prediction import _remove_if_cut_off

    for file in (tmp_path / "case.nii.gz", tmp_path / "case.nii", tmp_path / "case.nrrd"):
        sitk.WriteImage(sitk.GetImageFromArray(np.arange(4000, dtype=np.uint16).reshape(10, 20, 20)), str(file))
        _remove_if_cut_off(file)
        assert file.is_file()
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size * 2 // 3)
        _remove_if_cut_off(file)
        assert not file.exists()
        _remove_if_cut_off(file)


def test_a_training_promises_only_what_it_has_saved(tmp_path):
    from nnunet_vit_mae.nnunet.stopping import what_training_keeps
    from nnunet_vit_mae.storage.layout import BEST, FINAL, LATEST

    assert "nothing is saved" in what_training_keeps(tmp_path, 0.0)
    (tmp_path / BEST).touch()
    assert "nothing is saved" in what_training_keeps(tmp_path, time.time() + 60)  # of an earlier training
    (tmp_path / LATEST).touch()
    assert f"{LATEST}, and the same command with --c goes on from there." in what_training_keeps(tmp_path, 0.0)
    (tmp_path / FINAL).touch()
    assert "--val" in what_training_keeps(tmp_path, 0.0)
    os.utime(tmp_path / FINAL, (1, 1))  # nnU-Net would go on from this one
    assert f"saved in {tmp_path / LATEST}, and" in what_training_keeps(tmp_path, 0.0)  # of a training that goes on
    assert f"after {tmp_path / FINAL} of an earlier training has been moved away" in what_training_keeps(tmp_path, 2.0)
