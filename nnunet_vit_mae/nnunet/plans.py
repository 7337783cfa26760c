"""Plans files: nnU-Net's plans, and the `vit_mae` block that makes a configuration of them ours.

Plans written here keep the source's `data_identifier`: the U-Net baseline and the ViT read the same preprocessed files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_vit_mae.calibration.cases import Classes
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.description import DESCRIPTION, describe, read_description
from nnunet_vit_mae.nnunet.checked_plans import read_plans
from nnunet_vit_mae.nnunet.folders import Dataset, find_dataset
from nnunet_vit_mae.planning import default_decoder, default_protocol, default_rate, default_settings
from nnunet_vit_mae.settings import BLOCK, Finetuning, Network, Settings
from nnunet_vit_mae.storage.files import read_json, write_json
from nnunet_vit_mae.transfer import Destination

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
SETS_TAPS = ("size", "token", "decoder", "adaptive")  # of a network: what its taps are chosen for
NOT_FOR_PLANS = ("dataset", "dataset_fingerprint", "splits_final")  # nnU-Net's other files in that folder


@dataclass(frozen=True)
class Plan:
    """One configuration of one plans file of one dataset, with everything that is derived from them."""

    dataset: Dataset
    plans: PlansManager
    name: str  # of the configuration
    dataset_json: dict[str, Any]

    @property
    def configuration(self) -> ConfigurationManager:
        """Return nnU-Net's configuration."""
        return self.plans.get_configuration(self.name)

    @property
    def settings(self) -> Settings:
        """Return the settings of the plan's `vit_mae` block."""
        return settings_of(self.configuration)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Return the patch size in voxels along z y x."""
        return tuple(self.configuration.patch_size)

    @property
    def has_block(self) -> bool:
        """Return whether the plans have a `vit_mae` block, or leave all to the defaults."""
        return BLOCK in self.configuration.configuration

    @property
    def classes(self) -> int:
        """Return the outputs of the network per voxel."""
        return self.plans.get_label_manager(self.dataset_json).num_segmentation_heads

    @property
    def channel_names(self) -> list[str]:
        """Return contrasts in the order of the files' channel numbers."""
        return channel_names(self.dataset_json)

    @property
    def licence(self) -> str:
        """Return the licence of the data, as far as `dataset.json` states it."""
        description = describe(self.dataset_json, DESCRIPTION)
        return description.licence or description.license or "not stated in dataset.json"

    @property
    def preprocessed_folder(self) -> Path:
        """Return the folder of nnU-Net's preprocessed training cases."""
        return self.dataset.preprocessed / self.configuration.data_identifier

    @property
    def unlabelled_folder(self) -> Path:
        """Return the folder of the unlabelled pool: beside nnU-Net's, for nnU-Net expects labels in its own."""
        return self.dataset.preprocessed / f"{self.configuration.data_identifier}_unlabelled"


def load_plan(dataset: Dataset | str, plans_name: str = "nnUNetPlans", configuration: str = "3d_fullres") -> Plan:
    """Read the plans of nnU-Net, or of `mae3d_plan`.

    Args:
        dataset: Number or name, as `-d` takes it.
        plans_name: Name of the plans.
        configuration: nnU-Net's configuration.

    Raises:
        UserError: If plans, configuration or `dataset.json` are not there.

    Example:
        >>> plan = load_plan("901")
        >>> plan.channel_names, plan.licence
        (['T1', 'FLAIR'], 'CC0')
    """
    dataset = find_dataset(dataset) if isinstance(dataset, str) else dataset
    file = dataset.plans_file(plans_name)
    if not file.is_file():
        raise UserError(
            f"There are no plans {plans_name} for {dataset.name} ({file}): "
            f"run nnUNetv2_plan_and_preprocess -d {dataset.id}, or mae3d_plan with -o {plans_name}, first."
        )
    description = read_description(dataset.preprocessed / DESCRIPTION)
    description.needed("file_ending")
    plans = read_plans(file, plans_name, configuration, description)
    return Plan(dataset, plans, configuration, dict(description.content))


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """Return contrasts in the order of the files' channel numbers (nnU-Net v1 called them `modality`)."""
    return describe(dataset_json, DESCRIPTION).channels


