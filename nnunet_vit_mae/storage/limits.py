"""How many voxels an image may have: small files can hold huge images, which take all memory when they are read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nnunet_vit_mae.errors import UserError

VARIABLE = "MAE3D_MAX_VOXELS"
MAX_VOXELS = 200_000_000  # a CT of 512 x 512 x 760 voxels


def too_many_voxels(shape: Sequence[int]) -> str | None:
    """Return in words that an image is larger than allowed, or None; asked with what its header says, before reading.

    Args:
        shape: Voxels along each spatial axis, in any order.

    Raises:
        UserError: If the environment variable is not a number.

    Example:
        >>> too_many_voxels((600, 600, 600))
        'has 600 x 600 x 600 voxels, more than the 200,000,000 that an image may have (MAE3D_MAX_VOXELS raises this)'
        >>> too_many_voxels((512, 512, 700))
    """
    limit = max_voxels()
    if math.prod(map(int, shape)) <= limit:
        return None
    sides = " x ".join(map(str, shape))
    return f"has {sides} voxels, more than the {limit:,} that an image may have ({VARIABLE} raises this)"


def max_voxels() -> int:
    """Return the limit; raises `UserError` if the environment variable is not a positive whole number."""
    value = os.environ.get(VARIABLE, str(MAX_VOXELS))
    if not value.isdecimal() or not int(value):
        raise UserError(f"The environment variable {VARIABLE} is {value!r}: give a positive whole number of voxels.")
    return int(value)


@contextmanager
def at_most_more(size: int) -> Iterator[None]:
    """Let this process take at most `size` bytes more than it has, where the system can limit that.

    A library then fails in the block, for lack of memory, instead of filling the memory with what a damaged length asks
    for. Linux has such a limit.
    """
    status = Path("/proc/self/statm")
    if not status.is_file():
        yield
        return
    import resource  # which Windows lacks

    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(status.read_text().split()[0]) * resource.getpagesize() + size
    limits = [limit, *(one for one in before if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
