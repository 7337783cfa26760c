"""Checkpoints of nnU-Net, read without running what they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_vit_mae.errors import UserError, reader_reason

# what nnU-Net's checkpoints hold besides tensors and plain values: numbers of numpy
NUMPY = [
    np.dtype,
    np.ndarray,
    *{type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u1", "?")},
    np._core.multiarray.scalar if hasattr(np, "_core") else np.core.multiarray.scalar,
]


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Return a checkpoint, on the CPU. Raises `UserError` if it is damaged, no checkpoint, or holds code."""
    try:
        with torch.serialization.safe_globals(NUMPY):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} is damaged or no checkpoint of nnU-Net ({reader_reason(error)}): train again."
        ) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("network_weights"), dict):
        raise UserError(f"{file} is no checkpoint of nnU-Net: check -chk.")
    return checkpoint
