"""bf16 where a GPU has it, fp32 everywhere else; never fp16."""

from __future__ import annotations

import torch


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which our networks run; it overrides any autocast around it."""
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)
