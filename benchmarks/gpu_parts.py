"""The parts of `gpu.py`: what each of them measures, and how long it may take."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import contrasts
import pretraining_decoder
import torch
from loader import SHAPE, SYNTHETIC, make_dataset, our_batches, trainer_of
from measuring import finish, flops, kernels, seconds_each

from nnunet_vit_mae.networks.memory import pretraining_memory
from nnunet_vit_mae.networks.packing import has_kernel
from nnunet_vit_mae.presets import DECODERS
from nnunet_vit_mae.pretraining.loss import COMPILER
from nnunet_vit_mae.settings import Network, Pretraining
from nnunet_vit_mae.units import GIB

if TYPE_CHECKING:
    from nnunet_vit_mae.nnunet.plans import Plan

Cells = dict[str, Any]
Step = Callable[[], object]
SCENES = [("S", 96, 8), ("S", 96, 16), ("B", 96, 16), ("S", 64, 4), ("S", 48, 4)]  # size, side of the patch, token
COMPILERS: dict[str, dict[str, Any]] = {"compiled": {}, "compiled, CUDA graphs": COMPILER}  # the last one as in runs
MOST, USUAL = 1024, 16  # batches: the largest one that is tried, and the default of pre-training
OPTIONS_BATCH, PEERS_BATCH, FINETUNING_BATCH = 64, 16, 4
PATCH = 96  # of fine-tuning and of the reader on volumes that are made for this
CEILING = "ceilings"
ON_DEVICE = "--cache, on the device"
SECONDS = 2.0  # for which a step is repeated
COMPILING_SECONDS = 150  # that a part with a compiler may take: 70 were not enough on a machine with 16 cores


@dataclass(frozen=True)
class Bench:
    """Where parts are measured, and at which scale."""

    device: torch.device
    smoke: bool
    folder: Path  # for a dataset that is made
    dataset: str | None = None
    plans: str = "nnUNetPlans"
    configuration: str = "3d_fullres"
    done: Mapping[str, Any] = field(default_factory=dict)
    _made: list[Any] = field(default_factory=list)

    def knowing(self, done: Mapping[str, Any]) -> Bench:
        """Return the same with the rows of the parts that are done."""
        return dataclasses.replace(self, done=done)

    def timed(self, step: Step) -> float:
        """Return the seconds of a step."""
        return seconds_each(step, 0, warm_up=0) if self.smoke else seconds_each(step, SECONDS)

    @property
    def flops_per_second(self) -> float | None:
        """Return the rate of a matrix product, if it was measured."""
        row = self.done.get(CEILING)
        return row["cells"]["matrix product, TFLOP/s"] * 1e12 if row else None

    def scaled(self, size: str, side: int, token: int) -> tuple[str, int, int]:
        """Return a scene, or a tiny one."""
        return ("XS", 24, 8) if self.smoke else (size, side, token)

    def batch(self, batch: int) -> int:
        """Return a batch, or a tiny one."""
        return 2 if self.smoke else batch

    @property
    def plan(self) -> Plan:
        """Return the plans of the dataset, which is made when the first part asks for it."""
        from nnunet_vit_mae.nnunet.folders import find_dataset
        from nnunet_vit_mae.nnunet.plans import load_plan

        if self.dataset is None and not self._made:
            volumes, shape = (2, (24, 28, 32)) if self.smoke else (8, SHAPE)
            make_dataset(self.folder, volumes, processes=min(volumes, os.cpu_count() or 1), shape=shape)
            self._made.append(SYNTHETIC)
        return load_plan(find_dataset(self.dataset or SYNTHETIC), self.plans, self.configuration)

    @property
    def patch(self) -> tuple[int, ...]:
        """Return the crops of fine-tuning and of the reader."""
        return tuple(self.plan.patch_size) if self.smoke or self.dataset else (PATCH,) * 3


@dataclass(frozen=True)
class Part:
    """A row of a table."""

    name: str
    table: str
    seconds: float  # that it may take on a GPU
    measure: Callable[[Bench], Cells]
    needs: str | None = None  # a package

    def missing(self) -> bool:
        """Return whether the package that it needs is not installed."""
        return self.needs is not None and find_spec(self.needs) is None


def ceilings(bench: Bench) -> Cells:
    """Copy memory, and multiply matrices in bf16."""
    side, numbers = (64, 2**16) if bench.smoke else (8192, 2**30)
    source = torch.randn(numbers, device=bench.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    copied = 2 * source.nbytes / bench.timed(lambda: target.copy_(source))
    multiplied = 2 * side**3 / bench.timed(lambda: a @ b)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "copy, GB/s read and written": copied / 1e9,
        "matrix product, TFLOP/s": multiplied / 1e12,
    }


def pretraining(bench: Bench, scene: tuple[str, int, int], run: str, *, usual: bool) -> Cells:
    """Measure a step of pre-training at the usual batch, or at the largest that fits."""
    size, side, token = bench.scaled(*scene)
    compiler = COMPILERS.get(run)
    if bench.smoke and compiler is not None:
        compiler = {"backend": "eager"}  # traced, but not compiled
    of_batch = partial(pretraining_decoder.step_of, {}, size, side, token, device=bench.device, compiler=compiler)
    network = Network(size=size, token=(token,) * 3)
    estimate = partial(pretraining_memory, network, Pretraining(), (side,) * 3, 1, on_gpu=bench.device.type == "cuda")
    if usual:
        batch = bench.batch(USUAL)
        step = of_batch(batch)
    else:
        batch, step = largest(of_batch, estimate, bench)
    work = batch * flops(partial(pretraining_decoder.step_of, {}, size, side, token, 1))
    return {
        "network": f"{size} {side}^3, token {token}",
        "run": run,
        "batch": batch,
        **of_step(bench, step, batch, work),
        "estimated, GiB": estimate(batch) / GIB,
    }


def largest(of_batch: Callable[[int], Step], estimate: Callable[[int], int], bench: Bench) -> tuple[int, Step]:
    """Return the largest power of two that fits as a batch, and its step.

    Where to begin, the estimate says; whether it fits, the GPU.
    """
    if bench.device.type != "cuda":
        return bench.batch(2), of_batch(bench.batch(2))
    free, (one, two) = torch.cuda.mem_get_info()[0], map(estimate, (1, 2))
    batch = MOST
    while batch > 1 and one + (batch - 1) * (two - one) > free:
        batch //= 2
    while True:
        try:
            step = of_batch(batch)
            step()
            finish()
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            step = None
        if step is not None:
            return batch, step
        torch.cuda.empty_cache()  # not above: the error holds what the step has allocated
        batch //= 2


def of_step(bench: Bench, step: Step, volumes: int, work: int | None = None) -> Cells:
    """Measure a step of so many volumes, whose operations are known or not."""
    seconds = bench.timed(step)
    on_gpu, ceiling = bench.device.type == "cuda", bench.flops_per_second
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        finish()
    count, busy = kernels(step) if on_gpu else (None, None)
    return {
        "ms per step": 1e3 * seconds,
        "volumes/s": volumes / seconds,
        **({} if work is None else {"share of the matrix product": work / seconds / ceiling if ceiling else None}),
        "kernels per step": count,
        "GPU busy": busy,
        "peak, GiB": torch.cuda.max_memory_allocated() / GIB if on_gpu else None,
    }


def decoder_option(bench: Bench, name: str) -> Cells:
    """Measure a step of pre-training with an option of the decoder."""
    size, side, token = bench.scaled("S", 96, 8)
    batch, options = bench.batch(OPTIONS_BATCH), pretraining_decoder.OPTIONS[name]
    step = pretraining_decoder.step_of(options, size, side, token, batch, device=bench.device)
    return {"decoder": name, "batch": batch, **of_step(bench, step, batch)}


def different_contrasts(bench: Bench, run: str) -> Cells:
    """Measure a step of studies with different contrasts, packed or in groups; without a kernel, packed is slow."""
    size, side, token = bench.scaled("S", 96, 16)
    batch, mixture = bench.batch(USUAL), "1 to 7, alike"
    step = contrasts.step_of(run, contrasts.MIXTURES[mixture], size, side, token, batch, bench.device)
    kernel = bench.device.type == "cuda" and has_kernel()
    measured = of_step(bench, step, batch)
    return {"contrasts per study": mixture, "studies": run, "kernel": kernel, "batch": batch, **measured}


def peer(bench: Bench, name: str, scene: tuple[str, int, int]) -> Cells:
    """Measure a step of pre-training as another package takes it, or ours on the same data."""
    from pretraining_step import Case, step_of

    size, side, token = bench.scaled(*scene)
    batch = bench.batch(PEERS_BATCH)
    step = step_of(name, Case(side, token, batch), size, bench.device)
    return {
        "network": f"{size} {side}^3, token {token}",
        "package": name,
        "batch": batch,
        **of_step(bench, step, batch),
    }


def finetuning(bench: Bench, network: str, augmentation: str) -> Cells:
    """Measure steps of a trainer, with the loader that feeds it."""
    plan = bench.plan  # before nnU-Net is imported, for making volumes sets its folders
    from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline, nnUNetTrainerViTScratch

    batch = bench.batch(FINETUNING_BATCH)
    size, _, token = bench.scaled("S", PATCH, 8)
    settings = {
        "network": {"size": size, "token": [token] * 3, "decoder": network},
        "finetuning": {"batch_size": batch, "augmentation": augmentation},
    }
    kind = nnUNetTrainerViTScratch if network in DECODERS else nnUNetTrainerBaseline
    changes = {"patch_size": list(bench.patch), "batch_size": batch}
    if network in DECODERS:
        changes["vit_mae"] = settings
    trainer = trainer_of(kind, plan, changes, bench.device)
    with batches_of(trainer) as batches:
        step = lambda: trainer.train_step(next(batches))  # noqa: E731
        measured = of_step(bench, step, batch)
    return {"network": network, "augmentation": augmentation, "batch": batch, **measured}


@contextlib.contextmanager
def batches_of(trainer: Any) -> Iterator[Any]:
    """Begin an epoch of a trainer, and end the processes that load its batches afterwards."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.initialize()
        loaders = trainer.get_dataloaders()
        trainer.on_train_epoch_start()
    try:
        yield loaders[0]
    finally:
        for loader in loaders:
            if hasattr(loader, "_finish"):  # it has processes
                loader._finish()


