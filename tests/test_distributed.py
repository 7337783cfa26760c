"""Test that pre-training in two processes on a CPU gives the losses and weights of one, whoever is killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from preloaded import SERVER
from scipy.ndimage import gaussian_filter
from torch.multiprocessing.spawn import start_processes

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining import run as loop
from nnunet_vit_mae.pretraining.crops import ConsecutiveBatches, CropBatch, RandomCrops
from nnunet_vit_mae.processes.signals import Stopped, signal_name, stoppable
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.storage.files import locked

CPU = torch.device("cpu")
PATCH = (8, 12, 10)  # tokens of 4 reach beyond it: a masked token at the border has fewer voxels than another one
CASES = 6


@pytest.fixture(autouse=True)
def never_hang() -> Iterator[None]:
    """End a test that waits for a process which will never answer."""

    def stop(*_: object) -> None:
        raise TimeoutError("processes wait for each other")

    usual = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, usual)


class Stderr:
    """Standard error of the process that pickles it, which becomes that of the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any]]:
        return _take_stderr, (DupFd(2),)


def _take_stderr(stream: Any) -> None:
    os.dup2(stream.detach(), 2)


def _work(number: int, _: None, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server may have been started in the background
    distributed._worker(number, *arguments)


def _start_from_server(_: Callable[..., None], arguments: tuple, processes: int, *, join: bool) -> Any:
    return start_processes(_work, (Stderr(), *arguments), processes, join=join, start_method=SERVER.get_start_method())


@pytest.fixture(scope="module", autouse=True)
def _from_a_server() -> Iterator[None]:
    """Fork the processes from a server that has the imports done; the commands below start their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "spawn", _start_from_server)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write volumes of two contrasts; half of the studies lack the second one."""
    folder, random, written = tmp_path_factory.mktemp("volumes"), np.random.default_rng(0), []
    for number in range(CASES):
        volume = 5 * gaussian_filter(random.normal(size=(2, 10 + number, 13, 12)), (0, 2, 2, 2)).astype(np.float32)
        volume[1] *= number % 2
        written.append(folder / f"case_{number}.b2nd")
        blosc2.asarray(volume, urlpath=str(written[-1]), mode="w")
    return written


def make_job(files: list[Path], *, adaptive: bool = False, epochs: int = 3, **options: Any) -> loop.PretrainingJob:
    return loop.PretrainingJob(
        files=files,
        channel_names=["T1", "FLAIR"],
        patch_size=PATCH,
        spacing=(1.5, 1.0, 1.0),
        network=Network(size="XS", token=(4, 4, 4), decoder="unetr", adaptive=adaptive),
        protocol=Pretraining(
            seed=3, epochs=epochs, batch_size=4, mask_ratio=0.6, base_lr=0.1, norm_pix=not adaptive, **options
        ),
    )


def train(
    job: loop.PretrainingJob,
    output: Path,
    device: torch.device,
    *,
    resume: bool = False,
    killed: tuple[int, int] | None = None,
    told: tuple[int, int, int] | None = None,
) -> None:
    """Pre-train and note what each process reads and writes.

    `killed` is a process and the read at which it dies, `told` the same and a signal that it sends to the launcher.
    """
    before = loop.SAVE_EVERY_SECONDS, loop.PICTURES
    loop.SAVE_EVERY_SECONDS, loop.PICTURES = 0.0, 1
    notes = output.with_name(f"{output.name}_{distributed.rank()}.txt").open("a")
    read = RandomCrops.__getitem__

    def noted(self: RandomCrops, reads: Sequence[int]) -> CropBatch:
        for number in reads:
            if killed == (distributed.rank(), number):
                os.kill(os.getpid(), signal.SIGKILL)
            if told and told[:2] == (distributed.rank(), number):
                os.kill(multiprocessing.parent_process().pid, told[2])
            print("read", number, file=notes, flush=True)
        return read(self, reads)

    def audit(event: str, arguments: tuple) -> None:
        writes = event in ("os.mkdir", "os.rename") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(str(output) + os.sep):
            print("wrote", arguments[0], file=notes, flush=True)

    sys.addaudithook(audit)
    RandomCrops.__getitem__ = noted
    try:
        loop.run(job, output, device=device, resume=resume)
    finally:  # one process runs in that of the tests
        RandomCrops.__getitem__ = read
        loop.SAVE_EVERY_SECONDS, loop.PICTURES = before


def train_all(tasks: list[Callable[[torch.device], None]], device: torch.device) -> None:
    for task in tasks:
        task(device)


def noted(output: Path, rank: int, what: str) -> list[str]:
    lines = output.with_name(f"{output.name}_{rank}.txt").read_text().splitlines()
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(what)]


def state_of(output: Path) -> dict:
    return torch.load(output / loop.STATE, weights_only=True)


def assert_same_end(output: Path, expected: Path) -> None:
    """Compare to rounding: Adam divides by the gradient's size, so weights with hardly any gradient may differ more."""
    ours, theirs = state_of(output), state_of(expected)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    for name, weights in theirs["network"].items():
        assert (ours["network"][name] - weights).abs().mean() < 1e-5, name


