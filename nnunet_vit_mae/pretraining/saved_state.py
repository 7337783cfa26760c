"""The saved state of a pre-training: written between any two steps, and checked before any of it is used."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.networks.weight_differences import weights_difference
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.processes.signals import tell
from nnunet_vit_mae.storage.files import replacing

STATE = "state.pt"


def save_state(
    output: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: list[float],
    begun: Sequence[Tensor] = (),
) -> float:
    """Let rank 0 save a run, and return the seconds that it took.

    Args:
        output: Folder of the run.
        network: The network.
        optimizer: Its optimiser.
        losses: Losses of all whole epochs.
        begun: Losses of the steps after them.
    """
    started = time.monotonic()
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
    state["begun"] = distributed.averaged(torch.stack(list(begun))) if begun else torch.empty(0)
    if distributed.is_rank_0():
        with replacing(output / STATE) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)
        tell(what_is_kept(output))
    return time.monotonic() - started


def what_is_kept(output: Path) -> str:
    """Return a sentence about the state of a run that has ended early, and how to go on."""
    if (output / STATE).is_file():
        return f"The state is saved in {output / STATE}, and the same command with --c goes on from there."
    return "Nothing of this run is saved yet, and the same command starts it again."


def read_state(
    file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, epochs: int, steps_per_epoch: int
) -> dict[str, Any]:
    """Read the state of a run of at most this many epochs, on the CPU.

    Raises:
        UserError: If the file is damaged, or belongs to another network or a longer run.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (zipfile, pickle and torch raise many kinds for a damaged file)
        raise _refusal(file, f"cannot be read ({reader_reason(error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("network"), dict):
        raise _refusal(file, "is not the state of a pre-training")
    if difference := weights_difference(state["network"], network):
        raise _refusal(file, f"is of another network ({difference})")
    losses, saved = state.get("losses"), state.get("optimizer")
    if not isinstance(losses, list) or not all(isinstance(loss, float) and math.isfinite(loss) for loss in losses):
        raise _refusal(file, "has no list of losses")
    if len(losses) > epochs:
        raise _refusal(file, f"has {len(losses)} epochs, but the run has only {epochs}")
    begun = state.setdefault("begun", torch.empty(0))  # states of earlier versions are of whole epochs
    if not isinstance(begun, Tensor) or begun.dim() != 1 or len(begun) > steps_per_epoch or not begun.isfinite().all():
        raise _refusal(file, "has no losses of the steps after the last epoch")
    if not isinstance(saved, dict) or _sizes(saved) != _sizes(optimizer.state_dict()):
        raise _refusal(file, "is of another optimiser")
    return state


def _sizes(optimizer_state: Mapping[str, Any]) -> list[int] | None:
    """Return the number of parameters in each group, None for something else."""
    groups = optimizer_state.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return None
    return [len(group.get("params", ())) for group in groups]


def _refusal(file: Path, reason: str) -> UserError:
    return UserError(f"{file} {reason}: start again without --c, which moves this run aside.")