def prediction(bench: Bench, name: str) -> Cells:
    """Measure nnU-Net's predictor on a volume."""
    plan = bench.plan  # before nnU-Net is imported, as above
    from prediction import prediction as predicted

    predict = predicted(plan, 1 if bench.smoke else 2, bench.device, name)
    measured = of_step(bench, predict, 1)
    return {"network": name, "patch": " x ".join(map(str, plan.patch_size)), **measured}


def reader(bench: Bench, place: str) -> Cells:
    """Measure how many crops all cores of this machine read, or the device cuts from volumes that it holds."""
    from nnunet_vit_mae.pretraining.volumes import Cache, DeviceCache

    images = sorted(file for file in bench.plan.preprocessed_folder.glob("*.b2nd") if not file.stem.endswith("_seg"))
    readers = 1 if bench.smoke else os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        cache: Any = None
        if place == ON_DEVICE:
            cache, readers = DeviceCache(images, bench.device), 0
        elif place == "--cache":
            cache = stack.enter_context(Cache(images, limit=2**34))
        batches = stack.enter_context(
            contextlib.closing(
                our_batches(bench.plan, images, bench.patch, cache, readers=readers, batch=bench.batch(USUAL))
            )
        )
        for _ in range(max(1, readers)):  # which start one after another
            next(batches)
        started, crops = time.perf_counter(), 0
        while not crops or time.perf_counter() < started + SECONDS * (not bench.smoke):
            crops += next(batches)
        finish()
        taken = time.perf_counter() - started
    crop = " x ".join(map(str, bench.patch))
    return {"crops from": place, "crop": crop, "readers": readers, "crops/s": crops / taken}


