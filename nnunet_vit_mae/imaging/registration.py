"""Rigid and affine registration of two volumes by mutual information, with reproducible results.

Mattes mutual information (IEEE Trans Med Imaging 2003, doi 10.1109/TMI.2003.809072) as implemented in ITK, from coarse
to fine. It does not require equal grey values, so that a CT can be registered to a template from another scanner, or a
T1 to a FLAIR. Points are x y z in mm in ITK's physical space (left, posterior, superior), arrays are z y x.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import SimpleITK as sitk

RESOLUTION_LEVELS = (20, 45, 90)  # average voxels along a side of the reference: 9, 4 and 2 mm for a head
SAMPLES = 20_000  # voxels that the metric samples at each level
BINS = 32
TILT = math.radians(20)  # rotation of the starts around each axis, about the capture range of the optimiser
SCALES = (0.6, 1.6)  # beyond these relative sizes of two heads, the registration has failed


class RegistrationError(ValueError):
    """Two volumes could not be registered; the message says why, without a full stop."""


@dataclass(frozen=True)
class Similarity:
    """Normalised correlation (-1 to 1) and mutual information (0 to 1) of two volumes where they overlap."""

    correlation: float
    mutual_information: float


@dataclass(frozen=True)
class Alignment:
    """The transform from points of the reference to points of the moving volume (mm), and the similarity after it."""

    transform: sitk.Transform
    similarity: Similarity


@contextmanager
def single_itk_thread() -> Iterator[None]:
    """Let ITK use one thread in the block: sums over several threads differ in their last digits between runs."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def register(reference: sitk.Image, moving: sitk.Image, *, affine: bool) -> Alignment:
    """Register a volume to a reference; neither image is changed.

    Args:
        reference: The fixed volume.
        moving: The volume in which the points of the reference are located.
        affine: Whether scaling and shearing are allowed after the rigid registration.

    Returns:
        The transform from reference to moving volume, and the similarity after it.

    Raises:
        RegistrationError: If the volumes do not overlap, are constant, or match only with an implausible scale.
    """
    reference, moving = _grey_values(reference), _grey_values(moving)
    levels = _levels(reference)
    try:
        with single_itk_thread():
            pairs = [(_at_resolution(reference, mm), _at_resolution(moving, mm), mm) for mm in levels]
            rigid = _best_rigid(*pairs[0])
            for fixed, other, mm in pairs[1:2] if affine else pairs[1:]:
                _optimise(fixed, other, rigid, mm)
            transform: sitk.Transform = rigid
            if affine:
                transform = sitk.AffineTransform(3)
                transform.SetMatrix(rigid.GetMatrix())
                transform.SetTranslation(rigid.GetTranslation())
                transform.SetCenter(rigid.GetCenter())
                for fixed, other, mm in pairs[-2:]:
                    _optimise(fixed, other, transform, mm)
            alignment = Alignment(transform, similarity(pairs[-1][0], pairs[-1][1], transform))
    except RuntimeError:  # from ITK, whose message is about its own sources
        raise RegistrationError("the registration lost the overlap with the template") from None
    if not SCALES[0] < scale(transform) < SCALES[1]:
        raise RegistrationError(f"the registration failed, it scaled the template by {scale(transform):.2f}")
    return alignment


def similarity(reference: sitk.Image, moving: sitk.Image, transform: sitk.Transform) -> Similarity:
    """Compare two registered volumes.

    Args:
        reference: The fixed volume, on whose voxels the comparison is made.
        moving: The other volume.
        transform: Maps points of `reference` to points of `moving` (mm).

    Returns:
        The similarity in the overlap; 0 if a volume is constant there.

    Raises:
        RegistrationError: If fewer than 64 voxels overlap.
    """
    ones = sitk.Image(moving.GetSize(), sitk.sitkUInt8) + 1
    ones.CopyInformation(moving)
    inside = sitk.GetArrayFromImage(sitk.Resample(ones, reference, transform, sitk.sitkNearestNeighbor, 0)) > 0
    if inside.sum() < 64:
        raise RegistrationError("it does not overlap with the template")
    moved = sitk.Resample(sitk.Cast(moving, sitk.sitkFloat32), reference, transform, sitk.sitkLinear, 0)
    a, b = (sitk.GetArrayFromImage(image)[inside].astype(np.float64) for image in (reference, moved))
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Similarity(0.0, 0.0)
    return Similarity(float(np.corrcoef(a, b)[0, 1]), _mutual_information(a, b))


def resampled(image: sitk.Image, grid: sitk.Image, transform: sitk.Transform, *, label: bool) -> sitk.Image:
    """Resample an image to the grid of another one: nearest neighbour for labels, else linear in float32."""
    if label:
        return sitk.Resample(image, grid, transform, sitk.sitkNearestNeighbor, 0)
    lowest = float(sitk.GetArrayViewFromImage(image).min())  # fills what lies outside the scan, as air does
    return sitk.Resample(image, grid, transform, sitk.sitkLinear, lowest, sitk.sitkFloat32)


def scale(transform: sitk.Transform) -> float:
    """Return the scale of a linear transform, averaged over the axes (geometric mean).

    Example:
        >>> round(scale(sitk.ScaleTransform(3, (1.0, 2.0, 4.0))), 6)
        2.0
    """
    return abs(float(np.linalg.det(_matrix(transform)))) ** (1 / 3)


def rotation_degrees(transform: sitk.Transform) -> float:
    """Return the rotation angle of a linear transform in degrees, without scales and shears (polar decomposition).

    Example:
        >>> round(rotation_degrees(sitk.Euler3DTransform((0.0, 0.0, 0.0), 0.0, 0.0, math.pi / 6)), 6)
        30.0
    """
    left, _, right = np.linalg.svd(_matrix(transform))
    return math.degrees(math.acos(np.clip((np.trace(left @ right) - 1) / 2, -1, 1)))


