"""How far probabilities are calibrated: reliability, expected calibration error, and one temperature that improves it.

Temperature scaling divides all logits by one number (Guo et al., 2017, https://arxiv.org/abs/1706.04599). It is fitted
by the likelihood of the labels. The logits follow from saved probabilities, up to a constant that no softmax sees.

Most voxels of a scan are background of which a network is sure and right. Of those and of the others some are looked
at and count for all, so that each case is read once and little of it is kept: no more for many cases and classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, logsumexp

from nnunet_vit_mae.calibration.cases import CalibrationCase, Classes, blocks, members_of, voxels_per_block
from nnunet_vit_mae.progress import with_progress

LOWEST, HIGHEST = 0.05, 20.0  # temperatures that are searched
SMALLEST = 1e-30  # probabilities in single precision end near 1e-38
CLOSEST = 1e-7  # to 1: the rounding of a probability in single precision
SURE = 1e-3  # a voxel whose probabilities are all closer to the truth says little
MOST = 2**14  # voxels that are looked at, of every `SPAN`: this many sure ones, and this many others
SPAN = 2**22
MOST_VALUES = 2**25  # probabilities that are looked at in all cases together
BINS = 20
RELEVANT = 0.01  # voxels with a lower probability of a class are left out of its reliability


@dataclass(frozen=True)
class VoxelSample:
    """Voxels of all cases: n of them, each standing for `weights` voxels."""

    probabilities: np.ndarray  # channels n
    truth: np.ndarray  # channels n, whether a voxel belongs to the class of a channel
    weights: np.ndarray  # n


@dataclass(frozen=True)
class Reliability:
    """Mean probability of a class, and how often voxels belong to it, in bins of the probability that hold voxels."""

    probability: np.ndarray
    frequency: np.ndarray
    voxels: np.ndarray

    @property
    def expected_error(self) -> float:
        """Expected calibration error: mean difference of probability and frequency over voxels; NaN without any."""
        if not len(self.voxels):
            return math.nan
        return float(np.average(np.abs(self.probability - self.frequency), weights=self.voxels))


def sample_voxels(cases: Sequence[CalibrationCase], classes: Classes) -> VoxelSample:
    """Read all cases once and keep what tells how good their probabilities are; ignored voxels are left out."""
    kept: list[VoxelSample] = []
    limit = MOST_VALUES // (2 * classes.outputs * len(cases))
    for case in with_progress(cases, unit="case", desc="reading"):
        arrays = case.read()
        of_case = min(limit, MOST * math.ceil(arrays[1].size / SPAN))
        most = max(1, int(of_case * min(1, voxels_per_block(classes) / arrays[1].size)))
        for probabilities, labels in blocks(*arrays, classes):
            truth = members_of(labels, classes)
            sure = np.abs(probabilities - truth).max(axis=0) < SURE
            for (voxels,) in (np.nonzero(sure), np.nonzero(~sure)):
                chosen = voxels[:: math.ceil(len(voxels) / most) or 1]
                weights = np.full(len(chosen), len(voxels) / max(len(chosen), 1))
                kept.append(VoxelSample(probabilities[:, chosen], truth[:, chosen], weights))
    return VoxelSample(
        np.concatenate([part.probabilities for part in kept], axis=1),
        np.concatenate([part.truth for part in kept], axis=1),
        np.concatenate([part.weights for part in kept]),
    )


def fit_temperature(sample: VoxelSample, *, regions: bool) -> float:
    """Return the temperature with the smallest negative log likelihood of the labels.

    Args:
        sample: Voxels of cases that the model was not trained on.
        regions: Whether channels are sigmoids; otherwise they are a softmax.

    Returns:
        Above 1 for a network that is too sure, below 1 for one that is not sure enough; from 0.05 to 20.
    """
    logits = logits_of(sample.probabilities, regions=regions)

    def loss(log_temperature: float) -> float:
        return _negative_log_likelihood(logits / math.exp(log_temperature), sample, regions=regions)

    bounds = (math.log(LOWEST), math.log(HIGHEST))
    best: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return math.exp(best.x)


def negative_log_likelihood(sample: VoxelSample, temperature: float, *, regions: bool) -> float:
    """Return the mean over voxels of minus the log probability of their labels (of each region, added up)."""
    logits = logits_of(sample.probabilities, regions=regions)
    return _negative_log_likelihood(logits / temperature, sample, regions=regions)


def _negative_log_likelihood(logits: np.ndarray, sample: VoxelSample, *, regions: bool) -> float:
    if regions:
        losses = np.logaddexp(0, np.where(sample.truth, -logits, logits)).sum(axis=0)
    else:
        losses = np.asarray(logsumexp(logits, axis=0)) - np.where(sample.truth, logits, 0).sum(axis=0)
    return float(np.average(losses, weights=sample.weights))


def temper(probabilities: np.ndarray, temperature: float, *, regions: bool) -> np.ndarray:
    """Return the probabilities (channels ...) after a division of their logits.

    >>> temper(np.array([[0.2], [0.8]]), 2.0, regions=False).round(3).ravel().tolist()
    [0.333, 0.667]
    """
    if temperature == 1:
        return probabilities
    logits = logits_of(probabilities, regions=regions) / temperature
    tempered = expit(logits) if regions else np.exp(logits - logsumexp(logits, axis=0))
    return tempered.astype(probabilities.dtype)


def logits_of(probabilities: np.ndarray, *, regions: bool) -> np.ndarray:
    """Return logits with these probabilities; those of a softmax are known up to a constant."""
    exact = probabilities.astype(np.float64)
    return logit(np.clip(exact, SMALLEST, 1 - CLOSEST)) if regions else np.log(np.maximum(exact, SMALLEST))


def reliability_of(sample: VoxelSample, temperature: float, index: int, *, regions: bool) -> Reliability:
    """Compare the probability of a class with the frequency of the class.

    Args:
        sample: Voxels of cases that the model was not trained on.
        temperature: By which the logits are divided.
        index: The class, in the order of `Classes`.
        regions: Whether channels are sigmoids.

    Returns:
        The curve over the voxels whose probability is at least 0.01 at temperature 1: they are the same at every
        temperature, and the background that no one doubts does not hide errors.
    """
    channel = index if regions else index + 1
    relevant = sample.probabilities[channel] >= RELEVANT
    values = temper(sample.probabilities[:, relevant], temperature, regions=regions)[channel].astype(float)
    weights, truth = sample.weights[relevant], sample.truth[channel, relevant]
    places = np.minimum((values * BINS).astype(int), BINS - 1)
    voxels, probability, frequency = (
        np.bincount(places, weights=amount, minlength=BINS) for amount in (weights, weights * values, weights * truth)
    )
    filled = voxels > 0
    return Reliability(probability[filled] / voxels[filled], frequency[filled] / voxels[filled], voxels[filled])
