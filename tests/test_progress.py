"""Progress in the log file of a job: whole lines with the time left, and no more of them than one reads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nnunet_vit_mae
from nnunet_vit_mae import progress
from nnunet_vit_mae.progress import ProgressLines, progress_bar, with_progress

PACKAGE = Path(nnunet_vit_mae.__file__).parent


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told otherwise."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines_of(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_line_says_how_much_is_done_and_how_long_the_rest_will_take(clock, capsys):
    with ProgressLines(40, "cases", "measuring") as bar:
        for clock.now in (110.0, 120.0, 130.0, 140.0):
            bar.update(4)
        bar.set_postfix_str("loss 0.5")
        clock.now += 60
        bar.update(24)
    assert lines_of(capsys) == [
        "measuring: 0 of 40 cases (0%)",
        "measuring: 4 of 40 cases (10%), 00:10 so far, about 01:30 left",
        "measuring: 8 of 40 cases (20%), 00:20 so far, about 01:20 left",
        "measuring: 12 of 40 cases (30%), 00:30 so far, about 01:10 left",
        "measuring: 16 of 40 cases (40%), 00:40 so far, about 01:00 left",
        "measuring: 40 of 40 cases (100%), 01:40 so far, loss 0.5",
    ]


def test_what_was_done_before_does_not_count_for_the_time_left(clock, capsys):
    with ProgressLines(100, "steps", "training", initial=80) as bar:
        clock.now += 60
        bar.update(10)
    assert lines_of(capsys)[-1] == "training: 90 of 100 steps (90%), 01:00 so far, about 01:00 left"


@pytest.mark.parametrize(("steps", "seconds", "most"), [(20, 0.01, 2), (1000, 1.0, 30), (86400 * 3, 1.0, 200)])
def test_neither_a_short_nor_a_long_run_fills_the_file(clock, capsys, steps, seconds, most):
    with ProgressLines(steps, "steps", "training") as bar:
        for _ in range(steps):
            clock.now += seconds
            bar.update()
    lines = lines_of(capsys)
    assert 2 <= len(lines) <= most
    assert lines[-1].startswith(f"training: {steps} of {steps} steps (100%)")


def test_nothing_follows_the_sentence_of_work_that_was_stopped(capsys):
    items = with_progress(range(4), unit="case", desc="reading")
    assert [next(items), next(items)] == [0, 1]
    items.close()  # as it is when nothing refers to it any more
    bar = ProgressLines(4, "cases", "reading")
    bar.__enter__()
    bar.update()
    bar.__exit__(KeyboardInterrupt)
    assert lines_of(capsys) == ["reading: 0 of 4 cases (0%)"] * 2


def test_nothing_is_shown_where_there_is_nothing_to_do(capsys):
    assert list(with_progress([], unit="case", desc="filling")) == []
    with progress_bar(3, unit="step", desc="training", shown=False) as bar:
        bar.update()
    assert lines_of(capsys) == []


SCRIPT = """
import time
from nnunet_vit_mae.progress import with_progress
for study in with_progress(range(30), unit="study", desc="converting"):
    time.sleep(0.01)
"""


def test_a_pipe_gets_no_carriage_return():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, check=True)  # bytes: text hides them
    assert b"\r" not in done.stderr
    assert done.stderr.startswith(b"converting: 0 of 30 studies (0%)\n")
    assert b"\nconverting: 30 of 30 studies (100%), 00:00 so far\n" in done.stderr


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(with_progress("abc", unit="case", desc="measuring")) == ["a", "b", "c"]
    shown = capsys.readouterr().err
    assert "\rmeasuring: 100%|" in shown
    assert "3/3" in shown


def test_all_progress_goes_through_one_module():
    users = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            if any((name or "").split(".")[0] == "tqdm" for name in names):
                users.add(file.name)
    assert users == {"progress.py"}
