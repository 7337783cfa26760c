"""Numbers from the host on the device that computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device) -> Int[Tensor, " _"]:
    """Return a tensor on a device without waiting for its work, as `torch.tensor` would there."""
    return copied(torch.tensor(numbers), device)


def copied(
    values: Shaped[Tensor, "*shape"], device: torch.device, dtype: torch.dtype | None = None
) -> Shaped[Tensor, "*shape"]:
    """Return values of the host on a device without waiting for its work; those that are there already, as they are.

    Apple's GPUs are waited for: they may read the numbers after their memory has been given back
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return values.to(device, values.dtype if dtype is None else dtype, non_blocking=device.type == "cuda")
