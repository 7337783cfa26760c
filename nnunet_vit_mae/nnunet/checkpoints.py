"""nnU-Net's checkpoints, checked before they are put into a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.pretraining.saved_state import weights_difference
from nnunet_vit_mae.settings import BLOCK, Settings, to_json_types


def refuse_other_network(
    checkpoint: Mapping[str, Any], file: Path, network: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings
) -> None:
    """Raise `UserError` when a checkpoint cannot be continued with the plans as they are now.

    Args:
        checkpoint: Its content.
        file: Where it was read from.
        network: The network of the plans.
        optimizer: Its optimiser.
        settings: Of the plans.
    """
    if difference := weights_difference(checkpoint["network_weights"], network):
        raise UserError(
            f"The training in {file.parent} was started with other {_what_differs(checkpoint, settings, difference)}: "
            "write the plans as they were to continue it, or plan with another name (mae3d_plan -o) for a new one."
        )
    saved = checkpoint.get("optimizer_state")
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if groups is None:
        raise UserError(f"{file} has no state of the optimiser, as a calibrated checkpoint: train without --c.")
    own = optimizer.state_dict()["param_groups"]
    if [_shape(group) for group in groups] != [_shape(group) for group in own]:
        raise UserError(
            f"{file} was written by an earlier version of this package, whose optimiser had other groups of weights: "
            "go on with that version, or start again without --c."
        )


def _shape(group: Mapping[str, Any]) -> tuple[int, bool]:
    return len(group.get("params", ())), {"pretrained", "lr_scale"} <= group.keys()


def _what_differs(checkpoint: Mapping[str, Any], settings: Settings, difference: str) -> str:
    """Return the settings that have changed in the plans, or how the weights differ if the settings are equal."""
    arguments = checkpoint.get("init_args") or {}
    plans, name = arguments.get("plans") or {}, arguments.get("configuration")
    block = ((plans.get("configurations") or {}).get(name) or {}).get(BLOCK) or {}
    then = {**to_json_types(Settings().network), **(block.get("network") or {})}
    now = to_json_types(settings.network)
    changed = [f"{key} ({then[key]} then, {now[key]} now)" for key in now if block and then[key] != now[key]]
    return f"settings of the network: {', '.join(changed)}" if changed else f"weights ({difference})"
