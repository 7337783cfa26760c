"""Numbers from the host on the device that computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def on_device(numbers: Sequence[int], device: torch.device) -> Int[Tensor, " _"]:
    """Return a tensor on a device without waiting for its work, as `torch.tensor` would there.

    Apple's GPUs are waited for: they may read the numbers after their memory has been given back
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return torch.tensor(numbers).to(device, non_blocking=device.type == "cuda")
