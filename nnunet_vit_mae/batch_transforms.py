"""nnU-Net's augmentation for a whole batch at once, on the device that trains.

nnU-Net augments one volume after another on the CPU, which starves a vision transformer on a GPU. Each function here
gives what the transform of batchgeneratorsv2 that it names gives for each volume alone. They work on `rows`: one
channel of one volume each (k z y x, or k y x), with one parameter a row. nnU-Net's own transforms draw these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

OUTSIDE = -1  # nnU-Net's label of voxels that no image covers
SCORE = 1000  # scale of a label's score: half precision then makes ties of what nearly is one
EPSILON = 1e-7


def centre_crop(volumes: Shaped[Tensor, "b c *enlarged"], patch: Sequence[int]) -> Shaped[Tensor, "b c *patch"]:
    """The middle of enlarged patches, where `SpatialTransform` neither turns nor scales."""
    for axis, size in enumerate(patch, 2):
        volumes = volumes.narrow(axis, volumes.shape[axis] // 2 - size // 2, size)
    return volumes


def resample_images(
    volumes: Float[Tensor, "b c *enlarged"], affine: Float[Tensor, "b d d"], patch: Sequence[int]
) -> Float[Tensor, "b c *patch"]:
    """`SpatialTransform` of images: `affine` takes voxels of the patch (z y x from the centre) to the volume's."""
    return functional.grid_sample(volumes, _grid(volumes, affine, patch), align_corners=False)


def resample_labels(
    segmentation: Shaped[Tensor, "b c *enlarged"],
    affine: Float[Tensor, "b d d"],
    patch: Sequence[int],
    labels: Sequence[int],
) -> Shaped[Tensor, "b c *patch"]:
    """`SpatialTransform` of labels: the one whose mask, interpolated, is largest; of equals that of the nearest voxel.

    `labels` are all that may occur; beyond the volume is `OUTSIDE`. One mask at a time is in memory.
    """
    source = segmentation.float()
    grid = _grid(source, affine, patch)
    nearest = functional.grid_sample(source - OUTSIDE, grid, mode="nearest", align_corners=False) + OUTSIDE
    found = torch.full_like(nearest, OUTSIDE)
    best = torch.full_like(nearest, -torch.inf, dtype=torch.float16)
    of_nearest = best.clone()
    for label in sorted({OUTSIDE, *labels}):
        beyond = float(label == OUTSIDE)  # of the mask, beyond the volume, where sampling finds zeros
        mask = (source == label).float().sub_(beyond).mul_(SCORE)
        score = functional.grid_sample(mask, grid, align_corners=False).add_(beyond * SCORE).half()
        of_nearest = torch.where(nearest == label, score, of_nearest)
        found = torch.where(score > best, label, found)
        best = torch.maximum(score, best)
    return torch.where(of_nearest == best, nearest, found).to(segmentation.dtype)


def noise(rows: Float[Tensor, "k *patch"], sigmas: Float[Tensor, " k"]) -> Float[Tensor, "k *patch"]:
    """`GaussianNoiseTransform`; it calls a variance what is a standard deviation."""
    return rows + torch.randn_like(rows) * _column(sigmas, rows)


def brightness(rows: Float[Tensor, "k *patch"], factors: Float[Tensor, " k"]) -> Float[Tensor, "k *patch"]:
    """`MultiplicativeBrightnessTransform`."""
    return rows * _column(factors, rows)


def blur(rows: Float[Tensor, "k *patch"], sigmas: Float[Tensor, "k d"]) -> Float[Tensor, "k *patch"]:
    """`GaussianBlurTransform`: along each axis with its own sigma (voxels), mirrored at the border."""
    for axis in range(1, rows.ndim):
        weights = torch.stack(_padded([_kernel(float(sigma)) for sigma in sigmas[:, axis - 1]]), dim=1).to(rows)
        reach = len(weights) // 2
        padding = [0, 0] * (rows.ndim - 1 - axis) + [reach, reach] + [0, 0] * (axis - 1)
        padded = functional.pad(rows[None], padding, mode="reflect")[0]
        size = rows.shape[axis]
        rows = torch.zeros_like(rows)
        for offset, weight in enumerate(weights):  # a convolution with a kernel for each row
            rows.addcmul_(padded.narrow(axis, offset, size), _column(weight, rows))
    return rows


