"""The memory of this machine, as far as this process may use it."""

from __future__ import annotations

import os
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it; other systems have no limit of their own
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container


def memory_size() -> int:
    """Return the bytes of memory of the machine, or the limit of its container; 0 if unknown."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    for file in LIMITS:
        if file.is_file() and (text := file.read_text(encoding="ascii").strip()).isdigit():
            sizes.append(int(text))
    return min(sizes, default=0)
