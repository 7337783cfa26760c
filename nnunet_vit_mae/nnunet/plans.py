"""Plans files: nnU-Net's plans, and the `vit_mae` block that makes a configuration of them ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_vit_mae.calibration.cases import Classes
from nnunet_vit_mae.errors import UserError, did_you_mean
from nnunet_vit_mae.imaging.description import DESCRIPTION, describe, read_description
from nnunet_vit_mae.nnunet.checked_plans import read_plans
from nnunet_vit_mae.nnunet.folders import Dataset, find_dataset
from nnunet_vit_mae.planning import changed, default_settings
from nnunet_vit_mae.settings import BLOCK, Finetuning, Network, Settings
from nnunet_vit_mae.transfer import Destination


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
    def plans_name(self) -> str:
        """Return the name of the plans, as `-p` takes it."""
        return self.plans.plans_name

    @property
    def file_ending(self) -> str:
        """Return the ending of images and segmentations, with its dot."""
        return self.dataset_json["file_ending"]

    @property
    def label_manager(self) -> LabelManager:
        """Return nnU-Net's handling of labels, regions and the ignore label."""
        return self.plans.get_label_manager(self.dataset_json)

    @property
    def has_block(self) -> bool:
        """Return whether the plans have a `vit_mae` block, or leave all to the defaults."""
        return BLOCK in self.configuration.configuration

    @property
    def outputs(self) -> int:
        """Return the outputs of the network per voxel."""
        return self.label_manager.num_segmentation_heads

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
    def flags_text(self) -> str:
        """Return how commands name dataset, configuration and plans."""
        return f"-d {self.dataset.id} -c {self.name} -p {self.plans_name}"

    @property
    def preprocessing_command(self) -> str:
        """Return nnU-Net's command that preprocesses the labelled images; ours for the others takes `flags_text`."""
        return f"nnUNetv2_preprocess -d {self.dataset.id} -c {self.name} -plans_name {self.plans_name}"

    @property
    def preprocessed_folder(self) -> Path:
        """Return the folder of nnU-Net's preprocessed training cases."""
        return self.dataset.preprocessed / self.configuration.data_identifier

    @property
    def unlabelled_folder(self) -> Path:
        """Return the folder of the unlabelled pool: beside nnU-Net's, which must have labels."""
        return self.dataset.preprocessed / f"{self.configuration.data_identifier}_unlabelled"


def load_plan(dataset: Dataset | str, plans_name: str = "nnUNetPlans", configuration: str = "3d_fullres") -> Plan:
    """Read the plans of nnU-Net, or of `mae3d_plan`.

    Args:
        dataset: Number or name, as `-d` takes it.
        plans_name: Name of the plans.
        configuration: nnU-Net's configuration.

    Raises:
        UserError: If plans, configuration or `dataset.json` are not there, or the plans are those of another dataset.

    Example:
        >>> plan = load_plan("901")
        >>> plan.channel_names, plan.licence
        (['T1', 'FLAIR'], 'CC0')
    """
    dataset = find_dataset(dataset) if isinstance(dataset, str) else dataset
    file = dataset.plans_file(plans_name)
    if not file.is_file():
        ours = f"mae3d_plan -d {dataset.id} -o {plans_name}"
        command = f"nnUNetv2_plan_and_preprocess -d {dataset.id}" if plans_name.startswith("nnUNet") else ours
        near = did_you_mean(plans_name, (other.stem for other in dataset.preprocessed.glob("*.json")))
        raise UserError(
            f"There are no plans {plans_name} for {dataset.name} ({file}){near}: run {command} first, or check -p."
        )
    description = read_description(dataset.preprocessed / DESCRIPTION)
    plans = read_plans(file, plans_name, configuration, description)
    if plans.dataset_name != dataset.name:
        raise UserError(
            f"{file} has the dataset_name {plans.dataset_name}, so that nnU-Net would train on that dataset and not on "
            f"{dataset.name}: write the plans with nnUNetv2_move_plans_between_datasets, or correct the name there."
        )
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

    So both ways of AMAE (section 2.3) run on the same plans. On plans of the other kind, an adaptive network has the
    decoder `unetr`, and its own rate and protocol of pre-training where theirs are the defaults.
    """
    if not adaptive:
        return settings_of(configuration).updated({"network": {"adaptive": False}})
    settings = settings_of(configuration, contrasts=contrasts)
    if settings.network.adaptive:
        return settings
    return changed(settings, {"network": {"adaptive": True, "decoder": "unetr", "tokenizer": "linear"}})


def refuse_cascade(configuration: ConfigurationManager) -> None:
    """Raise `UserError` for the second stage of a cascade, whose network needs more input than images."""
    if configuration.previous_stage_name is not None:
        raise UserError(
            "This configuration is the second stage of a cascade, whose network also needs the segmentation of the "
            "first stage: choose 3d_fullres or 3d_lowres with -c."
        )


def resampling_spacings(
    plans: PlansManager, configuration: ConfigurationManager, spacing: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Return the spacing of an image (mm, z y x) along the axes of the plans, and the one that nnU-Net resamples it to.

    A 2D configuration has none for the first of these axes: its slices stay as they are.
    """
    own = [spacing[axis] for axis in plans.transpose_forward]
    target = list(configuration.spacing)
    return own, own[: len(own) - len(target)] + target


def destination(
    network: Network, plans: PlansManager, configuration: ConfigurationManager, dataset_json: Mapping[str, Any]
) -> Destination:
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
        transpose_forward=list(plans.transpose_forward),
        network=network.encoder_settings,
    )


def schedule_of(configuration: ConfigurationManager) -> Finetuning:
    """Return the fine-tuning part alone, which the U-Net baseline shares: it holds for 2D configurations too."""
    block = configuration.configuration.get(BLOCK, {})
    alone = {name: values if name == "finetuning" else {} for name, values in block.items()}
    return Settings.from_dict(alone).finetuning


def _label_values(label: Any) -> tuple[int, ...]:
    """Return the values of a label or of a region of several labels, as `dataset.json` and nnU-Net give them."""
    return tuple(int(value) for value in np.atleast_1d(label))


def classes_of(plan: Plan) -> Classes:
    """What the plan's network segments, in the order of its outputs."""
    manager = plan.label_manager
    labels = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    values = tuple(map(_label_values, labels))
    names = {_label_values(label): name for name, label in plan.dataset_json["labels"].items()}
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
        plan.outputs,
        deep_supervision=True,
    )
