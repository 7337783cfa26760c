"""Kill commands at instants all over their time, and type them again: they end as if nothing had happened.

Nothing is lost, nothing is promised that is not there, and neither processes nor temporary files are left. There is an
instant in each of equal parts of the time, from a fixed seed. A server that has all imports done forks the commands, so
that each takes little time.
"""

import importlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import Workspace, blob, read_voxels
from preloaded import SERVER
from safetensors.torch import load_file
from synthetic_head import COARSE_GRID, moved, scan, write_template
from test_signals import SIGNALS, assert_all_end, processes_of

pytestmark = pytest.mark.slow

INSTANTS = 8  # each signal twice, once with readers
KILLS = [*SIGNALS, signal.SIGKILL]


def run_command(command: str, arguments: list[str], environment: dict[str, str], errors: Path) -> None:
    """Run a command in a session of its own, as a shell starts it."""
    os.setsid()
    stream = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    multiprocessing.set_start_method("fork", force=True)  # not by this server again, for it would do all imports anew
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    module = importlib.import_module(f"nnunet_vit_mae.cli.{command}")
    if command == "pretrain":
        importlib.import_module("nnunet_vit_mae.pretraining.run").PICTURES = 1  # they take longer than the training
    module.main(arguments)


class Killer:
    """Runs one command over and over, and kills it at instants that are spread over the time that it takes."""

    def __init__(self, command: str, environment: Mapping[str, str], errors: Path, instants: int):
        self.command, self.environment, self.errors = command, dict(environment), errors
        chance = random.Random(0)
        self.instants = [(part + chance.random()) / instants for part in chance.sample(range(instants), instants)]

    def run(self, *arguments: str) -> float:
        """Run the command to its end, and return the seconds that it took."""
        started = time.monotonic()
        process = self._start(arguments)
        process.join(120)
        assert process.exitcode == 0, self.errors.read_text()
        return time.monotonic() - started

    def kill(self, number: int, within: float, *arguments: str) -> int:
        """Kill the command at an instant within some seconds, and return its exit code once all its processes are gone.

        Insists on a sentence and the conventional exit code.
        """
        process, began = self._start(arguments), time.monotonic()
        time.sleep(self.instants.pop() * within)
        processes = processes_of(process.pid)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(60)
        assert_all_end(processes)
        code, error = process.exitcode, self.errors.read_text()
        print(f"{time.monotonic() - began:.1f} s of {within:.1f}: {number} gave {code}; {error.splitlines()[-1:]}")
        assert "Traceback" not in error
        if code not in (0, -9):
            assert code == 128 + number
            assert error.splitlines()[-1].startswith("Stopped by ")
        return code

    def _start(self, arguments: Sequence[str]) -> multiprocessing.process.BaseProcess:
        self.errors.unlink(missing_ok=True)
        process = SERVER.Process(
            target=run_command, args=(self.command, list(arguments), self.environment, self.errors), daemon=False
        )
        process.start()
        while not self.errors.exists():  # the handlers of the server are still there
            assert process.is_alive()
            time.sleep(0.001)
        return process


def temporary_files(*folders: Path) -> list[Path]:
    return [file for folder in folders for pattern in (".[0-9]*", ".unfinished*") for file in folder.rglob(pattern)]


@pytest.fixture
def killer(tmp_path: Path) -> Callable[..., Killer]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    return lambda command, instants, more=(): Killer(
        command, environment | dict(more), tmp_path / "errors.txt", instants
    )


