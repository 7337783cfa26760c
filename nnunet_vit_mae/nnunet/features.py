"""A figure of the feature maps of trained networks on one preprocessed case, and a table of their checkerboards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from nnunet_vit_mae.errors import UserError, abbreviated, first_line
from nnunet_vit_mae.networks.checkerboard import FeatureMap, checkerboard, feature_maps, inner
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.nnunet.folds import labelled_cases, split_of
from nnunet_vit_mae.nnunet.models import Model, refuse_damaged_weights
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.nnunet.trainers import OUR_TRAINERS, nnUNetTrainerViTScratch
from nnunet_vit_mae.nnunet.untrained import untrained_network
from nnunet_vit_mae.plots import Features, plot_features
from nnunet_vit_mae.pretraining.volumes import open_volume, volume_problem
from nnunet_vit_mae.storage.csv_tables import read_cells, write_instances
from nnunet_vit_mae.storage.pickles import read_properties, read_trained

TRAINERS = [name for name, trainer in OUR_TRAINERS.items() if issubclass(trainer, nnUNetTrainerViTScratch)]


@dataclass(frozen=True)
class Patch:
    """A part of a case that has the patch size of the plans."""

    case: str
    image: Tensor  # c z y x
    z: int  # slice to draw, with foreground if the case has any


@dataclass(frozen=True)
class MapCheckerboard:
    """The checkerboard share of one feature map of one network (see `checkerboard`); a row of the table."""

    case: str
    plans: str
    decoder: str
    upsampling: str
    map: str
    period: str  # in values of the map, along z y x
    checkerboard: float


def refuse_without_features(trainer: str) -> None:
    """Raise `UserError` for a trainer that is not one of our ViT trainers."""
    if trainer not in TRAINERS:
        raise UserError(f"-tr {trainer} has no ViT whose features can be drawn: use {' or '.join(TRAINERS)}.")


def draw_features(models: Sequence[Model], case: str | None, file: Path, device: torch.device) -> list[MapCheckerboard]:
    """Draw the feature maps of all models on one case into a PNG, and write their checkerboards into a CSV beside it.

    The default case is the first validation case of the fold, or the first training case of fold `all`. Raises
    `UserError` for a file that is not a PNG or cannot be written, another table beside it, an unknown case, a
    checkpoint that does not fit, or the decoder `unet`, whose maps do not come from tokens.
    """
    if file.suffix != ".png":
        raise UserError(f"-o {file} must end with .png: the table is written beside it, with .csv.")
    beside = file.with_suffix(".csv")
    if beside.is_file() and read_cells(beside)[:1] != [[column.name for column in fields(MapCheckerboard)]]:
        raise UserError(f"{beside} is there already, and is not a table of mae3d_features: give another -o.")
    for model in models:
        if model.plan.settings.network.decoder == "unet":
            raise UserError(
                f"The plans {model.plan.plans_name} have the decoder unet, whose maps are not upsampled tokens: "
                "leave them out."
            )
    case = case or _first_validation_case(models[0])
    rows, table = [], []
    for model in models:
        patch = read_patch(model.plan, case)
        maps, probability = _feature_maps_of(model, patch, device)
        checkerboards = _checkerboards(model, case, maps)
        rows.append(_figure_row(model, patch, maps, checkerboards, probability))
        table += checkerboards
    title = f"{models[0].plan.dataset.name}, {case}, one slice across z;\nthe channel of each map that varies most"
    try:
        plot_features(rows, title, file)
        write_instances(MapCheckerboard, table, beside)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}): choose another file with -o.") from None
    return table


def load_segmenter(model: Model) -> Segmenter:
    """Return the trained network in `eval` mode on the CPU. Raises `UserError` if the checkpoint does not fit it."""
    network = untrained_network(model.plan, model.trainer, str(model.folder))
    refuse_damaged_weights(model)
    weights = read_trained(model.files[0])["network_weights"]
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{model.files[0]} is damaged or does not fit its plans.json ({first_line(error)}).") from None
    return cast(Segmenter, network.eval())


def read_patch(plan: Plan, case: str) -> Patch:
    """Return the patch around the middle of a case's foreground, or of the case; a small case is padded with zeros.

    Raises `UserError` if there is no such preprocessed case.
    """
    known = [labelled.name for labelled in labelled_cases(plan)]
    if case not in known:
        raise UserError(
            f"There is no preprocessed case {case} in {plan.preprocessed_folder} (it has {abbreviated(known)}): check "
            "--case."
        )
    file = plan.preprocessed_folder / f"{case}.b2nd"
    if problem := volume_problem(file, len(plan.channel_names)):
        raise UserError(f"{file} {problem}: run {plan.preprocessing_command} again.")
    volume = open_volume(file)
    properties = read_properties(plan.preprocessed_folder / f"{case}.pkl")
    sides = volume.shape[1:]
    centre = _foreground_centre(properties) or [side // 2 for side in sides]
    axes = zip(centre, sides, plan.patch_size, strict=True)
    starts = [max(0, min(middle - size // 2, side - size)) for middle, side, size in axes]
    part = volume[:, *(slice(start, start + size) for start, size in zip(starts, plan.patch_size, strict=True))]
    image = np.zeros((len(part), *plan.patch_size), dtype=np.float32)
    image[:, *(slice(side) for side in part.shape[1:])] = part
    return Patch(case, torch.from_numpy(image), centre[0] - starts[0])


def checkerboard_table(checkerboards: Sequence[MapCheckerboard]) -> str:
    """Return the checkerboard shares as text, a line for each map."""
    wide = max(len(name) for name in ("plans", *(row.plans for row in checkerboards)))
    lines = [f"{'plans':{wide}}  {'map':8}  {'period':8}  checkerboard"]
    lines += [f"{row.plans:{wide}}  {row.map:8}  {row.period:8}  {row.checkerboard:12.3f}" for row in checkerboards]
    return "\n".join(lines)


def _first_validation_case(model: Model) -> str:
    (fold,) = model.folds
    names = [case.name for case in labelled_cases(model.plan)]
    return names[0] if fold == "all" else split_of(model.plan, fold, names)["val"][0]


def _foreground_centre(properties: dict) -> list[int] | None:
    """Return the voxel (z y x) nearest to the mean of the foreground voxels that nnU-Net has noted for sampling."""
    locations = [np.asarray(voxels)[:, -3:] for voxels in properties.get("class_locations", {}).values() if len(voxels)]
    if not locations:
        return None
    voxels = np.concatenate(locations)
    return voxels[np.square(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()].tolist()


def _feature_maps_of(model: Model, patch: Patch, device: torch.device) -> tuple[list[FeatureMap], np.ndarray]:
    """Return all maps, and the probability (z y x) of any foreground."""
    maps = feature_maps(load_segmenter(model).to(device), patch.image[None].to(device))
    labels = model.plan.label_manager
    probabilities = labels.apply_inference_nonlin(maps[-1].values)
    z, y, x = patch.image.shape[1:]
    # regions overlap, and there is no background among them
    foreground = probabilities.amax(dim=0) if labels.has_regions else 1 - probabilities[0]
    return maps, foreground[:z, :y, :x].numpy()


def _checkerboards(model: Model, case: str, maps: Sequence[FeatureMap]) -> list[MapCheckerboard]:
    return [
        MapCheckerboard(
            case=case,
            plans=model.plan.plans_name,
            decoder=model.plan.settings.network.decoder,
            upsampling=_upsampling(model.plan),
            map=entry.name,
            period=" ".join(map(str, entry.cell)),
            checkerboard=checkerboard(entry.values, entry.cell),
        )
        for entry in maps
        if math.prod(entry.cell) > 1  # a single value has no pattern
    ]


def _figure_row(
    model: Model,
    patch: Patch,
    maps: Sequence[FeatureMap],
    checkerboards: Sequence[MapCheckerboard],
    probability: np.ndarray,
) -> Features:
    numbers = {row.map: f"\ncheckerboard {row.checkerboard:.3f}" for row in checkerboards}
    drawn = {}
    for entry in maps[:-1]:  # the logits are drawn as a probability
        channel = int(inner(entry.values, entry.cell).flatten(1).var(dim=1, correction=0).argmax())
        drawn[f"{entry.name}, channel {channel}{numbers.get(entry.name, '')}"] = _slice(entry, channel, patch)
    foreground = probability[patch.z]
    caption = f"foreground, up to {foreground.max():.2f}"
    if "logits" in numbers:
        caption += f"{numbers['logits']} (logits)"
    return Features(
        title=f"{model.plan.plans_name} ({model.plan.settings.network.decoder}, {_upsampling(model.plan)})",
        maps=drawn,
        probability=foreground,
        caption=caption,
        spacing=tuple(model.plan.configuration.spacing),
    )


def _upsampling(plan: Plan) -> str:
    """Return how the decoder upsamples; `mae` does not."""
    network = plan.settings.network
    return "none" if network.decoder == "mae" else network.upsampling


def _slice(entry: FeatureMap, channel: int, patch: Patch) -> np.ndarray:
    """Return one channel of a map in the slice of the patch, enlarged to the voxels of the patch (y x)."""
    z, y, x = entry.stride
    _, height, width = patch.image.shape[1:]
    values = entry.values[channel, patch.z // z]
    return values.repeat_interleave(y, dim=0).repeat_interleave(x, dim=1)[:height, :width].numpy()
