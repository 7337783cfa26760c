"""bf16 where a GPU has it, fp32 everywhere else; never fp16."""

from __future__ import annotations

import torch

from nnunet_vit_mae.networks.constants import constant_result


def autocast(device: torch.device) -> torch.autocast:
    """Return the context in which our networks run; it overrides any autocast around it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=_has_bf16(device))


@constant_result  # a GPU does not change, but torch.compile cannot look at it
def _has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
