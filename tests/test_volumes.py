"""Test that volumes in shared memory give the same crops, keep to the limit and leave nothing behind."""

import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.nnunet import pretraining as preparation
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining import run as loop
from nnunet_vit_mae.pretraining import volumes as module
from nnunet_vit_mae.pretraining.affines import AffineDrawing
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.pretraining.volumes import Cache, DeviceCache
from nnunet_vit_mae.settings import Network, Pretraining

pytestmark = pytest.mark.usefixtures("few_pictures")

CPU = torch.device("cpu")
PATCH = (8, 12, 10)
SHAPES = [(9, 15, 11), (12, 13, 10), (8, 12, 10), (10, 9, 14)]
BYTES = [2 * 2 * int(np.prod(shape)) for shape in SHAPES]
PLENTY = sum(BYTES)
DRAWING = MaskDrawing(masking=Masking(mask_ratio=0.6), token=(4, 4, 4))


@pytest.fixture
def files(tmp_path):
    random, written = np.random.default_rng(0), []
    for number, shape in enumerate(SHAPES):
        written.append(tmp_path / f"case_{number}.b2nd")
        blosc2.asarray(random.normal(size=(2, *shape)).astype(np.float32), urlpath=str(written[-1]), mode="w")
    return written


@pytest.fixture(params=[(1, 1), (2, 3)], ids=["one", "several"])
def crops_of(request):
    count, masks = request.param
    drawing = replace(DRAWING, masks_per_crop=masks)
    return lambda files, cache: RandomCrops(files, PATCH, drawing, 1, cache, crops_per_volume=count)


def is_there(name: str) -> bool:
    try:
        SharedMemory(name).close()
    except FileNotFoundError:
        return False
    return True


def test_crops_are_those_of_the_files_in_half_precision(files, crops_of):
    with Cache(files, PLENTY) as cache:
        assert len(cache) == len(files)
        cached, direct = crops_of(files, cache)[range(12)], crops_of(files, None)[range(12)]
        assert cached.crops.dtype == torch.half
        assert torch.equal(cached.crops, direct.crops.half())
        assert torch.equal(cached.flips, direct.flips)
        assert all(torch.equal(a, b) for a, b in zip(cached.masks, direct.masks, strict=True))


