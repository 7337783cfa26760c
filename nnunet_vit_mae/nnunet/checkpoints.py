"""nnU-Net's checkpoints, checked before they are put into a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.networks.weight_differences import weights_difference
from nnunet_vit_mae.settings import BLOCK, Network
from nnunet_vit_mae.storage.files import read_json
from nnunet_vit_mae.storage.layout import PLANS


def refuse_other_network(
    checkpoint: Mapping[str, Any],
    file: Path,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Network | None,
) -> None:
    """Raise `UserError` when a checkpoint cannot be continued with the plans as they are now.

    Args:
        checkpoint: Its content.
        file: Where it was read from.
        network: The network of the plans.
        optimizer: Its optimiser.
        settings: Of a ViT in the plans; None for a network without one.
    """
    arguments = checkpoint.get("init_args") or {}
    plans, configuration = arguments.get("plans") or {}, arguments.get("configuration")
    differs = _changed_settings(plans, configuration, settings) if settings else ""
    if not differs and (difference := weights_difference(checkpoint["network_weights"], network)):
        differs = f"weights ({difference})"
    if differs:
        raise UserError(
            f"The training in {file.parent} was started with other {differs}: "
            "write the plans as they were to continue it, or plan with another name (mae3d_plan -o) for a new one."
        )
    groups = optimiser_groups(checkpoint, file)
    own = optimizer.state_dict()["param_groups"]
    if [_shape(group) for group in groups] != [_shape(group) for group in own]:
        raise UserError(
            f"{file} was written by an earlier version of this package, whose optimiser had other groups of weights: "
            "go on with that version, or start again without --c."
        )


def optimiser_groups(checkpoint: Mapping[str, Any], file: Path) -> list[Mapping[str, Any]]:
    """Return the groups of weights in the state of the optimiser. Raises `UserError` if a checkpoint has none."""
    saved = checkpoint.get("optimizer_state")
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    if groups is None:
        raise UserError(
            f"{file} has no state of the optimiser, like all that mae3d_import or mae3d_calibrate writes: predict "
            "with it (nnUNetv2_predict), or train without --c."
        )
    return groups


def refuse_network_of_other_folds(folder: Path, configuration: str, network: Network) -> None:
    """Raise `UserError` when folds beside this one are of another network, which their plans would no longer build.

    A training writes its plans into the folder of the model, where prediction reads them for all folds.

    Args:
        folder: The fold that is to be trained.
        configuration: nnU-Net's configuration.
        network: Of the plans.
    """
    model = folder.parent
    folds = {file.parent.name for file in model.glob("fold_*/checkpoint_*.pth")} - {folder.name}
    trained = {fold for fold in folds if re.fullmatch("fold_(all|[0-9]+)", fold)}
    if not trained or not (model / PLANS).is_file():
        return
    if differs := _changed_settings(read_json(model / PLANS), configuration, network):
        raise UserError(
            f"The training of {abbreviated(sorted(trained))} in {model} had other {differs}: write the plans as they "
            f"were to train {folder.name} too, plan with another name (mae3d_plan -o) for a new model, or remove these "
            "folds."
        )


def _shape(group: Mapping[str, Any]) -> tuple[int, bool]:
    return len(group.get("params", ())), {"pretrained", "lr_scale"} <= group.keys()


def _changed_settings(plans: Mapping[str, Any], configuration: str | None, network: Network) -> str:
    """Return in words which settings of the network are others now; nothing if none is, or if the plans have no block.

    Args:
        plans: Those of the training.
        configuration: nnU-Net's configuration.
        network: As it is now.
    """
    block = ((plans.get("configurations") or {}).get(configuration) or {}).get(BLOCK)
    if not block:
        return ""
    then = {**Network().to_dict(), **(block.get("network") or {})}
    now = network.to_dict()
    changed = [f"{key} ({then[key]} then, {now[key]} now)" for key in now if then[key] != now[key]]
    return f"settings of the network: {', '.join(changed)}" if changed else ""