def _pretraining_parts(scenes: Sequence[tuple[str, int, int]]) -> Iterator[Part]:
    table = "Pre-training"
    for scene in scenes:
        label = "{} {}/{}".format(*scene)
        for usual in (False, True):
            run = partial(pretraining, scene=scene, run="eager", usual=usual)
            yield Part(f"pretraining {label}, eager, {'usual' if usual else 'largest'} batch", table, 20, run)
    for scene in scenes:
        label = "{} {}/{}".format(*scene)
        run = partial(pretraining, scene=scene, run="compiled", usual=False)
        yield Part(f"pretraining {label}, compiled, largest batch", table, COMPILING_SECONDS, run)
    for scene in scenes[:2]:
        label = "{} {}/{}".format(*scene)
        run = partial(pretraining, scene=scene, run="compiled, CUDA graphs", usual=True)
        yield Part(f"pretraining {label}, CUDA graphs, usual batch", table, COMPILING_SECONDS, run)


def parts(*, smoke: bool) -> Iterator[Part]:
    """Yield all parts, the quick ones first; where sizes are tiny, the scenes do not differ, so there is one."""
    scenes = SCENES[:1] if smoke else SCENES
    yield Part(CEILING, "Ceilings", 15, ceilings)
    pretrained = list(_pretraining_parts(scenes))
    yield from (part for part in pretrained if "eager" in part.name)
    for name in pretraining_decoder.OPTIONS:
        yield Part(f"decoder {name}", "Options of the pre-training decoder", 10, partial(decoder_option, name=name))
    for run in ("groups", "packed"):
        part = partial(different_contrasts, run=run)
        yield Part(f"contrasts {run}", "Studies with different contrasts", 15, part)
    for scene in scenes[:2]:
        for name, package in {"ours": None, "MONAI": "monai", "nnssl": "nnssl"}.items():
            part = partial(peer, name=name, scene=scene)
            yield Part("peer {} {} {}/{}".format(name, *scene), "Beside other packages", 15, part, package)
    for place in ("files", "--cache", ON_DEVICE):
        yield Part(f"reader {place}", "The reader", 60, partial(reader, place=place))
    for network in ("U-Net", *DECODERS):
        for augmentation in ("loader", "device") if network in DECODERS else ("loader",):
            part = partial(finetuning, network=network, augmentation=augmentation)
            yield Part(f"finetuning {network}, {augmentation}", "Fine-tuning", 25, part)
    for name in ("ViT", "U-Net"):
        yield Part(f"prediction {name}", "Prediction", 25, partial(prediction, name=name))
    yield from (part for part in pretrained if "eager" not in part.name)  # compiling takes most of their time
