"""The memory of this machine, as far as this process may use it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.units import size_text

SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; other systems have no limit of their own
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
NO_ROOM = "enlarge it (docker run --shm-size, for instance), or read without other processes"


def memory_size() -> int:
    """Return the bytes of memory of the machine, or the limit of its container; 0 if unknown."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for file in LIMITS:
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
            sizes.append(int(text))
    return min(sizes, default=0)


def shared_memory(folder: Path = SHARED_MEMORY) -> tuple[float, float]:
    """Return the bytes of shared memory, and how many are free; infinite where it has no limit of its own."""
    if not folder.is_dir():
        return math.inf, math.inf
    total, _, free = shutil.disk_usage(folder)
    return total, free


def refuse_without_shared_memory(batches: int, batch_bytes: int, without: str = "-np 0") -> None:
    """Raise `UserError` if the batches that readers have ready do not fit into shared memory.

    `without` is the setting that reads without other processes.
    """
    needed, (_, free) = batches * batch_bytes, shared_memory()
    if needed > free:
        raise UserError(
            f"The {batches} batches that readers have ready need {size_text(needed)} of shared memory, but "
            f"{SHARED_MEMORY} has {size_text(free)} free: {NO_ROOM} ({without})."
        )
