"""Test crops, the pre-training loop and its pictures on files written as nnU-Net writes them."""

import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import blosc2
import numpy as np
import pytest
import torch
from conftest import Sharp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.optimisation import warmup_cosine
from nnunet_vit_mae.pretraining import crops as module
from nnunet_vit_mae.pretraining import loss as step
from nnunet_vit_mae.pretraining import readers
from nnunet_vit_mae.pretraining import run as loop
from nnunet_vit_mae.pretraining.crops import (
    ConsecutiveBatches,
    CropBatch,
    MaskDrawing,
    RandomCrops,
    Samples,
    random_crop,
)
from nnunet_vit_mae.pretraining.pictures import interpolated, rebuild
from nnunet_vit_mae.pretraining.saved_state import read_state
from nnunet_vit_mae.pretraining.volumes import open_volume, volume_problem
from nnunet_vit_mae.processes import memory
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.storage.csv_tables import read_rows

pytestmark = pytest.mark.usefixtures("few_pictures")

CPU = torch.device("cpu")
PATCH = (8, 12, 10)
SEEDS = st.integers(0, 99)
NETWORK = Network(size="XS", token=(4, 4, 4))
MASKING = Masking(mask_ratio=0.6)
DRAWING = MaskDrawing(masking=MASKING, token=(4, 4, 4))
MOVED = {"rotation": 30.0, "scaling": (0.7, 1.4), "crops_per_volume": 2}
FASTEST = {"decoder": "cross", "decoder_heads": 2, "rebuilt_share": 0.25, "skip_background": True, "masks_per_crop": 2}


def write_volume(file, volume):
    blosc2.asarray(np.ascontiguousarray(volume), urlpath=str(file), mode="w")
    return file


@pytest.fixture
def files(tmp_path_factory):
    """Write five smooth volumes of two channels and different sizes, one smaller than the patch along y."""
    folder = tmp_path_factory.mktemp("cases")  # a new run moves an earlier one in its folder aside
    random = np.random.default_rng(0)
    shapes = [(9, 15, 11), (12, 13, 10), (8, 12, 10), (10, 9, 14), (11, 14, 12)]
    volumes = [
        2 + 5 * gaussian_filter(random.normal(size=(2, *shape)), (0, 2, 2, 2)).astype(np.float32) for shape in shapes
    ]
    return [write_volume(folder / f"case_{i}.b2nd", volume) for i, volume in enumerate(volumes)]


@pytest.fixture
def make_job(files):
    def make(**protocol):
        settings = {"seed": 3, "epochs": 4, "batch_size": 2, "mask_ratio": 0.6, "base_lr": 0.1} | protocol
        return loop.PretrainingJob(
            files=files,
            channel_names=["T1", "FLAIR"],
            patch_size=PATCH,
            spacing=(1.5, 1.0, 1.0),
            network=NETWORK,
            protocol=Pretraining(**settings),
        )

    return make


@pytest.fixture
def saving_always(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)


@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), patch=st.tuples(*[st.integers(1, 9)] * 3), seed=SEEDS)
def test_a_crop_is_a_piece_of_the_volume_with_zeros_around_it(tmp_path_factory, shape, patch, seed):
    volume = np.arange(1, 1 + 2 * math.prod(shape), dtype=np.float32).reshape(2, *shape)
    file = write_volume(tmp_path_factory.mktemp("crop") / "case.b2nd", volume)
    crop, bounds = random_crop(open_volume(file), patch, np.random.default_rng(seed))
    crop = crop.numpy()
    assert crop.shape == (2, *patch)
    inside = crop[0] > 0
    assert inside[tuple(slice(first, end) for first, end in bounds)].all()
    assert math.prod(end - first for first, end in bounds) == inside.sum()
    assert inside.sum() == math.prod(min(a, b) for a, b in zip(shape, patch, strict=True))
    assert np.array_equal(crop[1][inside] - crop[0][inside], np.full(inside.sum(), math.prod(shape)))
    steps = [np.diff(crop[0], axis=axis)[np.diff(inside.astype(int), axis=axis) == 0] for axis in range(3)]
    strides = (shape[1] * shape[2], shape[2], 1)
    assert all(set(step.tolist()) <= {0.0, stride} for step, stride in zip(steps, strides, strict=True))


