"""The members of nnU-Net's prediction, each by itself: one for each fold and each mirroring of the input.

nnU-Net predicts with all of them and keeps their mean. The same forward passes are made here, over the same windows,
so that the mean is the same up to rounding, and what the members disagree about is known besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import Tensor, nn

from nnunet_vit_mae.calibration.cases import Classes
from nnunet_vit_mae.calibration.conformal import TOGETHER, VolumeEstimate
from nnunet_vit_mae.calibration.expected_dice import soft_dice
from nnunet_vit_mae.calibration.shifts import shift_probabilities
from nnunet_vit_mae.errors import reading
from nnunet_vit_mae.nnunet.models import Model, refuse_damaged_weights
from nnunet_vit_mae.nnunet.plans import classes_of, resampling_spacings
from nnunet_vit_mae.nnunet.untrained import untrained_network
from nnunet_vit_mae.storage.pickles import read_trained


@dataclass(frozen=True)
class MemberPrediction:
    """The prediction of one case and what its members say about it; arrays are on the grid of the image (z y x)."""

    segmentation: np.ndarray
    disagreement: np.ndarray  # percent of the members that give a voxel another label, uint8
    estimates: dict[str, dict[str, VolumeEstimate]]  # by fold (and `TOGETHER`), then by label
    soft_dice: dict[str, float]  # by label
    properties: dict[str, Any]  # nnU-Net's, to write an image of this grid


class MemberPredictor:
    """Predicts cases with each fold and each mirroring of a model; its networks stay in memory.

    Args:
        model: The model.
        shifts: The shift of each label's logits in its checkpoints, in the order of the labels.
        device: The device to predict on.

    Raises:
        UserError: If a checkpoint is damaged, or its trainer is not installed here.
    """

    def __init__(self, model: Model, shifts: Sequence[float], device: torch.device):
        refuse_damaged_weights(model)
        plan = self.plan = model.plan
        self.classes, self.shifts = classes_of(plan), shifts
        checkpoints = [read_trained(file) for file in model.files]
        self.weights = {
            fold: checkpoint["network_weights"] for fold, checkpoint in zip(model.folds, checkpoints, strict=True)
        }
        self.mirrorings = mirrorings(checkpoints[0].get("inference_allowed_mirroring_axes"))
        # nnU-Net moves it in inference mode, after which the running statistics of batch norms cannot be loaded again
        self.network = MirroredNetwork(untrained_network(plan, model.trainer, str(model.folder))).to(device)
        with redirect_stdout(StringIO()):  # it complains where there is no GPU
            self.predictor = nnUNetPredictor(device=device, allow_tqdm=False)
        # without mirroring of its own: each mirroring is a network of its own here
        self.predictor.manual_initialization(
            self.network, plan.plans, plan.configuration, None, plan.dataset_json, model.trainer, None
        )

    def predict(self, images: Sequence[Path]) -> MemberPrediction:
        """Predict a case from the image of each channel. Raises `UserError` if one cannot be read."""
        with reading(images[0]):
            data, _, properties = self.plan.configuration.preprocessor_class(verbose=False).run_case(
                [str(image) for image in images], None, self.plan.plans, self.plan.configuration, self.plan.dataset_json
            )
        by_fold: dict[str, Tensor] = {}
        votes = Votes(self.classes)
        for fold, logits in self._members(torch.from_numpy(data)):
            votes.add(fold, self._segment(logits))
            part = logits / len(self.mirrorings)
            by_fold[fold] = by_fold[fold] + part if fold in by_fold else part
        mean = torch.stack([*by_fold.values()]).mean(dim=0)
        segmentation, probabilities = self._on_image(mean, properties, return_probabilities=True)
        # a fold alone is the whole, and need not be resampled once more
        segmentations = {fold: self._on_image(own, properties) for fold, own in by_fold.items() if len(by_fold) > 1}
        segmentations[TOGETHER if len(by_fold) > 1 else next(iter(by_fold))] = segmentation
        estimates = {
            predictor: self._estimates(its_own, votes.counts_of(predictor), mean[0].numel(), properties)
            for predictor, its_own in segmentations.items()
        }
        unshifted = shift_probabilities(probabilities, self.classes, [-shift for shift in self.shifts])
        return MemberPrediction(
            segmentation=segmentation,
            disagreement=self._percent_on_image(votes.disagreement(self._segment(mean)), properties),
            estimates=estimates,
            soft_dice=self._soft_dice(segmentation, unshifted),
            properties=properties,
        )

    def _members(self, data: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the fold and the logits (channels z y x) of each member on the grid of the network."""
        for fold, weights in self.weights.items():
            self.network.network.load_state_dict(weights)
            for axes in self.mirrorings:
                self.network.axes = axes
                yield fold, self.predictor.predict_sliding_window_return_logits(data).cpu().float()

    def _segment(self, logits: Tensor) -> np.ndarray:
        """Return the labels (z y x) of logits on the grid of the network."""
        return np.asarray(self.predictor.label_manager.convert_logits_to_segmentation(logits))

    def _on_image(self, logits: Tensor, properties: Mapping[str, Any], *, return_probabilities: bool = False) -> Any:
        """Return the segmentation of logits, and their probabilities if asked for, on the grid of the image."""
        predictor = self.predictor
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            predictor.plans_manager,
            predictor.configuration_manager,
            predictor.label_manager,
            properties,
            return_probabilities=return_probabilities,
        )

    def _percent_on_image(self, share: np.ndarray, properties: Mapping[str, Any]) -> np.ndarray:
        """Return a share (z y x) on the grid of the network as percent on the grid of the image."""
        resample = self.plan.configuration.resampling_fn_probabilities
        of_image, of_network = resampling_spacings(self.plan.plans, self.plan.configuration, properties["spacing"])
        shape = properties["shape_after_cropping_and_before_resampling"]
        resampled = np.asarray(resample(share[None], shape, of_network, of_image))[0]
        whole = np.zeros(properties["shape_before_cropping"], np.uint8)
        box = tuple(slice(*ends) for ends in properties["bbox_used_for_cropping"])
        whole[box] = np.clip(np.rint(100 * resampled), 0, 100)
        return whole.transpose(self.plan.plans.transpose_backward)

    def _estimates(
        self, segmentation: np.ndarray, counts: np.ndarray, voxels: int, properties: Mapping[str, Any]
    ) -> dict[str, VolumeEstimate]:
        """Return the volume of each label, and the spread of the members' counts on the network's grid of `voxels`."""
        voxel = float(np.prod(properties["spacing"]))
        of_network = voxel * float(np.prod(properties["shape_after_cropping_and_before_resampling"])) / voxels
        spreads = np.std(counts, axis=0) * of_network
        return {
            label: VolumeEstimate(voxel * int(np.isin(segmentation, values).sum()), float(spread), voxel)
            for label, values, spread in zip(self.classes.names, self.classes.values, spreads, strict=True)
        }

    def _soft_dice(self, segmentation: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        foreground = probabilities if self.classes.regions else probabilities[1:]
        return {
            label: soft_dice(np.isin(segmentation, values), probability)
            for label, values, probability in zip(self.classes.names, self.classes.values, foreground, strict=True)
        }


class MirroredNetwork(nn.Module):
    """A network that sees its input mirrored along some axes, and whose output is mirrored back."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.axes: tuple[int, ...] = ()  # of the batch

    def forward(self, volume: Tensor) -> Tensor:
        """Predict: (b, c, z, y, x) -> (b, outputs, z, y, x)."""
        return torch.flip(self.network(torch.flip(volume, self.axes)), self.axes)


class Votes:
    """Counts which label each member gives, by voxel and in all, without keeping a segmentation of each."""

    def __init__(self, classes: Classes):
        self.classes = classes
        self._by_label: dict[int, np.ndarray] = {}  # members that give a voxel a label (z y x)
        self._counts: dict[str, list[list[int]]] = {}  # voxels of each class, for each member of a fold

    def add(self, fold: str, segmentation: np.ndarray) -> None:
        """Count the segmentation (z y x) of a member of a fold."""
        for label in np.unique(segmentation).tolist():
            votes = self._by_label.setdefault(label, np.zeros(segmentation.shape, np.uint16))
            votes += segmentation == label
        counts = [int(np.isin(segmentation, values).sum()) for values in self.classes.values]
        self._counts.setdefault(fold, []).append(counts)

    def counts_of(self, predictor: str) -> np.ndarray:
        """Return the voxels of each class for each member of a fold, or of all (members, classes)."""
        if predictor != TOGETHER:
            return np.array(self._counts[predictor])
        return np.concatenate([*self._counts.values()])

    def disagreement(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the share of members that give a voxel another label than a segmentation does (z y x)."""
        agreeing = np.zeros(segmentation.shape, np.float32)
        for label, votes in self._by_label.items():
            agreeing[segmentation == label] = votes[segmentation == label]
        return 1 - agreeing / sum(map(len, self._counts.values()))


def mirrorings(allowed: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Return the axes of a batch for each mirroring that nnU-Net averages over, of the spatial axes that it may mirror.

    >>> mirrorings((0, 2))
    [(), (2,), (4,), (2, 4)]
    """
    axes = [axis + 2 for axis in allowed or ()]
    return [chosen for number in range(len(axes) + 1) for chosen in combinations(axes, number)]
