"""nnU-Net's plans as it takes them, after a check of every entry that nnU-Net or this package relies on.

nnU-Net looks entries up without a check: a mistake in a file that people edit would end in its `KeyError`, perhaps
hours later or in a worker process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from pydantic import AfterValidator, Field, FiniteFloat

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.imaging.description import Description
from nnunet_vit_mae.nnunet.plan_code import refuse_other_code
from nnunet_vit_mae.storage.entries import Length, Whole, checked_entries
from nnunet_vit_mae.storage.files import read_json

ADVICE = "correct it, or write the plans again with nnUNetv2_plan_experiment and mae3d_plan"


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"[^/\\:\0]+", text) or text.strip(". ") == "":
        raise ValueError("a name without / or \\")
    return text


def _axes(order: tuple[int, ...]) -> tuple[int, ...]:
    if sorted(order) != [0, 1, 2]:
        raise ValueError("an order of the axes 0, 1 and 2")
    return order


Name = Annotated[str, AfterValidator(_folder_name)]
Axes = Annotated[tuple[int, ...], AfterValidator(_axes)]
OfAxes = {"min_length": 2, "max_length": 3}


@dataclass(frozen=True, kw_only=True)
class PlanEntries:
    """What all configurations share."""

    dataset_name: Name
    plans_name: Name
    image_reader_writer: str
    transpose_forward: Axes
    transpose_backward: Axes
    label_manager: str = "LabelManager"
    foreground_intensity_properties_per_channel: dict[str, dict[str, FiniteFloat]]
    configurations: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class ConfigurationEntries:
    """A configuration, with what it inherits."""

    data_identifier: Name
    preprocessor_name: str
    batch_size: Whole
    patch_size: Annotated[tuple[Whole, ...], Field(**OfAxes)]
    spacing: Annotated[tuple[Length, ...], Field(**OfAxes)]
    normalization_schemes: Annotated[tuple[str, ...], Field(min_length=1)]
    use_mask_for_norm: tuple[bool, ...]
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: dict[str, Any]
    resampling_fn_probabilities: str
    resampling_fn_probabilities_kwargs: dict[str, Any]
    batch_dice: bool
    architecture: dict[str, Any]
    previous_stage: str | None = None
    vit_mae: dict[str, Any] = field(default_factory=dict)


def read_plans(file: Path, name: str, configuration: str, description: Description) -> PlansManager:
    """Read the plans that `-p` names.

    nnU-Net and this package keep results under the name in the file. Raises `UserError` if that is another one, and as
    `check_plans` does.
    """
    content = read_json(file)
    check_plans(content, configuration, description, source=str(file), name=name)
    if content["plans_name"] != name:
        raise UserError(
            f"-p names the plans {name}, but the plans_name in {file} is {content['plans_name']}, under which results "
            f"would be kept: write {name} there."
        )
    return PlansManager(content)


def check_plans(
    content: Any, configuration: str, description: Description, *, source: str, name: str = ""
) -> ConfigurationEntries:
    """Check the content of plans and one of their configurations against a `dataset.json`.

    Args:
        content: The plans, as JSON gives them.
        configuration: Its name.
        description: The dataset.
        source: What errors call the plans: a file.
        name: Of the plans.

    Returns:
        The configuration.

    Raises:
        UserError: An entry is missing, has the wrong type, or names what nnU-Net does not know; there is no such
            configuration; the plans belong to other channels or labels; or the dataset has no file ending or labels.
    """
    description.needed("file_ending")
    entries = checked_entries(PlanEntries, content, source, ADVICE)
    refuse_other_code(content, source)
    if configuration not in entries.configurations:
        known = ", ".join(entries.configurations)
        raise UserError(
            f"The plans {name or source} have no configuration {configuration} (they have {known}): check -c."
        )
    manager = PlansManager(content)
    try:
        resolved = manager.get_configuration(configuration)
    except (ValueError, RuntimeError, TypeError, KeyError) as error:  # of inherits_from, and of plans of old versions
        raise UserError(f"{source} cannot be used ({configuration}: {reader_reason(error)}): {ADVICE}.") from None
    planned = checked_entries(ConfigurationEntries, resolved.configuration, f"{source} ({configuration})", ADVICE)
    if len(planned.patch_size) != len(planned.spacing):
        raise UserError(
            f"{source} ({configuration}) has a patch of {len(planned.patch_size)} axes, but a spacing of "
            f"{len(planned.spacing)}: {ADVICE}."
        )
    _refuse_other_channels(entries, planned, description, source)
    _refuse_unknown_names(manager, resolved, description, source)
    return planned


def _refuse_other_channels(
    entries: PlanEntries, planned: ConfigurationEntries, description: Description, source: str
) -> None:
    channels = len(description.channels)
    numbers = {
        "normalization_schemes": len(planned.normalization_schemes),
        "use_mask_for_norm": len(planned.use_mask_for_norm),
        "foreground_intensity_properties_per_channel": len(entries.foreground_intensity_properties_per_channel),
    }
    for entry, number in numbers.items():
        if number != channels:
            raise UserError(
                f"{source} has {entry} for {number} channels, but {description.source} names {channels}: plan again "
                "with nnUNetv2_plan_experiment."
            )


def _refuse_unknown_names(
    manager: PlansManager, resolved: ConfigurationManager, description: Description, source: str
) -> None:
    """Raise `UserError` for classes and functions that nnU-Net does not have, and for labels that it refuses."""
    found: Mapping[str, Any] = {
        "image_reader_writer": lambda: manager.image_reader_writer_class,
        "preprocessor_name": lambda: resolved.preprocessor_class,
        "resampling_fn_data": lambda: resolved.resampling_fn_data,
        "label_manager": lambda: manager.label_manager_class,
    }
    for entry, look_up in found.items():
        try:
            known = look_up()
        except (RuntimeError, ImportError, AttributeError, TypeError):
            known = None
        if known is None:
            value = {**manager.plans, **resolved.configuration}.get(entry)
            raise UserError(f"{source} names the {entry} {value!r}, which nnU-Net does not have: {ADVICE}.")
    description.needed("labels")
    try:
        manager.get_label_manager(dict(description.content))
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"nnU-Net refuses the labels in {description.source} ({reader_reason(error)}): correct them."
        ) from None