def test_crops_reach_every_place(files):
    random = np.random.default_rng(0)
    whole = blosc2.open(str(files[0]))[:]
    corners = {float(random_crop(open_volume(files[0]), PATCH, random)[0][0, 0, 0, 0]) for _ in range(200)}
    reachable = whole[0, : 9 - 8 + 1, : 15 - 12 + 1, : 11 - 10 + 1]
    assert corners == set(reachable.ravel().tolist())


def tensors(batch: CropBatch) -> list[torch.Tensor]:
    return [batch.crops, batch.flips, *batch.masks]


def crops_of(files, *, seed=1, crops_per_volume=1, **drawing):
    return RandomCrops(files, PATCH, replace(DRAWING, **drawing), seed, crops_per_volume=crops_per_volume)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("several", [{}, {"crops_per_volume": 3, "masks_per_crop": 2}], ids=["one", "several"])
def test_what_a_read_gives_depends_on_seed_and_number_alone(files, several, adaptive):
    first, second = (crops_of(files, adaptive=adaptive, **several) for _ in range(2))
    together = first[[11, 3, 4]]
    alone = [second[[read]] for read in (11, 3, 4)]
    for part, parts in zip(tensors(together), zip(*map(tensors, alone), strict=True), strict=True):
        assert torch.equal(part, torch.cat(parts))
    assert together.present == [own for batch in alone for own in batch.present]
    other = crops_of(files, adaptive=adaptive, seed=2, **several)[[3]]
    assert not torch.equal(alone[1].crops, other.crops)
    assert not torch.equal(alone[1].masks.visible, other.masks.visible)


@settings(max_examples=25, deadline=None)
@given(
    present=st.lists(st.sets(st.integers(0, 3)).map(sorted), min_size=1, max_size=3),
    masks=st.integers(1, 2),
    adaptive=st.booleans(),
    skip=st.booleans(),
    seed=SEEDS,
)
def test_each_sample_or_contrast_image_has_a_mask_of_its_own(present, masks, adaptive, skip, seed):
    drawing = replace(DRAWING, adaptive=adaptive, skip_background=skip, masks_per_crop=masks)
    crops = torch.randn(len(present), 4, *PATCH, generator=torch.Generator().manual_seed(seed))
    for study, contrasts in enumerate(present):
        crops[study, sorted({*range(4)} - {*contrasts})] = 0
    size = drawing.noise_size(PATCH, 4)
    assert size == (4 if adaptive else 1) * 18
    noise = torch.rand(len(present), masks, size, generator=torch.Generator().manual_seed(seed))
    inside = torch.tensor([[0, side] for side in PATCH]).expand(len(present), 3, 2)
    drawn, channels = drawing.draw(crops, inside, torch.zeros(len(present), 3, dtype=torch.bool), noise)
    expected = [(contrasts or [0]) if adaptive else [0, 1, 2, 3] for contrasts in present]
    assert channels == [own for own in expected for _ in range(masks)]
    if adaptive:
        noise = noise.unflatten(2, (4, 18))
        own = [noise[s, m, c] for s, contrasts in enumerate(expected) for m in range(masks) for c in contrasts]
    else:
        own = list(noise.flatten(0, 1))
    assert len(drawn.visible) == len(drawn.hidden) == len(own)
    if all(present):  # all tokens have content
        for visible, hidden, of_image in zip(drawn.visible, drawn.hidden, own, strict=True):
            assert [*visible.tolist(), *hidden.tolist()] == of_image.argsort().tolist()
        assert drawn.counted.all()
    else:
        assert drawn.counted.any(dim=1).tolist() == [
            bool(contrasts) or not skip
            for contrasts, shown in zip(present, expected, strict=True)
            for _ in range(masks * (len(shown) if adaptive else 1))
        ]