@pytest.fixture(scope="module")
def runs(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a plain, an adaptive and a fast network, each in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    jobs = {
        "plain": make_job(files),
        "adaptive": make_job(files, adaptive=True),
        "fast": make_job(files, decoder="cross", rebuilt_share=0.5, masks_per_crop=2),
    }
    for processes in (1, 2):
        tasks = [partial(train, job, folder / f"{name}_{processes}") for name, job in jobs.items()]
        distributed.start(partial(train_all, tasks), CPU, processes)
    return folder


@pytest.mark.parametrize("network", ["plain", "adaptive", "fast"])
def test_two_processes_end_where_one_does(runs, network):
    assert_same_end(runs / f"{network}_2", runs / f"{network}_1")
    assert "on 2 x cpu" in (runs / f"{network}_2" / "log.txt").read_text()


def test_each_process_reads_its_share(runs):
    joint, *shares = (
        list(map(int, noted(runs / run, rank, "read")))
        for run, rank in [("plain_1", 0), ("plain_2", 0), ("plain_2", 1)]
    )
    assert sorted(joint[1:]) == list(range(24))  # the first one is for the picture
    assert joint[0] == shares[0][0] == 0
    assert not set(shares[0][1:]) & set(shares[1])
    assert len(shares[0][1:]) == len(shares[1]) == 12
    assert sorted(shares[0][1:] + shares[1]) == sorted(joint[1:])


def test_only_rank_0_writes(runs):
    assert noted(runs / "plain_2", 0, "wrote")
    assert not noted(runs / "plain_2", 1, "wrote")


def test_the_shares_make_up_the_batch():
    shares = [list(ConsecutiveBatches(2, 4, 6, rank=rank, processes=3)) for rank in range(3)]
    assert [sorted(chain(*parts)) for parts in zip(*shares, strict=True)] == list(ConsecutiveBatches(2, 4, 6))
    assert all(len(part) == 2 for share in shares for part in share)


def test_a_killed_process_ends_the_run_and_another_one_goes_on(runs, files, tmp_path, capfd):
    job = make_job(files)
    with pytest.raises(UserError, match="ended by SIGKILL"):
        distributed.start(partial(train, job, tmp_path / "out", killed=(0, 12)), CPU, 2)
    assert not multiprocessing.active_children()
    assert len(state_of(tmp_path / "out")["losses"]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "Terminating" not in error

    distributed.start(partial(train, job, tmp_path / "out", resume=True), CPU, 2)
    assert_same_end(tmp_path / "out", runs / "plain_1")
    assert "continuing after epoch 1 of 3" in (tmp_path / "out" / "log.txt").read_text()


def test_all_processes_stop_at_a_loss_that_is_not_finite_and_name_its_cases(files, tmp_path, capfd):
    broken = np.full((2, *PATCH), np.nan, dtype=np.float32)
    blosc2.asarray(broken, urlpath=str(tmp_path / "nan.b2nd"), mode="w")
    job = make_job([*files, tmp_path / "nan.b2nd"])
    crops = job.crops()
    bad = next(read for read in range(len(job.files)) if crops.file_of(read).stem == "nan")
    with pytest.raises(SystemExit) as stop:
        distributed.start(partial(train, job, tmp_path / "out"), CPU, 2)
    assert stop.value.code == 2
    error = capfd.readouterr().err
    pair = [
        crops.file_of(read).stem for read in ConsecutiveBatches(0, job.steps, 4, rank=bad % 2, processes=2).of(bad // 4)
    ]
    assert error.count(f"The loss is nan in step {bad // 4 + 1} of epoch 1, whose batch is of {', '.join(pair)}; ") == 1
    assert "voxels of nan are NaN or infinite" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / loop.STATE).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_processes_after_the_same_step(runs, files, tmp_path, capfd, number):
    """The launcher is told, as torchrun and Slurm tell it; one process reads ahead of the others."""
    job = make_job(files)
    usual = signal.signal(number, signal.default_int_handler)  # in the background Ctrl+C is ignored
    try:
        with pytest.raises(SystemExit) as stop, stoppable("Nothing is kept."):
            distributed.start(partial(train, job, tmp_path / "out", told=(1, 9, number)), CPU, 2)
    finally:
        signal.signal(number, usual)
    assert stop.value.code == 128 + number
    assert not multiprocessing.active_children()
    error = capfd.readouterr().err
    assert "Traceback" not in error
    sentence = f"Stopped by {signal_name(number)}. The state is saved in {tmp_path / 'out' / loop.STATE}"
    assert error.count("Stopped by") == error.count(sentence) == 1
    state = state_of(tmp_path / "out")
    assert 2 <= len(state["losses"]) * job.steps_per_epoch + len(state["begun"]) < job.steps

    distributed.start(partial(train, job, tmp_path / "out", resume=True), CPU, 2)
    assert_same_end(tmp_path / "out", runs / "plain_1")


def fail(error: Exception, device: torch.device) -> None:
    if distributed.rank() == 1:
        raise error
    distributed.averaged(torch.ones(1))


def fail_together(error: Exception, device: torch.device) -> None:
    raise error


def test_an_unexpected_error_is_shown_whole():
    with pytest.raises(Exception, match=r"(?s)Process 1 .*ZeroDivisionError: look here"):
        distributed.start(partial(fail, ZeroDivisionError("look here")), CPU, 2)


@pytest.mark.parametrize("task", [fail, fail_together])
def test_an_error_of_any_process_is_reported_once(task, capfd):
    with pytest.raises(SystemExit, match="2"):
        distributed.start(partial(task, UserError("The case is damaged.")), CPU, 2)
    assert capfd.readouterr().err.count("Error: The case is damaged.") == 1


@pytest.mark.parametrize(
    ("error", "code"), [(distributed.CommonError("The loss is NaN."), 2), (Stopped(signal.SIGTERM), 143)]
)
def test_rank_0_reports_for_all(monkeypatch, error, code):
    with pytest.raises(type(error)), distributed.reported_once():
        raise error
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.0)
    with pytest.raises(SystemExit, match=str(code)), distributed.reported_once():
        raise error


def test_two_runs_do_not_share_a_folder(tmp_path):
    """The lock ends with its process, however that ends."""
    lines = ["import sys, pathlib", "from nnunet_vit_mae.storage import files"]
    script = "\n".join([*lines, "with files.locked(pathlib.Path(sys.argv[1])): print(1); input()"])
    with subprocess.Popen(
        [sys.executable, "-u", "-c", script, str(tmp_path / "fold_0")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with (
            pytest.raises(UserError, match=r"Another process is writing to .*fold_0: wait"),
            locked(tmp_path / "fold_0"),
        ):
            pytest.fail("two at a time")
        with locked(tmp_path / "fold_1"):
            other.kill()
            other.wait()
    with locked(tmp_path / "fold_0"):
        (tmp_path / "fold_0").mkdir()
        (tmp_path / "fold_0").rename(tmp_path / "elsewhere")


def test_what_a_killed_process_left_half_written_is_removed(files, tmp_path):
    job = make_job(files, epochs=1)
    tmp_path.joinpath(f".123_0123abcd.{loop.STATE}").write_bytes(b"half")
    loop.run(job, tmp_path, device=CPU, resume=True)
    assert not list(tmp_path.glob(".*"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"2 processes .* need as many GPUs, but torch finds 1"):
        distributed.start(partial(fail, ValueError()), torch.device("cuda"), 2)


def test_torchrun_and_a_number_of_processes_are_refused_together(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match=r"torchrun has set the number of processes already: leave out -num_gpus\."):
        distributed.start(partial(fail, ValueError()), CPU, 2)


class TestCommand:
    """Run `mae3d_pretrain` itself on a dataset that nnU-Net preprocessed."""

    pytestmark = pytest.mark.slow
    command = ("-d", "901", "-device", "cpu", "--epochs", "2", "--batch_size", "4")

    @pytest.fixture(autouse=True)
    def small(self, in_workspace, capsys):
        """Write plans with the smallest network."""
        from nnunet_vit_mae.cli.plan import main

        main("-d 901 -o Tiny --size XS --token 8".split())

    def test_torchrun_ends_where_one_process_does(self, in_workspace):
        arguments = (*self.command, "-p", "Tiny", "--cache", "0.1")
        folder = in_workspace.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_all"
        in_workspace.call("mae3d_pretrain", *arguments)
        folder.rename(folder.with_name("alone"))
        launcher = ("torchrun", "--nproc_per_node", "2", "--no-python", "mae3d_pretrain")
        done = in_workspace.type(*launcher, *arguments)
        assert done.stdout.count("The encoder is ") == 1
        assert_same_end(folder, folder.with_name("alone"))
        assert (folder / "encoder.safetensors").is_file()

    def test_a_killed_process_gives_one_sentence(self, in_workspace):
        command = [Path(sys.executable).with_name("mae3d_pretrain"), *self.command, "-p", "Tiny", "-num_gpus", "2"]
        command[command.index("--epochs") + 1] = "100000"
        log = in_workspace.results / "mae3d_pretrain__Tiny__3d_fullres" / "fold_all" / "log.txt"
        with subprocess.Popen(command, env=in_workspace.environment, stderr=subprocess.PIPE, text=True) as running:
            while not (log.is_file() and "epoch 2" in log.read_text()):
                assert running.poll() is None
                time.sleep(0.1)
            done = in_workspace.call("mae3d_pretrain", *self.command, "-p", "Tiny", code=2)
            assert "Another process is writing to" in done.stderr
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            started = time.monotonic()
            error = running.communicate(timeout=240)[1]
        assert running.returncode == 2
        assert time.monotonic() - started < 120
        assert "Traceback" not in error
        assert error.splitlines()[-1].startswith("Error: A process of this pre-training was ended by SIGKILL")

    def test_a_batch_that_cannot_be_divided_is_refused(self, refused):
        from nnunet_vit_mae.cli.pretrain import main

        assert "multiple of 3" in refused(main, *self.command, "-p", "Tiny", "-num_gpus", "3")
