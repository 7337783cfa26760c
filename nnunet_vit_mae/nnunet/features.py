"""Feature maps of trained networks on one preprocessed case: a picture of them, and how much checkerboard they have."""

from __future__ import annotations

import csv
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.files import read_json, replacing
from nnunet_vit_mae.networks.checkerboard import FeatureMap, checkerboard, feature_maps, inner
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.nnunet.models import Model
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.nnunet.trainers import (
    nnUNetTrainerAMAE,
    nnUNetTrainerAMAEScratch,
    nnUNetTrainerViTMAE,
    nnUNetTrainerViTScratch,
)
from nnunet_vit_mae.plots import Features, plot_features

TRAINERS = {
    trainer.__name__: trainer
    for trainer in (nnUNetTrainerViTMAE, nnUNetTrainerViTScratch, nnUNetTrainerAMAE, nnUNetTrainerAMAEScratch)
}


@dataclass(frozen=True)
class Patch:
    """Part of a case, of the planned size."""

    case: str
    image: Tensor  # c z y x
    z: int  # of the slice to draw: one with foreground, if the case has any


@dataclass(frozen=True)
class Share:
    """How much checkerboard there is in one map of one network (see `checkerboard`); a row of the table."""

    case: str
    plans: str
    decoder: str
    upsampling: str
    map: str
    period: str  # values of the map along z y x
    checkerboard: float


def refuse_without_features(trainer: str) -> None:
    """Raise `UserError` for a trainer that is none of ours with a ViT."""
    if trainer not in TRAINERS:
        raise UserError(f"-tr {trainer} has no ViT whose features could be drawn: use {' or '.join(TRAINERS)}.")


def draw_features(runs: Sequence[Model], case: str | None, file: Path, device: torch.device) -> list[Share]:
    """Draw the feature maps of all runs on one case into a PNG, and write their shares into a CSV beside it.

    Without a case it is the first validation case of the (first run's) fold.
    Raises `UserError` for a file that is no PNG or cannot be written, an unknown case, or an unfit checkpoint.
    """
    if file.suffix != ".png":
        raise UserError(f"-o {file} must end with .png: the table is written beside it, with .csv.")
    case = case or _first_validation_case(runs[0])
    rows, shares = [], []
    for run in runs:
        patch = read_patch(run.plan, case)
        maps, probability = _look_into(run, patch, device)
        own = _shares(run, case, maps)
        rows.append(_row(run, patch, maps, own, probability))
        shares += own
    title = f"{runs[0].plan.dataset.name}, {case}, one slice across z;\nof each map the channel that varies most"
    try:
        plot_features(rows, title, file)
        _write_csv(shares, file.with_suffix(".csv"))
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}): choose another place with -o.") from None
    return shares


