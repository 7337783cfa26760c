"""Networks of a plan without their weights, of any trainer that is installed."""

from __future__ import annotations

import inspect

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.nnunet.trainers import OUR_TRAINERS


def expected_tensors(plan: Plan, trainer: str, source: str) -> dict[str, Tensor]:
    """Return all tensors of the network that the plans describe, without memory for their values (device `meta`).

    Raises `UserError` as `untrained_network` does.
    """
    with torch.device("meta"):
        return untrained_network(plan, trainer, source).state_dict()


def untrained_network(plan: Plan, trainer: str, source: str) -> nn.Module:
    """Build the network that the plans describe, of any trainer.

    Raises `UserError` if the trainer is not installed here, or if nnU-Net cannot build the network; `source` is what
    the error calls the model.
    """
    try:
        found = OUR_TRAINERS.get(trainer) or recursive_find_trainer_class_by_name(trainer)
    except (RuntimeError, AssertionError, TypeError):
        raise UserError(
            f"{source} was trained by {trainer}, which is not installed here: install it, and name its folder in "
            "nnUNet_extTrainer."
        ) from None
    build, configuration = found.build_network_architecture, plan.configuration
    described = (plan.plans, configuration)
    if "plans_manager" not in inspect.signature(build).parameters:  # of a trainer for an earlier nnU-Net
        described = (
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
        )
    try:
        return build(*described, len(plan.channel_names), plan.outputs, enable_deep_supervision=False)
    except Exception as error:  # noqa: BLE001  whatever a stranger's plans make of a network
        raise UserError(
            f"{source} has plans that describe no network ({reader_reason(error)}): export it again."
        ) from None