def settings_of(configuration: ConfigurationManager, *, contrasts: int | None = None) -> Settings:
    """Return the settings in a configuration's `vit_mae` block; what it leaves out follows from patch and spacing.

    With `contrasts`, what it leaves out is that of an adaptive network for this many.
    """
    patch, spacing, batch = configuration.patch_size, configuration.spacing, configuration.batch_size
    defaults = default_settings(patch, spacing, batch, contrasts=contrasts)
    return changed(defaults, configuration.configuration.get(BLOCK, {}))


def settings_for(configuration: ConfigurationManager, contrasts: int, *, adaptive: bool) -> Settings:
    """Return the settings of an adaptive network, or of one that stacks its channels, whatever the plans say.

    So both ways of AMAE (section 2.3) run on the same plans; an adaptive network's decoder is `unetr`, and on plans of
    the other kind it has its own rate and protocol of pre-training where theirs are the defaults.
    """
    if not adaptive:
        return settings_of(configuration).updated({"network": {"adaptive": False}})
    settings = settings_of(configuration, contrasts=contrasts)
    return changed(settings, {"network": {"adaptive": True, "decoder": "unetr", "tokenizer": "linear"}})


def refuse_cascade(configuration: ConfigurationManager) -> None:
    """Raise `UserError` for the second stage of a cascade, whose network needs more input than images."""
    if configuration.previous_stage_name is not None:
        raise UserError(
            "This configuration is the second stage of a cascade, whose network also needs the segmentation of the "
            "first stage: choose 3d_fullres or 3d_lowres with -c."
        )


def resampling_spacings(plan: Plan, spacing: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return the spacing of an image (mm, z y x) along the axes of the plans, and the one that nnU-Net resamples it to.

    A 2D configuration has none for the first of these axes: its slices stay as they are.
    """
    own = [spacing[axis] for axis in plan.plans.transpose_forward]
    target = list(plan.configuration.spacing)
    return own, own[: len(own) - len(target)] + target


def destination(network: Network, configuration: ConfigurationManager, dataset_json: Mapping[str, Any]) -> Destination:
    """Return what an encoder has to fit."""
    return Destination(
        size=network.size,
        token=list(network.token),
        adaptive=network.adaptive,
        modality_vectors=network.modality_vectors,
        channel_names=channel_names(dataset_json),
        normalization=list(configuration.normalization_schemes),
        patch_size=list(configuration.patch_size),
        spacing=list(configuration.spacing),
        network=network.encoder_settings,
    )


def schedule_of(configuration: ConfigurationManager) -> Finetuning:
    """Return the fine-tuning part alone, which the U-Net baseline shares: it holds for 2D configurations too."""
    block = configuration.configuration.get(BLOCK, {})
    alone = {name: values if name == "finetuning" else {} for name, values in block.items()}
    return Settings.from_dict(alone).finetuning


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with changes (a partial block).

    A network of another size, token or decoder, or one that is adaptive where the other was not or the reverse, brings
    its default taps; the latter also its default decoder and protocol of pre-training, and another decoder its default
    rate. What is given too is kept, and so is what is not the default in rate and protocol.

    Raises:
        UserError: If the changes are not valid.
    """
    network = changes.get("network", {})
    if isinstance(network, Mapping) and network:
        adaptive = network.get("adaptive", settings.network.adaptive)
        if adaptive != settings.network.adaptive:
            network = {"decoder": default_decoder(adaptive=adaptive), **network}
        changes = {**changes, "network": network}
    now = settings.updated({"network": {"taps": ()}}).updated(changes)
    if "taps" not in network and _same_blocks_are_tapped(settings.network, now.network):
        now = now.updated({"network": {"taps": settings.network.taps}})
    had_default = settings.finetuning.lr == default_rate(settings.network.decoder)
    if had_default and "lr" not in changes.get("finetuning", {}):
        now = now.updated({"finetuning": {"lr": default_rate(now.network.decoder)}})
    return _with_protocol_of_its_kind(now, settings, given=changes.get("pretraining", {}))


def _with_protocol_of_its_kind(now: Settings, before: Settings, *, given: Collection[str]) -> Settings:
    """Return settings with the default protocol of an adaptive network, or the other one, where `before` has not."""
    there, here = (vars(default_protocol(adaptive=settings.network.adaptive)) for settings in (before, now))
    own = {
        name: value
        for name, value in here.items()
        if name not in given and value != there[name] == getattr(before.pretraining, name)
    }
    if now.pretraining.plain_share:
        own.pop("norm_pix", None)  # a plain loss in the first epochs is only for a norm-pix one in the others
    return now.updated({"pretraining": own})


def _same_blocks_are_tapped(before: Network, now: Network) -> bool:
    return all(getattr(before, name) == getattr(now, name) for name in SETS_TAPS)


def label_values(label: Any) -> tuple[int, ...]:
    """Return the values of a label or of a region of several labels, as `dataset.json` and nnU-Net give them."""
    return tuple(int(value) for value in np.atleast_1d(label))


def classes_of(plan: Plan) -> Classes:
    """What the plan's network segments, in the order of its outputs."""
    manager = plan.plans.get_label_manager(plan.dataset_json)
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    values = tuple(map(label_values, labels))
    names = {label_values(label): name for name, label in plan.dataset_json["labels"].items()}
    painted = tuple(map(int, plan.dataset_json["regions_class_order"])) if manager.has_regions else ()
    return Classes(tuple(names[label] for label in values), values, painted, manager.ignore_label)


def build_unet(plan: Plan) -> nn.Module:
    """Build the U-Net that nnU-Net planned, with random weights and outputs at all resolutions."""
    configuration = plan.configuration
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(plan.channel_names),
        plan.classes,
        deep_supervision=True,
    )


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