def load_segmenter(run: Model) -> Segmenter:
    """The trained network, in `eval` mode on the CPU. Raises `UserError` when the checkpoint does not fit the plans."""
    plan = run.plan
    channels = determine_num_input_channels(plan.plans, plan.configuration, plan.dataset_json)
    classes = plan.plans.get_label_manager(plan.dataset_json).num_segmentation_heads
    network = TRAINERS[run.trainer].build_network_architecture(plan.plans, plan.configuration, channels, classes)
    try:
        # nnU-Net's checkpoints hold numpy's scalars, whose names differ between versions: nnU-Net reads them so itself
        network.load_state_dict(torch.load(run.files[0], map_location="cpu", weights_only=False)["network_weights"])
    except (RuntimeError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{run.files[0]} is damaged or does not fit its plans.json ({reason}).") from None
    return cast(Segmenter, network.eval())


def read_patch(plan: Plan, case: str) -> Patch:
    """The patch around the middle of a case's foreground, or of the case; zeros follow where the case is smaller.

    Raises `UserError` when there is no such preprocessed case.
    """
    known = _case_names(plan)
    if case not in known:
        some = ", ".join(known[:3]) + (", ..." if len(known) > 3 else "") or "none"
        raise UserError(
            f"There is no preprocessed case {case} in {plan.preprocessed_folder} (it has {some}): check --case."
        )
    loaded: Any = nnUNetDatasetBlosc2(str(plan.preprocessed_folder), [case]).load_case(case)
    volume, _, _, properties = loaded
    sides = volume.shape[1:]
    centre = _foreground_centre(properties) or [side // 2 for side in sides]
    axes = zip(centre, sides, plan.patch_size, strict=True)
    starts = [max(0, min(middle - size // 2, side - size)) for middle, side, size in axes]
    part = volume[:, *(slice(start, start + size) for start, size in zip(starts, plan.patch_size, strict=True))]
    image = np.zeros((len(part), *plan.patch_size), dtype=np.float32)
    image[:, *(slice(side) for side in part.shape[1:])] = part
    return Patch(case, torch.from_numpy(image), centre[0] - starts[0])


def checkerboard_table(shares: Sequence[Share]) -> str:
    """The shares as text, a line for each map."""
    wide = max(len(name) for name in ("plans", *(share.plans for share in shares)))
    lines = [f"{'plans':{wide}}  {'map':8}  {'period':8}  checkerboard"]
    lines += [f"{s.plans:{wide}}  {s.map:8}  {s.period:8}  {s.checkerboard:12.3f}" for s in shares]
    return "\n".join(lines)


def _case_names(plan: Plan) -> list[str]:
    folder = plan.preprocessed_folder
    return sorted(nnUNetDatasetBlosc2.get_identifiers(str(folder))) if folder.is_dir() else []


def _first_validation_case(run: Model) -> str:
    splits_file = run.plan.dataset.preprocessed / "splits_final.json"
    splits = read_json(splits_file) if splits_file.is_file() else []
    (fold,) = run.folds
    if fold.isdigit() and int(fold) < len(splits):
        return splits[int(fold)]["val"][0]
    names = _case_names(run.plan)
    if not names:
        raise UserError(
            f"There are no preprocessed cases in {run.plan.preprocessed_folder}: "
            f"run nnUNetv2_preprocess -d {run.plan.dataset.id} -c {run.plan.name} first."
        )
    return names[0]


def _foreground_centre(properties: dict) -> list[int] | None:
    """The voxel (z y x) that is nearest to the mean of those which nnU-Net has noted for sampling."""
    places = [np.asarray(found)[:, -3:] for found in properties.get("class_locations", {}).values() if len(found)]
    if not places:
        return None
    voxels = np.concatenate(places)
    return voxels[np.square(voxels - voxels.mean(axis=0)).sum(axis=1).argmin()].tolist()


def _look_into(run: Model, patch: Patch, device: torch.device) -> tuple[list[FeatureMap], np.ndarray]:
    """All maps, and the probability (z y x) of any foreground."""
    maps = feature_maps(load_segmenter(run).to(device), patch.image[None].to(device))
    labels = run.plan.plans.get_label_manager(run.plan.dataset_json)
    probabilities = labels.apply_inference_nonlin(maps[-1].values)
    z, y, x = patch.image.shape[1:]
    # regions overlap and have no background among them
    foreground = probabilities.amax(dim=0) if labels.has_regions else 1 - probabilities[0]
    return maps, foreground[:z, :y, :x].numpy()


def _shares(run: Model, case: str, maps: Sequence[FeatureMap]) -> list[Share]:
    return [
        Share(
            case=case,
            plans=run.plan.plans.plans_name,
            decoder=run.plan.settings.network.decoder,
            upsampling=_upsampling(run.plan),
            map=entry.name,
            period=" ".join(map(str, entry.cell)),
            checkerboard=checkerboard(entry.values, entry.cell),
        )
        for entry in maps
        if math.prod(entry.cell) > 1  # nothing can repeat within one value
    ]


def _row(
    run: Model, patch: Patch, maps: Sequence[FeatureMap], shares: Sequence[Share], probability: np.ndarray
) -> Features:
    numbers = {share.map: f"\ncheckerboard {share.checkerboard:.3f}" for share in shares}
    drawn = {}
    for entry in maps[:-1]:  # the logits are drawn as a probability
        channel = int(inner(entry.values, entry.cell).flatten(1).var(dim=1, correction=0).argmax())
        drawn[f"{entry.name}, channel {channel}{numbers.get(entry.name, '')}"] = _slice(entry, channel, patch)
    seen = probability[patch.z]
    caption = f"foreground, up to {seen.max():.2f}"
    if "logits" in numbers:
        caption += f"{numbers['logits']} (logits)"
    return Features(
        title=f"{run.plan.plans.plans_name} ({run.plan.settings.network.decoder}, {_upsampling(run.plan)})",
        maps=drawn,
        probability=seen,
        caption=caption,
        spacing=tuple(run.plan.configuration.spacing),
    )


def _upsampling(plan: Plan) -> str:
    """How the decoder upsamples; `mae` does not."""
    network = plan.settings.network
    return "none" if network.decoder == "mae" else network.upsampling


def _slice(entry: FeatureMap, channel: int, patch: Patch) -> np.ndarray:
    """One channel of a map in the patch's slice, as many values as the patch has voxels (y x)."""
    z, y, x = entry.stride
    _, height, width = patch.image.shape[1:]
    values = entry.values[channel, patch.z // z]
    return values.repeat_interleave(y, dim=0).repeat_interleave(x, dim=1)[:height, :width].numpy()


def _write_csv(shares: Sequence[Share], file: Path) -> None:
    with replacing(file) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Share.__dataclass_fields__)
        writer.writerows(vars(share).values() for share in shares)
