"""Cases predicted by the members of a model: a segmentation, a map of disagreement, and a file of what they say.

A case whose files are there is not predicted again, so that a call that was stopped can be continued.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import FiniteFloat

from nnunet_vit_mae.calibration.conformal import VolumeEstimate
from nnunet_vit_mae.imaging.writing import write_segmentation
from nnunet_vit_mae.nnunet.models import Model, model_hash
from nnunet_vit_mae.nnunet.prediction import PredictionCase
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import write_json

if TYPE_CHECKING:
    from nnunet_vit_mae.nnunet.members import MemberPrediction, MemberPredictor


@dataclass(frozen=True)
class CaseUncertainty:
    """What the members of a model say about a case; a file beside its map of disagreement."""

    model: str  # hash
    estimates: dict[str, dict[str, VolumeEstimate]]  # by predictor (a fold, or all together), then by label
    soft_dice: dict[str, FiniteFloat | None]  # by label; None where nothing is segmented


def predict_members(
    model: Model, shifts: Sequence[float], cases: Sequence[PredictionCase], output: Path, maps: Path, device: str
) -> dict[str, CaseUncertainty]:
    """Predict cases with each member, except those that are done: a segmentation, a map and a record of each.

    Args:
        model: The model.
        shifts: The shift of each label's logits in its checkpoints.
        cases: The cases.
        output: The folder for segmentations.
        maps: The folder for maps of disagreement, in percent of the members, and for what the members say (JSON).
        device: The device to predict on.

    Returns:
        What the members say, by case.

    Raises:
        UserError: If an image cannot be read, or a checkpoint is damaged.
    """
    from nnunet_vit_mae.nnunet.members import MemberPredictor  # nnU-Net's predictor takes seconds to import

    identity, ending = model_hash(model), model.plan.file_ending
    writer = model.plan.plans.image_reader_writer_class()
    predictor: MemberPredictor | None = None
    found = {}
    for case in with_progress(cases, unit="case", desc="predicting"):
        files = [output / f"{case.name}{ending}", maps / f"{case.name}{ending}", maps / f"{case.name}.json"]
        known = _known(files, identity)
        if known is None:
            predictor = predictor or MemberPredictor(model, shifts, torch.device(device))
            prediction = predictor.predict(case.images)
            write_segmentation(prediction.segmentation, files[0], writer, prediction.properties)
            write_segmentation(prediction.disagreement, files[1], writer, prediction.properties)
            known = _said(prediction, identity)
            write_json(asdict(known), files[2])
        found[case.name] = known
    return found


def remove_lone_maps(model: Model, segmentations: Path, maps: Path) -> None:
    """Remove what the members said about segmentations that are gone: the next ones may be of other images."""
    ending = model.plan.file_ending
    for name in {file.name.removesuffix(".json").removesuffix(ending) for file in maps.glob("[!.]*")}:
        if not (segmentations / f"{name}{ending}").is_file():
            for file in (maps / f"{name}.json", maps / f"{name}{ending}"):
                file.unlink(missing_ok=True)


def _known(files: Sequence[Path], identity: str) -> CaseUncertainty | None:
    """Return what an earlier call with this model wrote, if all of it is there."""
    if not all(file.is_file() for file in files):
        return None
    known = read_entries(CaseUncertainty, files[-1], "remove it, and it is written again")
    return known if known.model == identity else None


def _said(prediction: MemberPrediction, identity: str) -> CaseUncertainty:
    soft = {label: None if math.isnan(value) else value for label, value in prediction.soft_dice.items()}
    return CaseUncertainty(identity, prediction.estimates, soft)
