"""nnU-Net's augmentation for a whole batch at once, on the training device.

nnU-Net augments one volume after another on the CPU, which is too slow to keep a GPU busy with a vision transformer.
Each function does what the transform of batchgeneratorsv2 that it names does with a single volume. Those that change
intensities work on `rows`, each of which is one channel of one volume (k z y x, or k y x) with parameters of its own,
drawn by nnU-Net's transform.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

from nnunet_vit_mae.devices import copied, on_device

OUTSIDE = -1  # nnU-Net's label of voxels outside of the image
SCORE = 1000  # scale of a label's score, so that near ties become ties in half precision
EPSILON = 1e-7


def centre_crop(volumes: Shaped[Tensor, "b c *enlarged"], patch: Sequence[int]) -> Shaped[Tensor, "b c *patch"]:
    """Crop enlarged patches to their centre, as `SpatialTransform` does if it neither rotates nor scales."""
    for axis, size in enumerate(patch, 2):
        volumes = volumes.narrow(axis, volumes.shape[axis] // 2 - size // 2, size)
    return volumes


def resample_images(
    volumes: Float[Tensor, "b c *enlarged"], affine: Float[Tensor, "b d d"], patch: Sequence[int]
) -> Float[Tensor, "b c *patch"]:
    """Apply `SpatialTransform` to images; `affine` maps voxels of the patch (z y x from the centre) to the volume."""
    return functional.grid_sample(volumes, _grid(volumes, affine, patch), align_corners=False)


def resample_labels(
    segmentation: Shaped[Tensor, "b c *enlarged"],
    affine: Float[Tensor, "b d d"],
    patch: Sequence[int],
    labels: Sequence[int],
) -> Shaped[Tensor, "b c *patch"]:
    """Apply `SpatialTransform` to labels; `labels` are all that may occur.

    Each voxel gets the label whose interpolated mask is largest, and in a tie that of the nearest voxel. Voxels outside
    of the volume get `OUTSIDE`. Only one mask at a time is in memory.
    """
    source = segmentation.float()
    grid = _grid(source, affine, patch)
    nearest = functional.grid_sample(source - OUTSIDE, grid, mode="nearest", align_corners=False) + OUTSIDE
    result = torch.full_like(nearest, OUTSIDE)
    best = torch.full_like(nearest, -torch.inf, dtype=torch.float16)
    nearest_score = best.clone()
    for label in sorted({OUTSIDE, *labels}):
        padding = float(label == OUTSIDE)  # value of the mask outside of the volume, where grid_sample pads with 0
        mask = (source == label).float().sub_(padding).mul_(SCORE)
        score = functional.grid_sample(mask, grid, align_corners=False).add_(padding * SCORE).half()
        nearest_score = torch.where(nearest == label, score, nearest_score)
        result = torch.where(score > best, label, result)
        best = torch.maximum(score, best)
    return torch.where(nearest_score == best, nearest, result).to(segmentation.dtype)


def noise(rows: Float[Tensor, "k *patch"], sigmas: Float[Tensor, " k"]) -> Float[Tensor, "k *patch"]:
    """Apply `GaussianNoiseTransform`; the variance that it draws is used as a standard deviation, as there."""
    return rows + torch.randn_like(rows) * _column(sigmas, rows)


def brightness(rows: Float[Tensor, "k *patch"], factors: Float[Tensor, " k"]) -> Float[Tensor, "k *patch"]:
    """Apply `MultiplicativeBrightnessTransform`."""
    return rows * _column(factors, rows)


def blur(rows: Float[Tensor, "k *patch"], sigmas: Float[Tensor, "k d"]) -> Float[Tensor, "k *patch"]:
    """Apply `GaussianBlurTransform`, with a sigma (voxels) for each axis and reflection at the border."""
    for axis in range(1, rows.ndim):
        kernels = torch.stack(_padded([_kernel(sigma) for sigma in sigmas[:, axis - 1].tolist()]), dim=1)
        weights = copied(kernels, rows.device, rows.dtype)
        reach = len(weights) // 2
        padding = [0, 0] * (rows.ndim - 1 - axis) + [reach, reach] + [0, 0] * (axis - 1)
        padded = functional.pad(rows[None], padding, mode="reflect")[0]
        size = rows.shape[axis]
        rows = torch.zeros_like(rows)
        for offset, weight in enumerate(weights):  # a convolution whose kernel differs between rows
            rows.addcmul_(padded.narrow(axis, offset, size), _column(weight, rows))
    return rows


def contrast(
    rows: Float[Tensor, "k *patch"], factors: Float[Tensor, " k"], *, preserve_range: bool
) -> Float[Tensor, "k *patch"]:
    """Apply `ContrastTransform`: scale about the mean, and clip to the original range if `preserve_range`."""
    mean, low, high = rows.flatten(1).mean(1), rows.flatten(1).amin(1), rows.flatten(1).amax(1)
    changed = (rows - _column(mean, rows)) * _column(factors, rows) + _column(mean, rows)
    return changed.clamp(_column(low, rows), _column(high, rows)) if preserve_range else changed


def gamma(
    rows: Float[Tensor, "k *patch"],
    exponents: Float[Tensor, " k"],
    inverted: Bool[Tensor, " k"],
    retain_stats: Bool[Tensor, " k"],
) -> Float[Tensor, "k *patch"]:
    """Apply `GammaTransform`: a power of the rescaled values; some rows are inverted, some keep mean and deviation."""
    sign = _column(1 - 2 * inverted.float(), rows)
    rows = rows * sign
    low, high = _column(rows.flatten(1).amin(1), rows), _column(rows.flatten(1).amax(1), rows)
    rescaled = (rows - low) / (high - low).clamp_min(EPSILON)
    changed = rescaled ** _column(exponents, rows) * (high - low) + low
    (mean, deviation), (new_mean, new_deviation) = _statistics(rows), _statistics(changed)
    restored = (changed - new_mean) * (deviation / new_deviation.clamp_min(EPSILON)) + mean
    return torch.where(_column(retain_stats, rows) > 0, restored, changed) * sign


def lower_resolution(rows: Float[Tensor, "k *patch"], scales: Float[Tensor, "k d"]) -> Float[Tensor, "k *patch"]:
    """Apply `SimulateLowResolutionTransform`: downsample to the nearest voxels, then upsample linearly."""
    mode = {2: "bilinear", 3: "trilinear"}[rows.ndim - 1]
    shape = list(rows.shape[1:])
    blurred = []
    for row, scale in zip(rows, scales.tolist(), strict=True):
        smaller = [round(size * factor) for size, factor in zip(shape, scale, strict=True)]
        smaller_row = functional.interpolate(row[None, None], smaller, mode="nearest-exact")
        blurred.append(functional.interpolate(smaller_row, shape, mode=mode)[0, 0])
    return torch.stack(blurred)


def _grid(volumes: Tensor, affine: Tensor, patch: Sequence[int]) -> Tensor:
    """Return the position of each voxel of the patch in the volume as `grid_sample` wants it: x first, from -1 to 1."""
    half_patch = on_device(patch[::-1], affine.device) / 2
    half_volume = on_device(volumes.shape[:1:-1], affine.device) / 2
    linear = affine.flip(1, 2) * half_patch / half_volume[:, None]
    theta = functional.pad(linear, (0, 1)).to(volumes)  # without translation
    return functional.affine_grid(theta, [len(volumes), 1, *patch], align_corners=False)


def _kernel(sigma: float) -> Tensor:
    """Return an odd number of Gaussian weights that cover about six sigma."""
    width = 6 * sigma + 0.5
    size = round(width)
    if size % 2 == 0:
        size += 1 if width >= size else -1
    places = torch.arange(size) - size // 2
    weights = torch.exp(-0.5 * (places / sigma) ** 2)
    return weights / weights.sum()


def _padded(kernels: Sequence[Tensor]) -> list[Tensor]:
    """Pad kernels with zeros on both sides to the length of the longest."""
    longest = max(map(len, kernels))
    return [functional.pad(kernel, [(longest - len(kernel)) // 2] * 2) for kernel in kernels]


def _column(values: Tensor, rows: Tensor) -> Tensor:
    """Reshape one value for each row, so that it is broadcast over the voxels."""
    return copied(values, rows.device, rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    return _column(rows.flatten(1).mean(1), rows), _column(rows.flatten(1).std(1), rows)
