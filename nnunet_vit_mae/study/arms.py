"""The arms of a study as data: what is trained, on which plans, with which settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.recipes import merged
from nnunet_vit_mae.settings import Network
from nnunet_vit_mae.storage.entries import checked_entries
from nnunet_vit_mae.storage.files import read_json

DEFAULT_PLANS = "nnUNetPlans"
PRIMUS = "nnUNet_PrimusV2M_Trainer"
FROM_SCRATCH = {  # the same network with random weights, by trainer
    "nnUNetTrainerViTMAE": "nnUNetTrainerViTScratch",
    "nnUNetTrainerAMAE": "nnUNetTrainerAMAEScratch",
}
BASELINE, BASELINE_ADAMW = "nnUNetTrainerBaseline", "nnUNetTrainerBaselineAdamW"
SCHEDULED = (BASELINE, BASELINE_ADAMW, *FROM_SCRATCH, *FROM_SCRATCH.values())  # take the schedule from the plans
WITHOUT_UNET = {"network": {"decoder": "unetr"}}  # where neither arm nor --recipe names a decoder
NOT_OF_THE_ENCODER = ("decoder", "upsampling", "decoder_width", "taps")  # settings that one encoder serves all of


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model to compare; an arm with members is the mean of their probabilities and is not trained itself."""

    trainer: str = ""
    recipe: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # a partial vit_mae block
    plans: str = DEFAULT_PLANS  # nnU-Net's plans that those of the arm are made from
    planner: str = ""  # of nnUNetv2_plan_experiment, which makes these plans if they are not the default
    encoder: bool = False  # starts from a pre-trained encoder
    calibrate: bool = True
    members: tuple[str, ...] = ()

    @property
    def scheduled(self) -> bool:
        """Whether epochs, iterations and seed of the study hold for the trainer."""
        return self.trainer in SCHEDULED


ARMS = {
    "unet": Arm(trainer=BASELINE),
    "unet_adamw": Arm(trainer=BASELINE_ADAMW),
    "vit": Arm(trainer="nnUNetTrainerViTMAE", encoder=True),
    "scratch": Arm(trainer="nnUNetTrainerViTScratch"),
    "hybrid": Arm(trainer="nnUNetTrainerViTMAE", recipe={"network": {"decoder": "unet"}}, encoder=True),
    "hybrid_scratch": Arm(trainer="nnUNetTrainerViTScratch", recipe={"network": {"decoder": "unet"}}),
    "resenc": Arm(trainer=BASELINE, plans="nnUNetResEncUNetMPlans", planner="nnUNetPlannerResEncM"),
    "primus": Arm(trainer=PRIMUS),
    "ensemble": Arm(members=("unet", "vit")),
}


def choose_arms(names: Sequence[str], plans: str = DEFAULT_PLANS) -> dict[str, Arm]:
    """Return the arms of these names in their order; a name that ends in `.json` is a file of further arms.

    Arms with neither plans of their own nor a planner get these plans.

    Raises:
        UserError: If a name is unknown or occurs twice, a file has no arms, or an ensemble lacks a member.
    """
    arms: dict[str, Arm] = {}
    for name in names:
        chosen = read_arms(Path(name)) if name.endswith(".json") else {name: _built_in(name)}
        if twice := [other for other in chosen if other in arms]:
            raise UserError(f"--arms names {twice[0]} twice: give every arm a name of its own.")
        arms |= chosen
    for name, arm in arms.items():
        for member in arm.members:
            if member not in arms or arms[member].members:
                raise UserError(f"The arm {name} is the mean of {' and '.join(arm.members)}: add {member} to --arms.")
    without = {name: arm for name, arm in arms.items() if arm.plans == DEFAULT_PLANS and not arm.planner}
    return arms | {name: dataclasses.replace(arm, plans=plans) for name, arm in without.items()}


def _built_in(name: str) -> Arm:
    if name not in ARMS:
        raise UserError(f"--arms {name}: choose from {', '.join(ARMS)}, or give a JSON file with arms of your own.")
    return ARMS[name]


def read_arms(file: Path) -> dict[str, Arm]:
    """Read arms from a JSON file: an object of objects, with the attributes of `Arm`.

    Raises:
        UserError: If the file is missing or an arm in it has an unknown key, or a value of the wrong type.
    """
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f'{file} must be an object of arms, such as {{"mine": {{"trainer": "nnUNetTrainerViTMAE"}}}}.')
    return {name: _arm_from(entry, name, str(file)) for name, entry in content.items()}


def arms_from(content: Mapping[str, Any]) -> dict[str, Arm]:
    """Return the arms that `arms_to_json` wrote."""
    return {name: _arm_from(entry, name, "study.json") for name, entry in content.items()}


def arms_to_json(arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Return arms as JSON holds them."""
    return json.loads(json.dumps({name: dataclasses.asdict(arm) for name, arm in arms.items()}))


def _arm_from(entry: Any, name: str, source: str) -> Arm:
    if not name.isidentifier():
        raise UserError(f"{source} has the arm {name!r}: use letters, digits and underscores, as in my_vit.")
    known = [item.name for item in dataclasses.fields(Arm)]
    arm = checked_entries(
        Arm, entry, f"The arm {name} in {source}", f"correct it; an arm has some of {', '.join(known)}"
    )
    if unknown := sorted(set(entry) - set(known)):
        raise UserError(f"The arm {name} in {source} has the unknown key {unknown[0]}: choose from {', '.join(known)}.")
    if bool(arm.trainer) == bool(arm.members):
        raise UserError(f"The arm {name} in {source} needs either a trainer, or members to take the mean of.")
    if arm.planner and arm.plans == DEFAULT_PLANS:
        raise UserError(
            f"The arm {name} in {source} has the planner {arm.planner}, but would use {DEFAULT_PLANS}: name the plans "
            "that the planner makes, as in the arm resenc."
        )
    return arm


def encoder_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a recipe that decides how an encoder is built and pre-trained."""
    network = {key: value for key, value in recipe.get("network", {}).items() if key not in NOT_OF_THE_ENCODER}
    assert set(NOT_OF_THE_ENCODER) <= {item.name for item in dataclasses.fields(Network)}
    return {"network": network, "pretraining": dict(recipe.get("pretraining", {}))}


def scratch_pairs(arms: Mapping[str, Arm]) -> list[tuple[str, str]]:
    """Return pairs of an arm from scratch and the same network pre-trained."""
    return [
        (other_name, name)
        for name, arm in arms.items()
        if arm.encoder
        for other_name, other in arms.items()
        if other.trainer == FROM_SCRATCH.get(arm.trainer)
        and (other.plans, merged(other.recipe)) == (arm.plans, merged(arm.recipe))
    ]
