"""What a shift of each class's logit makes of probabilities: other probabilities, and another segmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import logit

from nnunet_vit_mae.calibration.cases import Classes


def segment(probabilities: np.ndarray, classes: Classes, shifts: Sequence[float]) -> list[np.ndarray]:
    """Segment probabilities with shifted logits, as nnU-Net does.

    Args:
        probabilities: nnU-Net's probabilities of a volume or of some voxels (channels ...).
        classes: The classes or regions.
        shifts: The shift of each class's logit.

    Returns:
        A boolean mask (...) of each class or region. A region holds whatever label of it was painted last.

    Example:
        >>> probabilities = np.array([[[[0.6, 0.9]]], [[[0.4, 0.1]]]])
        >>> segment(probabilities, Classes(("lesion",), ((1,),)), [1.0])[0].tolist()
        [[[True, False]]]
    """
    if classes.regions:
        found = [log_odds(p) > -shift for p, shift in zip(probabilities, shifts, strict=True)]
        labels = painted_labels(found, classes)
        return [np.isin(labels, values) for values in classes.values]
    winner = shifted_logs(probabilities, shifts).argmax(axis=0)
    return [winner == channel + 1 for channel in range(len(shifts))]


def shift_probabilities(probabilities: np.ndarray, classes: Classes, shifts: Sequence[float]) -> np.ndarray:
    """Return the probabilities (channels z y x) after a shift of each class's logit.

    >>> both = np.array([0.75, 0.25]).reshape(2, 1, 1, 1)
    >>> shift_probabilities(both, Classes(("lesion",), ((1,),)), [np.log(3)]).ravel().round(2).tolist()
    [0.5, 0.5]
    """
    factors = np.exp([*shifts] if classes.regions else [0.0, *shifts]).reshape(-1, 1, 1, 1)
    shifted = probabilities * factors
    total = shifted + (1 - probabilities) if classes.regions else shifted.sum(axis=0)
    return (shifted / total).astype(np.float32)


def painted_labels(found: Sequence[np.ndarray], classes: Classes) -> np.ndarray:
    """Return the label of each voxel, given where each region is found; later regions cover earlier ones."""
    labels = np.zeros(found[0].shape, np.int64)
    for mask, label in zip(found, classes.painted, strict=True):
        labels[mask] = label
    return labels


def shifted_logs(probabilities: np.ndarray, shifts: Sequence[float]) -> np.ndarray:
    """Return the logs of a softmax (channels ...), of which those of the foreground are shifted."""
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities.astype(np.float64))
    logs[1:] += np.reshape(shifts, (-1, *[1] * (logs.ndim - 1)))
    return logs


def log_odds(probabilities: np.ndarray) -> np.ndarray:
    """Return the logits of probabilities."""
    return logit(probabilities.astype(np.float64))  # in which 1 - p of a float32 close to 1 is exact