def numbered(tmp_path, shape):
    """Write a file in which each voxel is its own number."""
    return write_volume(tmp_path / "case.b2nd", np.arange(math.prod(shape), dtype=np.float32).reshape(1, *shape))


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(*[st.integers(2, 30)] * 3), count=st.integers(2, 5), masks=st.integers(1, 3), seed=SEEDS)
def test_several_crops_lie_near_one_another_inside_the_volume(tmp_path_factory, shape, count, masks, seed):
    file, patch = numbered(tmp_path_factory.mktemp("several"), shape), (6, 4, 9)
    drawing = replace(DRAWING, token=(1, 2, 3), masks_per_crop=masks)
    crops, _, drawn, *_ = RandomCrops([file], patch, drawing, seed, crops_per_volume=count)[[0]]
    assert crops.shape == (count, 1, *patch)
    assert len(drawn.visible) == count * masks
    if all(side >= size for side, size in zip(shape, patch, strict=True)):  # no token lies outside of the volume
        assert drawn.visible.shape[1] == 14  # of 36 tokens
        assert len(np.unique(drawn.visible.numpy(), axis=0)) == count * masks
    # zeros surround only a volume that is smaller than the crop: a region at the border adds none
    full = math.prod(min(a, b) for a, b in zip(shape, patch, strict=True))
    assert all(np.unique(crop[crop > 0]).size >= full - 1 for crop in crops.numpy())
    places = np.stack(np.unravel_index(np.unique(crops.numpy()[crops.numpy() > 0]).astype(int), shape), axis=1)
    assert all(np.ptp(places, axis=0) < [round(1.5 * side) for side in patch])


def test_several_crops_of_a_volume_differ(tmp_path):
    file = numbered(tmp_path, (20, 30, 25))
    crops = RandomCrops([file], (8, 8, 8), DRAWING, 0, crops_per_volume=8)[[0]].crops
    assert len(np.unique(crops.numpy().reshape(8, -1).max(axis=1))) > 4


def test_a_region_is_read_once_for_several_crops(files, monkeypatch):
    opened = []
    monkeypatch.setattr(module, "open_volume", lambda file, **how: opened.append(file) or open_volume(file, **how))
    crops_of(files, crops_per_volume=4)[[0, 1]]
    assert len(opened) == 2


@pytest.mark.parametrize("several", [{"crops_per_volume": 2}, {"masks_per_crop": 2}])
def test_a_batch_of_several_crops_or_masks_is_learned_from(make_job, tmp_path, several):
    job = make_job(epochs=20, batch_size=4, norm_pix=False, **several)
    result = loop.run(job, tmp_path, device=CPU, resume=False)
    assert np.mean(result.losses[-5:]) < 0.5 * result.losses[0]
    log = (tmp_path / "log.txt").read_text()
    crops, masks = several.get("crops_per_volume", 1), several.get("masks_per_crop", 1)
    assert f"2 volumes read for a batch, {crops} crops of each, {masks} masks of each crop" in log
    assert "20 epochs of 2 steps, batch 4" in log


