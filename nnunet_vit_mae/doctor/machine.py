"""The graphics card, processors, memory and disks of this machine."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import joblib

from nnunet_vit_mae.doctor.diagnosis import ERROR, OK, WARNING, Diagnosis
from nnunet_vit_mae.errors import first_line
from nnunet_vit_mae.processes.memory import SHARED_MEMORY, memory_size, shared_memory
from nnunet_vit_mae.units import size_text

VISIBLE = "CUDA_VISIBLE_DEVICES"
LONGEST_ANSWER = 30  # seconds for nvidia-smi
LEAST_SHARED_MEMORY = 1e9  # for the batches that readers have ready
LEAST_DISK = 20e9  # preprocessed images are several times as large as compressed ones
WORKER_MEMORY = 2e9  # of one process of nnU-Net's augmentation or preprocessing, roughly
DEFAULT_WORKERS = {"nnUNet_n_proc_DA": 12, "nnUNet_def_n_proc": 8}  # of nnU-Net
PURPOSES = {"nnUNet_n_proc_DA": "augmentation", "nnUNet_def_n_proc": "preprocessing and validation"}


def diagnose_gpu(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Yield each GPU with what it can do, or why torch finds none."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            bf16 = "bf16" if card.major >= 8 else "no bf16: training runs in fp32"
            text = f"{card.name}, {size_text(card.total_memory)}, {bf16}."
            if problem := _problem_of_gpu(number):
                advice = (
                    f"End other programs on it, or install a torch for generation {card.major}.{card.minor} of cards."
                )
                yield Diagnosis("gpu", ERROR, f"{text} This torch cannot compute on it ({problem}).", advice)
            else:
                yield Diagnosis("gpu", OK, text)
        return
    visible = environment.get(VISIBLE)
    card_is_there = _has_card()
    if card_is_there and visible in ("", "-1"):
        text = f"There is a GPU, but {VISIBLE} is {visible!r} and hides it."
        yield Diagnosis("gpu", WARNING, text, f"To use it: unset {VISIBLE}")
    elif card_is_there and torch.version.cuda is None:
        text = "There is a GPU, but this torch was built without CUDA."
        yield Diagnosis("gpu", ERROR, text, "Install torch and torchvision as pytorch.org says for this system.")
    elif card_is_there:
        text = f"There is a GPU, but torch {torch.__version__} cannot use it."
        advice = f"Update the driver to one for CUDA {torch.version.cuda}"
        choice = "" if visible is None else f", or correct {VISIBLE}, which is {visible!r}"
        yield Diagnosis("gpu", ERROR, text, f"{advice}{choice}.")
    else:
        advice = "Add -device cpu to the commands; networks of the papers' sizes need a GPU."
        yield Diagnosis("gpu", WARNING, "torch finds no GPU.", advice)


def _has_card(devices: Path = Path("/dev")) -> bool:
    """Return whether there is an NVIDIA card; the login nodes of clusters have the driver's programs without one."""
    if any(devices.glob("nvidia[0-9]*")):
        return True
    if (program := shutil.which("nvidia-smi")) is None:
        return False
    try:  # it alone knows of a card under WSL
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, check=False, timeout=LONGEST_ANSWER)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def _problem_of_gpu(number: int) -> str | None:
    """Return why nothing can be computed on a GPU, or None: torch also counts GPUs that it was not built for."""
    import torch

    try:
        torch.ones(1, device=f"cuda:{number}").add(1).item()
    except RuntimeError as error:
        return first_line(error)
    return None


def diagnose_workers(environment: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Yield how many processes this machine can feed, and whether nnU-Net would start more."""
    cores, memory = joblib.cpu_count(), memory_size()
    fits = max(1, min(cores, int(memory / WORKER_MEMORY)))
    text = f"{cores} cores and {size_text(memory)} of memory: enough for about {fits} worker processes."
    yield Diagnosis("workers", OK, text)
    most = {"nnUNet_n_proc_DA": os.cpu_count() or 1}  # nnU-Net limits one of them itself
    for variable, default in DEFAULT_WORKERS.items():
        value, advice = environment.get(variable, str(default)), f"export {variable}={fits}"
        if not value.isdecimal():
            yield Diagnosis("workers", ERROR, f"{variable} is {value!r}, not a number.", advice)
        elif (started := min(int(value), most.get(variable, int(value)))) > fits:
            text = f"nnU-Net's {PURPOSES[variable]} would start {started} processes."
            yield Diagnosis("workers", WARNING, text, advice)


def diagnose_shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Diagnosis]:
    """Yield the size of shared memory, through which readers and nnU-Net's workers pass their batches."""
    _, free = shared_memory(folder)
    if free == math.inf:
        return
    text = f"{size_text(free)} of shared memory is free."
    if free >= LEAST_SHARED_MEMORY:
        yield Diagnosis("shared memory", OK, text)
    else:
        advice = "Start the container with --shm-size 8g (or --ipc host), or read without workers: -np 0."
        yield Diagnosis("shared memory", WARNING, text, advice)


def diagnose_disk(name: str, folder: Path) -> Diagnosis:
    """Return the free space of a folder."""
    free = shutil.disk_usage(folder).free
    text = f"{size_text(free)} is free in {name}."
    if free >= LEAST_DISK:
        return Diagnosis("disk", OK, text)
    return Diagnosis("disk", WARNING, text, f"Make room on the disk of {folder}, or move {name} to a larger one.")