def test_pretraining_goes_on_to_the_digit(workspace: Workspace, killer):
    """Half of the runs have readers in processes of their own."""
    killed = killer("pretrain", INSTANTS, workspace.environment)
    arguments = ["-d", "901", "-device", "cpu", "--epochs", "16", "--batch_size", "2", "--c", "-p", "Tiny"]
    workspace.call(*"mae3d_plan -d 901 -o Tiny --size XS --token 8".split())
    folder = workspace.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_all"
    killed.run(*arguments)
    folder.rename(folder.with_name("whole"))
    whole = folder.with_name("whole")
    seconds = killed.run(*arguments)  # once more, with everything in the system's cache
    compare(folder, whole)
    remove(folder)

    codes = []
    while len(codes) < INSTANTS:
        number = KILLS[len(codes) % len(KILLS)]
        kept = steps_in(folder)
        codes.append(killed.kill(number, seconds * 0.6, *arguments, "-np", str(len(codes) // len(KILLS) % 2)))
        error = killed.errors.read_text()
        assert ("The state is saved in" not in error) or steps_in(folder), error
        assert steps_in(folder) >= kept
        if codes[-1] == 0:
            compare(folder, whole)
            remove(folder)
            seconds *= 0.7  # the machine has become faster
    killed.run(*arguments)
    compare(folder, whole)
    assert codes.count(0) < INSTANTS / 2, "most instants lie within the run"
    assert not temporary_files(workspace.root)


def steps_in(folder: Path) -> int:
    """Return the steps of a saved run: three in each of its epochs, and those of the next epoch."""
    file = folder / "state.pt"
    state = torch.load(file, weights_only=True) if file.is_file() else {"losses": [], "begun": []}
    return 3 * len(state["losses"]) + len(state["begun"])


def compare(folder: Path, whole: Path) -> None:
    ours, theirs = (load_file(place / "encoder.safetensors") for place in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses, expected = (torch.load(place / "state.pt", weights_only=True)["losses"] for place in (folder, whole))
    assert losses == expected


def remove(folder: Path) -> None:
    for other in folder.parent.glob("fold_all*"):
        for file in sorted(other.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        other.rmdir()


def contents(folder: Path) -> dict[str, object]:
    """Return the voxels of images, and the text of everything else, by name."""
    found: dict[str, object] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(folder))
        if file.name.endswith(".nii.gz"):
            found[name] = read_voxels(file).tobytes()
        elif file.suffix in (".csv", ".json"):
            found[name] = file.read_text()
        else:
            found[name] = None
    return found


def kill_until_done(killed: Killer, output: Path, arguments: list[str]) -> None:
    """Compare the dataset of a command that was killed again and again with that of one that was not."""
    seconds = killed.run(*arguments, "-np", "1")
    whole = contents(output)
    output.rename(output.with_name("whole"))
    for count in range(len(killed.instants)):
        code = killed.kill(KILLS[count % len(KILLS)], seconds, *arguments, "-np", "1")
        if code == 0:
            assert contents(output) == whole
            output.rename(output.with_name(f"done_{count}"))
    if not output.exists() or contents(output) != whole:
        killed.run(*arguments, "-np", "1")
    assert contents(output) == whole
    assert not temporary_files(output)


def test_conversion_goes_on(tmp_path, killer):
    source, output = tmp_path / "bids", tmp_path / "Dataset902_Head"
    for number in range(6):
        channels, label = blob(number)
        for name, array in {"T1w": channels[0], "FLAIR": channels[1], "dseg": label}.items():
            folder = source / f"sub-{number}" / "anat"
            folder.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(
                sitk.GetImageFromArray(array.astype(np.float32)), str(folder / f"sub-{number}_{name}.nii.gz")
            )
    arguments = ["-i", str(source), "-o", str(output), "--key", str(tmp_path / "key.csv")]
    kill_until_done(killer("convert", 4), output, arguments)


def test_preprocessing_goes_on(workspace: Workspace, killer):
    """A killed job keeps nobody out."""
    output = workspace.preprocessed / "nnUNetPlans_3d_fullres_unlabelled"
    kill_until_done(killer("preprocess", 4, workspace.environment), output, ["-d", "901"])


def test_cropping_goes_on(tmp_path, killer):
    images, output = tmp_path / "scans", tmp_path / "Dataset903_Region"
    images.mkdir()
    template, region = write_template(tmp_path, **COARSE_GRID)
    for number in range(3):
        image, _ = scan(moved((0.05 * number, 0.0, 0.1), (5, -3, 8)), **COARSE_GRID)
        sitk.WriteImage(image, str(images / f"case_{number}_0000.nii.gz"))
    arguments = ["-i", str(images), "-o", str(output), "-t", str(template), "-r", str(region)]
    kill_until_done(killer("crop_roi", 4), output, arguments)
