"""Plans that `mae3d_plan` writes: nnU-Net's, with a `vit_mae` block in a configuration.

They keep the source's `data_identifier`: the U-Net baseline and the ViT read the same preprocessed files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_vit_mae.datasets.split.files import SPLIT_RECORD, SPLITS
from nnunet_vit_mae.datasets.split.patients import PATIENTS
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.settings import BLOCK, Settings
from nnunet_vit_mae.storage.files import read_json, write_json
from nnunet_vit_mae.storage.layout import FINGERPRINT

BY_TORCH = {  # nnU-Net's own function, several times as fast as its default, with the same result but for rounding
    "resampling_fn_probabilities": "resample_torch_fornnunet",
    "resampling_fn_probabilities_kwargs": {
        "is_seg": False,
        "force_separate_z": None,
        "memefficient_seg_resampling": False,
    },
}
OURS = (BLOCK, *BY_TORCH)  # entries of a configuration that plans written here may have of their own
LINEAR = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}  # what its default does
NOT_FOR_PLANS = (DESCRIPTION, FINGERPRINT, SPLITS, SPLIT_RECORD, PATIENTS)  # others in that folder


def write_plans(source: Plan, name: str, settings: Settings) -> Path:
    """Write plans `name`: the source's, with these settings in the source's configuration.

    Logits are resampled by torch there. Images are not, so that all plans share their preprocessed files. Other
    configurations of plans of that name keep their settings.

    Raises `UserError` as `refuse_name` does.
    """
    refuse_name(source, name)
    file = source.dataset.plans_file(name)
    plans = json.loads(json.dumps(source.plans.plans))
    plans["plans_name"] = name
    ours = _ours_in_others(source, name) | {
        source.name: {BLOCK: settings.to_dict(), **_resampling(source.configuration)}
    }
    for configuration, entries in ours.items():
        plans["configurations"][configuration] |= entries
    write_json(plans, file)
    return file


def trained_otherwise(source: Plan, name: str, settings: Settings) -> list[str]:
    """Return the folders of models and encoders that were trained with plans `name` of another network."""
    file = source.dataset.plans_file(name)
    entries = read_json(file)["configurations"].get(source.name, {}) if file.exists() else {}
    if BLOCK not in entries or entries[BLOCK].get("network") == settings.to_dict()["network"]:
        return []
    return sorted(folder.name for folder in source.dataset.results.glob(f"*__{name}__{source.name}"))


def refuse_name(source: Plan, name: str) -> None:
    """Raise `UserError` when the name of plans to write is not valid, or belongs to plans that are not ours to replace.

    Those are plans of nnU-Net, and plans of ours with settings for another configuration as it was before nnU-Net
    planned it anew.
    """
    file = source.dataset.plans_file(name)
    if not name.isidentifier() or file.name in NOT_FOR_PLANS:
        raise UserError(f"-o {name} is not a name for plans: use letters, digits and underscores, such as ViT_small.")
    if file.exists() and not _is_ours(read_json(file)):
        raise UserError(f"{file} was not written by mae3d_plan and is left as it is: choose another name with -o.")
    _ours_in_others(source, name)


def _resampling(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return entries by which logits are resampled faster, unless the plans have a way of their own."""
    entries = configuration.configuration
    name, options = (entries[f"resampling_fn_probabilities{part}"] for part in ("", "_kwargs"))
    return BY_TORCH if (name, options) == ("resample_data_or_seg_to_shape", LINEAR) else {}


def _ours_in_others(source: Plan, name: str) -> dict[str, dict[str, Any]]:
    """Return our entries in the other configurations of plans that are to be written again, by configuration."""
    file = source.dataset.plans_file(name)
    found = {}
    for other, entries in read_json(file)["configurations"].items() if file.exists() else ():
        if other == source.name or BLOCK not in entries:
            continue
        now = source.plans.plans["configurations"].get(other, {})
        if _without_ours(entries) != _without_ours(now):
            raise UserError(
                f"{file} also has settings for {other}, which is another configuration in "
                f"{source.plans_name}: choose another name with -o, or remove the file."
            )
        found[other] = {key: value for key, value in entries.items() if key in OURS}
    return found


def _without_ours(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in OURS}


def _is_ours(plans: Any) -> bool:
    return isinstance(plans, dict) and any(BLOCK in entry for entry in plans.get("configurations", {}).values())