def _resampling(configuration: ConfigurationManager) -> dict[str, Any]:
    """Return entries by which logits are resampled faster, unless the plans have a way of their own."""
    entries = configuration.configuration
    name, options = (entries[f"resampling_fn_probabilities{part}"] for part in ("", "_kwargs"))
    return BY_TORCH if (name, options) == ("resample_data_or_seg_to_shape", LINEAR) else {}


def refuse_name(source: Plan, name: str) -> None:
    """Raise `UserError` when the name of plans to write is none, or belongs to plans that are not ours to replace.

    Those are plans of nnU-Net, and plans of ours with settings for another configuration as it was before nnU-Net
    planned it anew.
    """
    file = source.dataset.plans_file(name)
    if not name.isidentifier() or name in NOT_FOR_PLANS:
        raise UserError(f"-o {name} is not a name for plans: use letters, digits and underscores, such as ViT_small.")
    if file.exists() and not _is_ours(read_json(file)):
        raise UserError(f"{file} was not written by mae3d_plan and is left as it is: choose another name with -o.")
    _ours_in_others(source, name)


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
                f"{source.plans.plans_name}: choose another name with -o, or remove the file."
            )
        found[other] = {key: value for key, value in entries.items() if key in OURS}
    return found


def _without_ours(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if key not in OURS}


def _is_ours(plans: Any) -> bool:
    return isinstance(plans, dict) and any(BLOCK in entry for entry in plans.get("configurations", {}).values())


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """Return a partial `vit_mae` block: one of ours by name (`quick`), or a JSON file.

    Raises `UserError` if it is neither.
    """
    ours = {
        Path(entry.name).stem: entry
        for entry in files("nnunet_vit_mae.plans").iterdir()
        if entry.name.endswith(".json")
    }
    if name_or_file in ours:
        return json.loads(ours[name_or_file].read_text(encoding="utf-8"))
    if not Path(name_or_file).is_file():
        raise UserError(f"There is no recipe {name_or_file}: name one of {', '.join(sorted(ours))}, or a JSON file.")
    recipe = read_json(Path(name_or_file))
    if not isinstance(recipe, dict) or not all(isinstance(values, dict) for values in recipe.values()):
        raise UserError(f"The recipe {name_or_file} must be an object of objects, such as {{'network': {{...}}}}.")
    if "encoder" in recipe:
        raise UserError(f"The recipe {name_or_file} names an encoder: give its file with --encoder, to be checked.")
    return recipe
