"""Whether a training step fits into a device at all: asked before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.processes.memory import memory_size
from nnunet_vit_mae.units import GIB, size_text

LARGEST_DEVICE = 1024 * GIB  # several times what the largest GPU has
STEP_PER_CROP = 1000  # a step takes far less than this many times its crops, so that small ones need no rehearsal
VOXEL_BYTES = 4  # in fp32


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory that a device has: those of a GPU, or of this machine or container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_size() or LARGEST_DEVICE  # Windows tells in another way; its own error comes later


def free_memory_of(gpu: torch.device) -> int:
    """Return the bytes of a GPU's memory that nobody uses."""
    return torch.cuda.mem_get_info(gpu)[0]


def refuse_step_beyond(
    available: int,
    where: str,
    *,
    shape: Sequence[int],
    estimate: Callable[[], int],
    advice: str,
) -> None:
    """Raise `UserError` when a training step needs more than the `available` bytes.

    Args:
        available: Bytes.
        where: What has them, for the message.
        shape: Of the crops of a step (b c z y x).
        estimate: Rehearses the step, and gives the bytes that it needs; called only where it may matter.
        advice: What to do.
    """
    crops = math.prod(shape) * VOXEL_BYTES
    if crops * STEP_PER_CROP <= available:
        return
    needed = crops if crops > available else estimate()
    if needed > available:
        batch, _, *patch = shape
        sides = " x ".join(map(str, patch))
        raise UserError(
            f"A step with a batch of {batch} and a patch of {sides} voxels needs about {size_text(needed)}, but "
            f"{where} has {size_text(available)}: {advice}."
        )