def map_points(transform: sitk.Transform, points: np.ndarray) -> np.ndarray:
    """Map points through a linear transform, all at once.

    Args:
        transform: A linear transform.
        points: Coordinates (n, 3; x y z in mm).

    Returns:
        The mapped points in the same layout.

    Example:
        >>> map_points(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), np.zeros((1, 3))).tolist()
        [[1.0, 2.0, 3.0]]
    """
    return points @ _matrix(transform).T + np.array(transform.TransformPoint((0.0, 0.0, 0.0)))


def _matrix(transform: sitk.Transform) -> np.ndarray:
    origin = np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    return np.stack([np.array(transform.TransformPoint(axis)) - origin for axis in np.eye(3).tolist()], axis=1)


def _grey_values(image: sitk.Image) -> sitk.Image:
    """Clip outliers: with a few bright voxels of metal, all tissue would fall into one bin of the histogram."""
    array = np.nan_to_num(sitk.GetArrayFromImage(image).astype(np.float32))
    low, high = np.percentile(array, (0.1, 99.8))
    if high <= low:
        low, high = float(array.min()), float(array.max())
    if high <= low:
        raise RegistrationError("it has only one grey value")
    clipped = sitk.GetImageFromArray(np.clip(array, low, high))
    clipped.CopyInformation(image)
    return clipped


def _levels(reference: sitk.Image) -> list[float]:
    """Return voxel sides in mm from coarse to fine, none finer than the reference itself."""
    sides = [size * mm for size, mm in zip(reference.GetSize(), reference.GetSpacing(), strict=True)]
    side = math.prod(sides) ** (1 / 3)
    finest = math.prod(reference.GetSpacing()) ** (1 / 3)
    return sorted({max(side / level, finest) for level in RESOLUTION_LEVELS}, reverse=True)


def _at_resolution(image: sitk.Image, mm: float) -> sitk.Image:
    """Smooth and subsample each axis to voxels of about `mm`; thick slices stay unchanged."""
    spacing, size = np.array(image.GetSpacing()), np.array(image.GetSize())
    factors = np.clip(np.floor(mm / spacing + 0.01), 1, np.maximum(1, size // 4)).astype(int)
    sigma = np.where(factors > 1, 0.4 * factors * spacing, 0)  # mm
    if sigma.any():
        image = sitk.DiscreteGaussian(image, (sigma**2).tolist(), 32, 0.01, True)
    return sitk.Shrink(image, factors.tolist())


def _metric(fixed: sitk.Image) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetNumberOfThreads(1)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetInterpolator(sitk.sitkLinear)
    if fixed.GetNumberOfPixels() > SAMPLES:
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(SAMPLES / fixed.GetNumberOfPixels(), seed=1)
    return method


def _optimise(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Transform, mm: float) -> float:
    """Optimise `transform` in place, in steps that shrink from `mm`, and return the metric (lower is better)."""
    method = _metric(fixed)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=1.0,  # estimated at each step, so that voxels first move by `mm` under rotation and translation
        minStep=1e-5,
        numberOfIterations=60,
        relaxationFactor=0.6,
        estimateLearningRate=method.EachIteration,
        maximumStepSizeInPhysicalUnits=mm,
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return method.GetMetricValue()


def _best_rigid(fixed: sitk.Image, moving: sitk.Image, mm: float) -> sitk.Euler3DTransform:
    """Optimise the three best starts and return the best result; scans may lie anywhere in space, and be tilted."""
    rated = []
    for number, start in enumerate(_starts(fixed, moving)):
        method = _metric(fixed)
        method.SetInitialTransform(start)
        try:
            rated.append((method.MetricEvaluate(fixed, moving), number, start))
        except RuntimeError:  # no overlap from this start
            continue
    if not rated:
        raise RegistrationError("it does not overlap with the template")
    optimised = [(_optimise(fixed, moving, start, mm), number, start) for _, number, start in sorted(rated)[:3]]
    return min(optimised)[2]


def _starts(fixed: sitk.Image, moving: sitk.Image) -> Iterator[sitk.Euler3DTransform]:
    """Yield starts by header, by centre and by centre of mass, each upright and rotated around every axis."""
    centre = _centre(fixed)
    shifts = [np.zeros(3), _centre(moving) - centre, _centre_of_mass(moving) - _centre_of_mass(fixed)]
    turns = [(0.0, 0.0, 0.0)]
    turns += [tuple(sign * TILT * axis) for axis, sign in product(np.eye(3), (-1, 1))]
    for shift, turn in product(shifts, turns):
        start = sitk.Euler3DTransform()
        start.SetCenter(centre.tolist())
        start.SetRotation(*turn)
        start.SetTranslation(shift.tolist())
        yield start


def _centre(image: sitk.Image) -> np.ndarray:
    return np.array(image.TransformContinuousIndexToPhysicalPoint([(size - 1) / 2 for size in image.GetSize()]))


def _centre_of_mass(image: sitk.Image) -> np.ndarray:
    array = sitk.GetArrayFromImage(image).astype(np.float64)
    array -= array.min()
    index = [(array * axis).sum() / array.sum() for axis in np.indices(array.shape, sparse=True)]
    return np.array(image.TransformContinuousIndexToPhysicalPoint([float(i) for i in index[::-1]]))


def _mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Return twice the mutual information over the sum of the entropies: 0 if independent, 1 if equal."""
    joint = np.histogram2d(a, b, BINS)[0] / a.size
    both, each = _entropy(joint), _entropy(joint.sum(0)) + _entropy(joint.sum(1))
    return 2 * (each - both) / each if each > 0 else 0.0


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
