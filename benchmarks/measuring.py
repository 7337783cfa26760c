"""Time, memory and work of steps; on a machine that others use too, figures are ratios of what was measured in turn."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nnunet_vit_mae.networks.positions import forget_positions

WITHOUT_KERNEL = {"_unsafe_view", "alias", "detach", "empty", "empty_like", "empty_strided", "new_empty"}
OF_TWO = {"constant_pad_nd": 2, "slice_backward": 2, "select_backward": 2}  # they fill, and copy
WARM_UP = 3  # steps: the first ones allocate, choose kernels, and compile
Name = TypeVar("Name", bound=Hashable)


def training_step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a step (forward, loss, backward, clipping, AdamW), ready to be repeated."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def taken_in_turn(steps: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, list[float]]:
    """Return the seconds of each step, round after round (all steps in each round), after a round that does not count.

    Without a GPU it is CPU time, which other work on the machine moves little.
    """
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken: dict[Name, list[float]] = {name: [] for name in steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of peers, about their own code
        for number in range(rounds + 1):
            for name, step in steps.items():
                started = clock()
                step()
                finish()
                if number:
                    taken[name].append(clock() - started)
    return taken


def seconds_each(step: Callable[[], object], seconds: float, *, warm_up: int = WARM_UP) -> float:
    """Return the mean seconds of a step that is repeated for so long, and of what it starts on a GPU."""
    for _ in range(warm_up):
        step()
    finish()
    started, count = time.perf_counter(), 0
    while not count or time.perf_counter() < started + seconds:
        step()
        finish()
        count += 1
    return (time.perf_counter() - started) / count


def finish() -> None:
    """Wait for what a GPU was given, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def kernels(step: Callable[[], object]) -> tuple[int, float]:
    """Return how many kernels and copies a step runs on a GPU, and in which share of its time any of them does."""
    step()
    finish()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        step()
        finish()
        taken = time.perf_counter() - started
    ran = [event.time_range.elapsed_us() for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return len(ran), sum(ran) / 1e6 / taken


def operations(step: Callable[[], object]) -> Counter[str]:
    """Count the operations of torch that a step starts, by name, without views and without memory that is not filled.

    It needs no GPU, where nearly all of them are a kernel, and some are two or more: those of lists of tensors, the
    backward pass of attention and of norms.
    """
    with _Operations() as counted:
        step()
    return counted.counts


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in WITHOUT_KERNEL:
            self.counts[name] += OF_TWO.get(name, 1)
        return func(*args, **(kwargs or {}))


def flops(prepare: Callable[[], Callable[[], object]]) -> int:
    """Count the operations of a step, two per multiplication and addition, without taking it.

    Attention counts as if its scores were stored: kernels that compute them twice do more work for the same result.
    """
    forget_positions()  # cached tables are real tensors, and those made here are not
    try:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            prepare()()
        return counter.get_total_flops()
    finally:
        forget_positions()


def printed_apart(script: str, *arguments: str) -> str:
    """Return what a script prints in a fresh process, whose memory holds nothing else."""
    # without these, glibc keeps freed blocks and the process looks larger than its tensors
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def peak_memory(prepare: Callable[[], Callable[[], object]], times: int = 2) -> int:
    """Return the peak bytes of the last of several steps above those before it was prepared.

    For a process that has done nothing else. Pages of files are left out: the code of libraries, which the first step
    brings into memory in pieces whose size is the kernel's choice.
    """
    image, kernel = torch.randn(1, 1, 8, 8, 8), torch.randn(2, 1, 3, 3, 3)
    torch.nn.functional.conv3d(image, kernel)  # libraries allocate on first use
    before = resident("RssAnon")
    step = prepare()
    for _ in range(times - 1):
        step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    step()
    return resident("VmHWM") - resident("RssFile") - before


def resident(entry: str) -> int:
    """Return the bytes in memory: at the peak (`VmHWM`), or now without files (`RssAnon`) and of files (`RssFile`).

    `getrusage` would count the peak of the parent before the fork.
    """
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[entry].split()[0]) * 1024


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the exponent of the power law through the last two points: 1 is linear, 2 is quadratic growth."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