@pytest.mark.parametrize("affines", [None, AffineDrawing(rotation=30.0, scaling=(0.7, 1.4), spacing=(1.5, 1.0, 1.0))])
def test_crops_that_are_cut_on_the_device_are_those_of_the_readers(files, crops_of, affines):
    with Cache(files, PLENTY) as cache:
        read, cut = crops_of(files, cache), crops_of(files, DeviceCache(files, CPU))
        read.affines = cut.affines = affines
        a, b = read[range(12)], cut[range(12)]
    assert torch.equal(a.crops, b.crops)
    assert a.present == b.present
    for one, other in zip(a.samples(CPU).masks, b.samples(CPU).masks, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(a.samples(CPU).volume, b.samples(CPU).volume)
    held = [tensor.clone() for tensor in cut.cache.volumes.values()]
    b.crops.zero_()
    assert all(torch.equal(*pair) for pair in zip(held, cut.cache.volumes.values(), strict=True))


@pytest.mark.parametrize(
    ("free", "limit", "settings", "reason"),
    [
        (10 * PLENTY, PLENTY, {}, None),
        (2 * PLENTY + 1000, 10 * PLENTY, {}, None),
        (2 * PLENTY + 999, 10 * PLENTY, {}, "the GPU has room for"),
        (-1, 10 * PLENTY, {}, r"the GPU has room for 0 B"),
        (10 * PLENTY, PLENTY - 1, {}, "--cache allows"),
        (10 * PLENTY, PLENTY, {"skip_background": True}, "masks depend on the voxels"),
    ],
)
def test_volumes_are_cached_on_a_gpu_that_has_room(files, monkeypatch, caplog, free, limit, settings, reason):
    monkeypatch.setattr(preparation, "free_memory_of", lambda _: free)
    monkeypatch.setattr(preparation, "_step_bytes", lambda *_: 1000)
    machine = preparation.Machine(device=torch.device("cuda"), cache_bytes=limit)
    caplog.set_level("INFO")
    assert preparation._fits_on_device(job_of(files, None, **settings), machine) == (reason is None)
    assert len(caplog.messages) == (reason is not None)
    assert re.search(reason or "", "".join(caplog.messages))


def test_the_fullest_of_several_gpus_decides(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free = {torch.device("cuda", 0): 10 * PLENTY, torch.device("cuda", 1): PLENTY}
    monkeypatch.setattr(preparation, "free_memory_of", free.__getitem__)
    monkeypatch.setattr(preparation, "_step_bytes", lambda *_: 1000)
    for processes, fits in {1: True, 2: False, 3: False}.items():
        machine = preparation.Machine(device=torch.device("cuda"), processes=processes, cache_bytes=PLENTY)
        free[machine.device] = 10 * PLENTY
        assert preparation._fits_on_device(job_of(files, None), machine) == fits


def test_a_step_takes_more_on_a_gpu_without_bf16(files, monkeypatch):
    machine, estimates = preparation.Machine(device=torch.device("cuda")), {}
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation, found=has_bf16: found)
        estimates[has_bf16] = preparation._step_bytes(job_of(files, None, batch_size=64), machine)
    cpu = preparation._step_bytes(job_of(files, None, batch_size=64), preparation.Machine(device=CPU))
    assert estimates[True] < estimates[False] == cpu


def test_under_torchrun_each_process_asks_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.own_device(torch.device("cuda")) == torch.device("cuda")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for rank, expected in {"0": "cuda:0", "1": "cuda:1", "2": "cuda"}.items():  # too few GPUs are refused later
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert distributed.own_device(torch.device("cuda")) == torch.device(expected)
    assert distributed.own_device(CPU) == CPU


def test_the_limit_holds_and_changes_no_crop(files, crops_of):
    with Cache(files, 3 * sum(BYTES[:3]) - 1, copies=3) as some, Cache(files, PLENTY) as every:
        assert len(some) == 2
        assert [some.get(file) is None for file in files] == [False, False, True, True]
        assert torch.equal(crops_of(files, some)[range(12)].crops, crops_of(files, every)[range(12)].crops)


def test_a_crop_is_no_view_of_the_volume(files, crops_of):
    with Cache(files, PLENTY) as cache:
        crops_of(files, cache)[range(12)].crops.zero_()
        assert all(np.count_nonzero(cache.get(file)) > 0.9 * np.size(cache.get(file)) for file in files)


@pytest.mark.parametrize(
    ("free", "whole", "more", "fits"),
    [
        (PLENTY, PLENTY, {}, True),
        (PLENTY, PLENTY, {"spare": 1}, False),
        (PLENTY + 1, PLENTY + 1, {"spare": 1}, True),
        (PLENTY, PLENTY, {"copies": 2}, False),
        (PLENTY, 2 * PLENTY, {"copies": 2}, True),  # another copy has taken its part already
        (PLENTY - 1, 2 * PLENTY, {}, False),
    ],
)
def test_more_than_there_is_is_refused(files, monkeypatch, free, whole, more, fits):
    monkeypatch.setattr(module, "shared_memory", lambda: (whole, free))
    if fits:
        with Cache(files, 2 * PLENTY, **more) as cache:
            assert len(cache) == len(files)
    else:
        with pytest.raises(UserError, match=r"do not fit into .*B free: give a smaller --cache"):
            Cache(files, 2 * PLENTY, **more)


def test_a_cache_without_room_for_a_volume_is_still_one(files, tmp_path):
    """Crops are in half precision whether their volumes are in the cache or not."""
    with Cache(files, 1) as nothing, Cache(files, PLENTY) as every:
        assert len(nothing) == 0
        assert RandomCrops(files, PATCH, DRAWING, 1, nothing)[[0]].crops.dtype == torch.half
        few = loop.run(job_of(files, nothing), tmp_path / "run", device=CPU, resume=False)
        assert few.losses == loop.run(job_of(files, every), tmp_path / "other", device=CPU, resume=False).losses
    assert "0 of the cases in memory" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("value", [1e5, np.nan])
def test_voxels_beyond_half_precision_are_refused(files, monkeypatch, value):
    volume = np.full((2, *PATCH), value, dtype=np.float32)
    blosc2.asarray(volume, urlpath=str(files[2]), mode="w")
    made = []
    monkeypatch.setattr(module, "SharedMemory", lambda **given: made.append(SharedMemory(**given)) or made[0])
    for make in (lambda: DeviceCache(files, CPU), lambda: Cache(files, PLENTY)):
        with pytest.raises(UserError, match=r"case_2.b2nd has voxels .* leave out --cache"):
            make()
    assert not is_there(made[0].name)


@pytest.mark.parametrize("count", [1, 2])
def test_they_are_refused_beside_a_cache_too_for_all_its_crops_are_in_half_precision(files, count):
    blosc2.asarray(np.full((2, *PATCH), 1e5, dtype=np.float32), urlpath=str(files[2]), mode="w")
    assert RandomCrops(files, PATCH, DRAWING, 1, crops_per_volume=count)[range(12)].crops.isfinite().all()
    with (
        Cache(files, BYTES[0]) as cache,
        pytest.raises(UserError, match=r"case_2.b2nd has voxels .* leave out --cache"),
    ):
        RandomCrops(files, PATCH, DRAWING, 1, cache, crops_per_volume=count)[range(12)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_alone_shows_how_many_volumes_are_read(files, monkeypatch, capsys, rank):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    DeviceCache(files, CPU)
    with Cache(files, PLENTY):
        pass
    shown = capsys.readouterr().err
    assert ("reading into memory: 4 of 4 volumes" in shown) == (rank == 0)
    assert ("reading into the memory of the device: 4 of 4 volumes" in shown) == (rank == 0)


def test_the_memory_is_freed_at_the_end(files):
    with Cache(files, PLENTY) as cache:
        copy = pickle.loads(pickle.dumps(cache))
        assert np.array_equal(copy.get(files[1]), cache.get(files[1]))
        name = cache._memory.name
        assert is_there(name)
    assert not is_there(name)


def test_the_memory_of_a_killed_process_is_freed(files):
    script = (
        "import pathlib, sys; from nnunet_vit_mae.pretraining.volumes import Cache\n"
        "with Cache([pathlib.Path(file) for file in sys.argv[1:]], 10**6) as cache: print(cache._memory.name); input()"
    )
    command = [sys.executable, "-u", "-c", script, *map(str, files)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdout
        name = other.stdout.readline().strip()
        assert Path("/dev/shm", name.strip("/")).exists()
        other.kill()
    end = time.monotonic() + 60
    while Path("/dev/shm", name.strip("/")).exists():
        assert time.monotonic() < end
        time.sleep(0.1)


def job_of(files, cache, **protocol):
    return loop.PretrainingJob(
        files=files,
        channel_names=["T1", "FLAIR"],
        patch_size=PATCH,
        spacing=(1.5, 1.0, 1.0),
        network=Network(size="XS", token=(4, 4, 4)),
        protocol=Pretraining(**{"seed": 3, "epochs": 3, "batch_size": 2, "mask_ratio": 0.6, "base_lr": 0.1} | protocol),
        cache=cache,
    )


def train(job: loop.PretrainingJob, output: Path, device: torch.device) -> None:
    loop.run(job, output, device=device, resume=False)


def test_processes_share_one_cache(files, tmp_path, capfd):
    with Cache(files, PLENTY) as cache:
        alone = loop.run(job_of(files, cache), tmp_path / "alone", device=CPU, resume=False)
        distributed.start(partial(train, job_of(files, cache), tmp_path / "joint"), CPU, 2)
    losses = torch.load(tmp_path / "joint" / "state.pt", weights_only=True)["losses"]
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    assert "4 of the cases in memory" in (tmp_path / "joint" / "log.txt").read_text()
    assert "resource_tracker" not in capfd.readouterr().err


def test_the_loss_differs_by_rounding_only_and_goes_on_with_a_cache_alone(files, tmp_path):
    direct = loop.run(job_of(files, None), tmp_path / "direct", device=CPU, resume=False)
    with Cache(files, PLENTY) as cache:
        cached = loop.run(job_of(files, cache), tmp_path / "cached", device=CPU, resume=False)
        with pytest.raises(UserError, match=r"settings \(half_precision_crops"):
            loop.run(job_of(files, cache), tmp_path / "direct", device=CPU, resume=True)
        assert loop.run(job_of(files, cache), tmp_path / "cached", device=CPU, resume=True).losses == cached.losses
    on_device = loop.run(job_of(files, DeviceCache(files, CPU)), tmp_path / "device", device=CPU, resume=False)
    assert on_device.losses == cached.losses
    assert "4 of the cases in the memory of the device" in (tmp_path / "device" / "log.txt").read_text()
    with pytest.raises(UserError, match=r"settings \(half_precision_crops"):
        loop.run(job_of(files, None), tmp_path / "cached", device=CPU, resume=True)
    assert cached.losses == pytest.approx(direct.losses, rel=2e-3)
    assert cached.losses != direct.losses
