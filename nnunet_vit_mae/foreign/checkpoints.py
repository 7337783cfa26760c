"""Read checkpoints of other projects without running any code in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nnunet_vit_mae.errors import UserError, abbreviated, first_line
from nnunet_vit_mae.weights import CARD_KEY

SAFETENSORS = ".safetensors"
# entries of checkpoints that hold the weights
WEIGHTS = ("network_weights", "state_dict", "model_state_dict", "model", "teacher")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "vit.", "model.")  # of wrappers


def is_foreign(file: Path) -> bool:
    """Return whether a file is there and is neither an encoder of ours nor a broken one."""
    if not file.is_file():
        return False
    if file.suffix != SAFETENSORS:
        return True
    try:
        with safe_open(file, framework="pt") as content:
            return CARD_KEY not in (content.metadata() or {}) and bool(list(content.keys()))
    except SafetensorError:
        return False


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a `.safetensors` file, or one of torch's, in which only tensors and plain values are allowed.

    Raises:
        UserError: The file holds anything else, or is damaged.
    """
    try:
        if file.suffix == SAFETENSORS:
            with safe_open(file, framework="pt") as content:
                return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"The checkpoint {file} is damaged, or holds objects beside tensors and plain values, which are never "
            "unpickled: save its weights alone (a state dict) and take that file."
        ) from None
    except Exception as error:  # noqa: BLE001 (torch raises many kinds for damaged files)
        raise UserError(f"The checkpoint {file} cannot be read ({first_line(error)}).") from None
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"The checkpoint {file} holds a {type(checkpoint).__name__}, not a dictionary with weights.")
    return dict(checkpoint)


def weights_in(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, without the prefixes that wrappers put before its names."""
    for name in WEIGHTS:
        if isinstance(checkpoint.get(name), Mapping):
            return weights_in(checkpoint[name])
    tensors = {name: tensor for name, tensor in checkpoint.items() if isinstance(tensor, Tensor)}
    for prefix in PREFIXES * 2:
        inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if inside and len(inside) > len(tensors) // 2:
            tensors = inside
    return tensors


class Weights:
    """The weights of a checkpoint by name, which knows what has been taken from it."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._tensors, self._taken = dict(tensors), set[str]()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str) -> Tensor:
        """Return a tensor in single precision; raise `UserError` if it is missing or holds anything but floats."""
        if name not in self._tensors:
            raise UserError(f"it has no {name}")
        if not self._tensors[name].is_floating_point():
            raise UserError(f"it has no floating-point numbers in {name}")
        self._taken.add(name)
        return self._tensors[name].detach().float()

    def take_if_there(self, name: str) -> Tensor | None:
        """Return a tensor, or None."""
        return self.take(name) if name in self else None

    def depth(self, blocks: str) -> int:
        """Return the number of blocks: those whose names start with `blocks`, a number and a dot."""
        after = [name[len(blocks) :].split(".") for name in self._tensors if name.startswith(blocks)]
        return 1 + max((int(parts[0]) for parts in after if len(parts) > 2 and parts[0].isdigit()), default=-1)

    def refuse_rest(self, blocks: str, *, except_for: tuple[str, ...] = ()) -> None:
        """Raise `UserError` if blocks have weights that were not taken: they would compute something else."""
        rest = [
            name for name in self.unused if name.startswith(blocks) and not any(part in name for part in except_for)
        ]
        if rest:
            raise UserError(f"its blocks have weights that ours have no place for ({abbreviated(rest)})")

    @property
    def report(self) -> str:
        """Return in a sentence how many tensors are used, and which are left out."""
        total, parts = len(self._tensors), dict.fromkeys(name.split(".")[0] for name in self.unused)
        return f"{len(self._taken)} of {total} tensors are used; left out: {', '.join(parts) or 'nothing'}."

    @property
    def unused(self) -> list[str]:
        """Return the names of what was not taken."""
        return [name for name in self._tensors if name not in self._taken]