def contrast(
    rows: Float[Tensor, "k *patch"], factors: Float[Tensor, " k"], *, preserve_range: bool
) -> Float[Tensor, "k *patch"]:
    """`ContrastTransform`: away from the mean or towards it, within the range that was there."""
    mean, low, high = rows.flatten(1).mean(1), rows.flatten(1).amin(1), rows.flatten(1).amax(1)
    changed = (rows - _column(mean, rows)) * _column(factors, rows) + _column(mean, rows)
    return changed.clamp(_column(low, rows), _column(high, rows)) if preserve_range else changed


def gamma(
    rows: Float[Tensor, "k *patch"],
    exponents: Float[Tensor, " k"],
    inverted: Bool[Tensor, " k"],
    retain_stats: Bool[Tensor, " k"],
) -> Float[Tensor, "k *patch"]:
    """`GammaTransform`: a power of the values between 0 and 1, on inverted values or not, mean and deviation kept."""
    sign = _column(1 - 2 * inverted.float(), rows)
    rows = rows * sign
    low, high = _column(rows.flatten(1).amin(1), rows), _column(rows.flatten(1).amax(1), rows)
    share = (rows - low) / (high - low).clamp_min(EPSILON)
    changed = share ** _column(exponents, rows) * (high - low) + low
    (mean, deviation), (new_mean, new_deviation) = _statistics(rows), _statistics(changed)
    restored = (changed - new_mean) * (deviation / new_deviation.clamp_min(EPSILON)) + mean
    return torch.where(_column(retain_stats, rows) > 0, restored, changed) * sign


def lower_resolution(rows: Float[Tensor, "k *patch"], scales: Float[Tensor, "k d"]) -> Float[Tensor, "k *patch"]:
    """`SimulateLowResolutionTransform`: fewer voxels by the nearest, then linearly back; each row has its own size."""
    mode = {2: "bilinear", 3: "trilinear"}[rows.ndim - 1]
    shape = list(rows.shape[1:])
    done = []
    for row, scale in zip(rows, scales.tolist(), strict=True):
        smaller = [round(size * share) for size, share in zip(shape, scale, strict=True)]
        thinned = functional.interpolate(row[None, None], smaller, mode="nearest-exact")
        done.append(functional.interpolate(thinned, shape, mode=mode)[0, 0])
    return torch.stack(done)


def _grid(volumes: Tensor, affine: Tensor, patch: Sequence[int]) -> Tensor:
    """Where each voxel of the patch is in the volume, as `grid_sample` counts: x first, from -1 to 1."""
    half_patch = torch.tensor(patch[::-1]).to(affine) / 2
    half_volume = torch.tensor(volumes.shape[:1:-1]).to(affine) / 2
    linear = affine.flip(1, 2) * half_patch / half_volume[:, None]
    theta = functional.pad(linear, (0, 1)).to(volumes)  # no shift
    return functional.affine_grid(theta, [len(volumes), 1, *patch], align_corners=False)


def _kernel(sigma: float) -> Tensor:
    """Gaussian weights over about six sigma, an odd number of them."""
    wanted = 6 * sigma + 0.5
    size = round(wanted)
    if size % 2 == 0:
        size += 1 if wanted >= size else -1
    places = torch.arange(size) - size // 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    return weights / weights.sum()


def _padded(kernels: Sequence[Tensor]) -> list[Tensor]:
    """All as long as the longest, with zeros on both sides."""
    longest = max(map(len, kernels))
    return [functional.pad(kernel, [(longest - len(kernel)) // 2] * 2) for kernel in kernels]


def _column(values: Tensor, rows: Tensor) -> Tensor:
    """One value for each row, to be broadcast over its voxels."""
    return values.to(rows).reshape(-1, *[1] * (rows.ndim - 1))


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    return _column(rows.flatten(1).mean(1), rows), _column(rows.flatten(1).std(1), rows)