def test_each_mask_of_a_crop_is_a_sample_of_the_batch():
    crops, none = torch.randn(2, 1, *PATCH), torch.zeros(2, 3, dtype=torch.bool)
    masks = MASKING.draw(torch.rand(6, 18))
    samples = CropBatch(crops.half(), none, masks, [[0]] * 6).samples(CPU)
    assert samples.volume.dtype == torch.float
    assert len(samples.volume) == len(samples.present) == 6
    for number, volume in enumerate(samples.volume):
        assert torch.equal(volume, crops[number // 3].half().float())
    assert all(torch.equal(a, b) for a, b in zip(samples.masks, masks, strict=True))


@pytest.mark.parametrize(
    ("present", "adaptive", "images"),
    [([[0, 2], [1]], True, 2), ([[1], [2]], True, 1), ([[0, 1, 2]] * 2, False, 1), ([[0, 1, 2]] * 2, True, 3)],
)
def test_the_first_sample_keeps_the_masks_of_its_own_images(present, adaptive, images):
    masks = MASKING.draw(torch.rand(sum(map(len, present)) if adaptive else len(present), 18))
    volume, own, channels = Samples(torch.randn(2, 3, *PATCH), masks, present).first()
    assert volume.shape == (1, 3, *PATCH)
    assert channels == present[:1]
    assert all(torch.equal(a, b[:images]) for a, b in zip(own, masks, strict=True))


def test_each_crop_is_flipped_along_its_own_axes():
    crops, flips = torch.randn(8, 2, *PATCH), torch.tensor(list(itertools.product([False, True], repeat=3)))
    masks = MASKING.draw(torch.rand(8, 18))
    volumes = CropBatch(crops, flips, masks, [[0, 1]] * 8).samples(CPU).volume
    for crop, axes, volume in zip(crops, flips, volumes, strict=True):
        assert torch.equal(volume, crop.flip([axis for axis in (1, 2, 3) if axes[axis - 1]]))


def test_crops_are_flipped_half_of_the_time_along_each_axis(files):
    flips = crops_of(files)[range(400)].flips.float()
    assert torch.allclose(flips.mean(dim=0), torch.tensor(0.5), atol=0.1)
    assert torch.corrcoef(flips.T).fill_diagonal_(0).abs().max() < 0.2


def test_each_pass_shows_every_case_once(files):
    crops = crops_of(files)
    passes = [[crops.file_of(5 * number + position).name for position in range(5)] for number in range(6)]
    assert all(sorted(order) == sorted(file.name for file in files) for order in passes)
    assert len(set(map(tuple, passes))) > 1


def test_crops_reach_worker_processes_that_start_afresh(files):
    """On Windows nothing is inherited, so everything must be picklable."""
    copy = pickle.loads(pickle.dumps(crops_of(files)))
    assert torch.equal(copy[[7]].crops, crops_of(files)[[7]].crops)


def test_the_loss_falls_and_everything_is_written(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PICTURES", 3)
    job = make_job(epochs=25, norm_pix=False)
    result = loop.run(job, tmp_path / "out", device=CPU, resume=False)
    assert len(result.losses) == 25
    assert np.mean(result.losses[-5:]) < 0.3 * result.losses[0]
    written = {
        file.relative_to(tmp_path / "out").as_posix() for file in (tmp_path / "out").rglob("*") if file.is_file()
    }
    pictures = {f"reconstructions/epoch_{epoch:04d}.png" for epoch in (9, 18, 25)}
    assert written == {"README.txt", "config.json", "log.txt", "metrics.csv", "progress.png", "state.pt"} | pictures
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "cases 5" in log
    assert "18 tokens, 7 of them visible" in log
    assert log.count("epoch ") == 25
    assert "attend to one another (MAE); in a step it rebuilds 11 of 11 masked tokens" in log
    assert "without content" not in log


@pytest.mark.parametrize(("seconds", "low", "high"), [(0.5, 50, 100), (0, 0, 50)])
def test_the_log_says_how_long_a_run_waited(make_job, tmp_path, monkeypatch, seconds, low, high):
    read = RandomCrops.__getitem__
    monkeypatch.setattr(RandomCrops, "__getitem__", lambda self, reads: time.sleep(seconds) or read(self, reads))
    loop.run(make_job(epochs=2, batch_size=5), tmp_path, device=CPU, resume=False)
    shares = re.findall(r"s \(([\d.]+)% waiting for crops\)", (tmp_path / "log.txt").read_text())
    assert len(shares) == 2
    assert low <= float(shares[1]) <= high
    for row, share in zip(read_rows(tmp_path / "metrics.csv"), shares, strict=True):
        assert 100 * float(row["waiting_share"]) == pytest.approx(float(share), abs=0.1)
        assert seconds * low / 100 < float(row["seconds_per_step"]) <= float(row["seconds_per_epoch"])  # one step
        took = float(row["epoch_end_timestamps"]) - float(row["epoch_start_timestamps"])
        assert took == pytest.approx(float(row["seconds_per_epoch"]), rel=1e-3)


def test_readers_change_nothing_but_the_time(make_job, tmp_path):
    job = make_job(epochs=2, masks_per_crop=2)
    alone = loop.run(job, tmp_path / "alone", device=CPU, resume=False)
    assert loop.run(job, tmp_path / "read", device=CPU, resume=False, readers=1).losses == alone.losses


class Fails(RandomCrops):
    """Crops of which one kills its reader, or is never read."""

    def __getitem__(self, reads):
        if 4 in reads:
            self.fail()
        return super().__getitem__(reads)


@pytest.mark.parametrize(
    ("fail", "sentence"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "A process that reads crops was killed"),
        (lambda: time.sleep(600), "No reader has given a batch"),
    ],
)
def test_a_reader_that_dies_or_hangs_is_noticed(files, monkeypatch, fail, sentence):
    monkeypatch.setattr(readers, "READER_SECONDS", 3.0)
    crops = Fails(files, PATCH, DRAWING, seed=3)
    crops.fail = fail
    batches = readers.read_batches(crops, ConsecutiveBatches(0, 4, 2), 1, pin_memory=False)
    with pytest.raises(UserError, match=sentence), readers.reader_failures(), closing(batches):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("processes", [0, 1])
def test_a_volume_that_is_damaged_or_missing_is_named_when_it_is_read(tmp_path, processes):
    volume = np.random.default_rng(0).normal(size=(2, 40, 24, 20)).astype(np.float32)
    file = tmp_path / "case_0.b2nd"
    blosc2.asarray(volume, urlpath=str(file), mode="w", chunks=(1, 8, 24, 20), blocks=(1, 8, 24, 20))
    content = bytearray(file.read_bytes())
    tenth = len(content) // 10  # about a chunk, of which the two last ones of a channel are left whole
    content[tenth : 3 * tenth] = bytes(2 * tenth)
    file.write_bytes(content)
    assert volume_problem(file, 2) is None  # its last block is whole

    def read_all():
        batches = readers.read_batches(crops_of([file]), ConsecutiveBatches(0, 20, 1), processes, pin_memory=False)
        with readers.reader_failures(), closing(batches):
            list(batches)

    with pytest.raises(UserError, match=r"^\S*case_0.b2nd is damaged \(.*\): preprocess this case again.$"):
        read_all()
    file.unlink()
    with pytest.raises(UserError, match=r"^\S*case_0.b2nd is missing: preprocess this case again.$"):
        read_all()


SMALL_SHARED_MEMORY = """
mount -t tmpfs -o size=64k tmpfs /dev/shm
exec {python} -c "
import sys, torch
from pathlib import Path
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.pretraining.crops import ConsecutiveBatches, MaskDrawing, RandomCrops
from nnunet_vit_mae.pretraining.readers import read_batches, reader_failures
drawing = MaskDrawing(masking=Masking(mask_ratio=0.6), token=(4, 4, 4))
crops = RandomCrops([Path('{file}')], (40, 40, 40), drawing, 0)
with reader_failures():
    list(read_batches(crops, ConsecutiveBatches(0, 2, 1), 1, pin_memory=False))
"
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode != 0,
    reason="needs a file system of its own",
)
def test_shared_memory_that_runs_out_is_said(files):
    script = SMALL_SHARED_MEMORY.format(python=sys.executable, file=files[0])
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert "UserError: The shared memory /dev/shm is full: enlarge it (docker run --shm-size" in done.stderr


def test_all_of_a_batch_is_in_shared_memory_before_it_is_handed_over(make_job):
    job = make_job(**MOVED)
    crops = crops_of(job.files)
    crops.affines = job.affines
    batch = readers._Shared(crops)[range(2)]
    assert all(part.is_shared() for part in (*tensors(batch), batch.affines))


def test_shared_memory_is_measured_before_it_is_used():
    memory.refuse_without_shared_memory(0, 2**60)
    with pytest.raises(UserError, match=r"4 batches .* need .* of shared memory, .*--shm-size.*-np 0"):
        memory.refuse_without_shared_memory(4, 2**60)


@pytest.mark.parametrize(("lr", "word"), [(1e-6, "low"), (3e-4, None), (6e-3, "high")])
def test_an_unusual_learning_rate_is_warned_about(make_job, tmp_path, lr, word):
    loop.run(make_job(epochs=1, base_lr=lr * 256 / 2), tmp_path, device=CPU, resume=False)
    warnings = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "WARNING" in line]
    assert [f"is very {word}" in line for line in warnings] == ([True] if word else [])


def test_the_log_says_what_is_rebuilt_and_left_out(make_job, tmp_path):
    loop.run(make_job(epochs=1, **FASTEST), tmp_path, device=CPU, resume=False)
    log = (tmp_path / "log.txt").read_text()
    assert "attend to visible ones alone (CrossMAE); in a step it rebuilds 3 of 11 masked tokens" in log
    assert "tokens without content (standard deviation below 0.001) are left out" in log


@pytest.mark.parametrize("options", [{}, FASTEST, {"plain_share": 0.8}], ids=["plain", "fastest", "two losses"])
def test_a_run_that_was_killed_goes_on_to_the_digit(make_job, tmp_path, monkeypatch, saving_always, options):
    job = make_job(epochs=5, **options)
    unbroken = loop.run(job, tmp_path / "unbroken", device=CPU, resume=False)

    read = RandomCrops.__getitem__

    def killed(self, reads):
        if (3 * job.steps_per_epoch + 1) * job.protocol.reads in reads:  # in the middle of the fourth epoch
            raise KeyboardInterrupt
        return read(self, reads)

    with monkeypatch.context() as patch:
        patch.setattr(RandomCrops, "__getitem__", killed)
        with pytest.raises(KeyboardInterrupt):
            loop.run(job, tmp_path / "broken", device=CPU, resume=False)
    resumed = loop.run(job, tmp_path / "broken", device=CPU, resume=True)

    assert resumed.losses == unbroken.losses
    for name, tensor in unbroken.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    assert "continuing after epoch 3 of 5" in (tmp_path / "broken" / "log.txt").read_text()
    tables = [read_rows(tmp_path / name / "metrics.csv") for name in ("unbroken", "broken")]
    for column in ("epoch", "train_losses", "lrs"):
        assert [row[column] for row in tables[1]] == [row[column] for row in tables[0]]
    assert [int(row["epoch"]) for row in tables[1]] == [0, 1, 2, 3, 4]
    assert [float(row["train_losses"]) for row in tables[1]] == unbroken.losses


@pytest.mark.parametrize(
    "other",
    [{"epochs": 2}, {"decoder": "cross"}, {"rebuilt_share": 0.5}, {"skip_background": True}, {"plain_share": 0.5}],
)
def test_resuming_another_job_is_refused(make_job, tmp_path, saving_always, other):
    loop.run(make_job(epochs=1), tmp_path, device=CPU, resume=False)
    with pytest.raises(UserError, match=r"settings \(pretraining"):
        loop.run(make_job(**{"epochs": 1} | other), tmp_path, device=CPU, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["pretraining"]["epochs"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"losses": [0.5] * 3}, "has 3 epochs, but the run has only 2"),
        ({"losses": [math.nan]}, "has no list of losses"),
        ({"begun": torch.ones(4)}, "has no losses of the steps after the last epoch"),
        ({"begun": torch.tensor([math.inf])}, "has no losses of the steps after the last epoch"),
    ],
)
def test_a_state_that_cannot_be_of_this_run_is_refused(tmp_path, change, reason):
    """Two epochs of three steps."""
    network, file = torch.nn.Linear(2, 3), tmp_path / "state.pt"
    optimizer = torch.optim.AdamW(network.parameters())
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "losses": [0.5, 0.4]}
    state["begun"] = torch.ones(3)
    torch.save(state, file)
    assert read_state(file, network, optimizer, epochs=2, steps_per_epoch=3)["losses"] == [0.5, 0.4]
    torch.save(state | change, file)
    with pytest.raises(UserError, match=reason):
        read_state(file, network, optimizer, epochs=2, steps_per_epoch=3)


def test_norm_pix_takes_over_from_the_plain_loss(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PICTURES", 4)
    mixed, plain = (
        loop.run(make_job(epochs=4, **own), tmp_path / name, device=CPU, resume=False).losses
        for name, own in {"mixed": {"plain_share": 0.5}, "plain": {"norm_pix": False}}.items()
    )
    assert mixed[:2] == plain[:2]
    assert mixed[2] != pytest.approx(plain[2], rel=0.2)
    log = (tmp_path / "mixed" / "log.txt").read_text()
    assert "from epoch 3 on: mean squared error on masked tokens, normalised per token (norm-pix)" in log
    kinds = re.findall(r"epoch \d: loss [\d.]+( \(norm-pix\))?,", log)
    assert kinds == ["", "", " (norm-pix)", " (norm-pix)"]


def test_resuming_where_nothing_was_saved_starts_anew(make_job, tmp_path):
    assert len(loop.run(make_job(epochs=1), tmp_path, device=CPU, resume=True).losses) == 1


@pytest.mark.parametrize("look_every", [1, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_voxels_stop_the_run_with_their_case_and_keep_the_last_good_state(
    make_job, tmp_path, files, monkeypatch, saving_always, value, look_every
):
    monkeypatch.setattr(loop, "LOOK_EVERY_STEPS", look_every)
    job, out = make_job(epochs=4), tmp_path / "out"  # three steps of two crops an epoch
    own = RandomCrops(files, PATCH, DRAWING, job.protocol.seed)
    bad = 9  # a read of the fifth step
    read = RandomCrops.__getitem__

    def spoiled(self, reads):
        batch = read(self, reads)
        if bad in reads:
            batch.crops[reads.index(bad), 0, 3, 4, 5] = value
        return batch

    monkeypatch.setattr(RandomCrops, "__getitem__", spoiled)
    step, late = 2, own.file_of(bad)
    with pytest.raises(UserError, match=f"The loss is (nan|inf) in step {step} of epoch 2") as caught:
        loop.run(job, out, device=CPU, resume=False)
    pair = {own.file_of(8).stem, late.stem}
    assert set(re.findall(r"case_\d", str(caught.value).split(";")[0])) == pair
    assert f"voxels of {late.stem} are NaN or infinite" in str(caught.value)
    state = torch.load(out / "state.pt", weights_only=True)
    assert len(state["losses"]) == 1
    assert all(tensor.isfinite().all() for tensor in state["network"].values())

    monkeypatch.setattr(RandomCrops, "__getitem__", read)
    resumed = loop.run(job, out, device=CPU, resume=True)
    assert resumed.losses == loop.run(job, tmp_path / "unbroken", device=CPU, resume=False).losses


def test_a_gradient_that_is_not_finite_stops_the_run_though_the_loss_is(make_job, tmp_path, monkeypatch):
    loss = reconstruction_loss
    monkeypatch.setattr(step, "reconstruction_loss", lambda *args, **kwargs: Sharp.apply(loss(*args, **kwargs)))
    with pytest.raises(UserError, match=r"The gradient norm is (nan|inf) in step 1 of epoch 1.* lower --lr"):
        loop.run(make_job(epochs=1), tmp_path / "out", device=CPU, resume=False)
    assert not (tmp_path / "out" / "state.pt").exists()


def test_a_loss_that_explodes_stops_the_run(make_job, tmp_path, monkeypatch, saving_always):
    loss, count = reconstruction_loss, itertools.count()
    factors = [1.0] * 7 + [1e4] + [1e3] * 100
    monkeypatch.setattr(step, "reconstruction_loss", lambda *args, **kw: factors[next(count)] * loss(*args, **kw))
    expected = r"The loss of an epoch was \S+ and has grown to \S+, most of all in step 2 of epoch 3, .* case_\d"
    with pytest.raises(UserError, match=expected):
        loop.run(make_job(epochs=4), tmp_path / "out", device=CPU, resume=False)
    assert len(torch.load(tmp_path / "out" / "state.pt", weights_only=True)["losses"]) == 2


def test_the_log_has_the_gradient_norm(make_job, tmp_path):
    loop.run(make_job(epochs=2), tmp_path / "out", device=CPU, resume=False)
    norms = re.findall(r"gradient norm (\S+), at most (\S+)", (tmp_path / "out" / "log.txt").read_text())
    assert len(norms) == 2
    assert all(0 < float(mean) <= float(most) for mean, most in norms)
    rows = read_rows(tmp_path / "out" / "metrics.csv")
    assert [(f"{float(r['gradient_norms']):.3g}", f"{float(r['gradient_norms_max']):.3g}") for r in rows] == norms


def test_the_optimiser_is_that_of_masked_autoencoders(make_job, tmp_path, monkeypatch):
    """Betas of He et al. 2022, and a rate that warms up and falls step by step: here two epochs of three steps."""
    monkeypatch.setattr(loop.RunReport, "draw", lambda *_: None)
    job = make_job(epochs=2, warmup=0.5)
    loop.run(job, tmp_path, device=CPU, resume=False)
    groups = torch.load(tmp_path / "state.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["betas"] for group in groups} == {(0.9, 0.95)}
    assert {group["weight_decay"] for group in groups} == {0.0, job.protocol.weight_decay}
    rates = [float(row["lrs"]) for row in read_rows(tmp_path / "metrics.csv")]
    assert rates == pytest.approx([job.protocol.lr * warmup_cosine(done / 7, 0.5) for done in (3, 6)])
    assert [group["lr"] for group in groups] == pytest.approx([rates[-1]] * len(groups))


def test_a_step_clips_gradients_to_the_norm_of_the_protocol(make_job):
    job = make_job(gradient_clip=0.01)
    network = step.PretrainingLoss(build_autoencoder(NETWORK, 2, job.protocol))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    _, norm = loop._step(job, 0, network, optimizer, job.crops()[[0]].samples(CPU))
    left = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()
    assert norm > 0.1
    assert left.item() == pytest.approx(0.01, rel=1e-3)


def test_trackers_get_the_numbers_and_the_pictures(make_job, tmp_path):
    told = []

    class Recorder:
        def log(self, epoch, metrics):
            told.append((epoch, metrics["train_losses"]))

        def show(self, epoch, name, picture):
            told.append((epoch, name, picture.is_file()))

        def close(self):
            told.append("closed")

    result = loop.run(make_job(epochs=2), tmp_path, device=CPU, resume=False, more_trackers=lambda *_: [Recorder()])
    assert told == [*enumerate(result.losses), (1, "reconstructions", True), "closed"]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_picture_shows_nothing_of_what_was_hidden(norm_pix):
    network = build_autoencoder(NETWORK, 2, Pretraining(mask_ratio=0.6))
    sample = Samples(torch.randn(1, 2, *PATCH), MASKING.draw(torch.rand(1, 18)), [[0, 1]])
    views = rebuild(network, MASKING, sample, norm_pix=norm_pix)
    assert {view.shape for view in views} == {(2, *PATCH)}
    hidden = np.isnan(views.masked)
    assert np.array_equal(views.rebuilt[~hidden], views.original[~hidden])

    other = 100 * torch.randn_like(sample.volume) + 50
    changed = torch.where(torch.from_numpy(hidden)[None], other, sample.volume)
    again = rebuild(network, MASKING, sample._replace(volume=changed), norm_pix=norm_pix)
    assert np.array_equal(again.rebuilt, views.rebuilt)
    assert not np.array_equal(again.original, views.original)


def test_interpolation_stays_within_what_is_known():
    values = torch.rand(1, 60, 2, 1)
    visible = torch.tensor([[0, 7, 31, 59]])
    filled = interpolated(values, visible, (3, 4, 5))
    known = values[0, visible[0]]
    assert filled.shape == values.shape
    for channel in range(2):
        assert known[:, channel].min() <= filled[..., channel, :].min()
        assert filled[..., channel, :].max() <= known[:, channel].max() + 1e-6


def test_a_full_disk_ends_a_run_and_the_state_before_goes_on(make_job, tmp_path, saving_always, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 600, 20_000):  # stops at the settings, at the log, and at the state
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                loop.run(make_job(), tmp_path / "out", device=CPU, resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Logging error" not in capsys.readouterr().err
    assert len(loop.run(make_job(), tmp_path / "out", device=CPU, resume=True).losses) == 4
