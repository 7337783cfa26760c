"""bf16 where a GPU has it, fp32 everywhere else; never fp16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which our networks run; it overrides any autocast around it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bf16(device))


def in_fp32(outputs: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Return what a network has put out, of one resolution or several, in fp32, as losses and nnU-Net want it."""
    return [part.float() for part in outputs] if isinstance(outputs, list) else outputs.float()


def has_bf16(device: torch.device) -> bool:
    """Return whether our networks run in bf16 on a device: GPUs before the Ampere generation only emulate it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# A GPU does not change, but torch.compile cannot look at it. `torch.compiler.assume_constant_result` would set this
# mark, but imports the compiler for it: that takes longer than the import of torch, and most commands compile nothing.
_marked: Any = has_bf16
_marked._dynamo_marked_constant = True
