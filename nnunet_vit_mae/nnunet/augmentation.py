"""nnU-Net's training transforms, applied to a whole batch on the training device.

Whether and how strongly a sample is changed is drawn by `get_parameters` of nnU-Net's own transforms, so that
probabilities and ranges are those of the installed version of nnU-Net. Only the arithmetic is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import Tensor

from nnunet_vit_mae import batch_transforms
from nnunet_vit_mae.batch_transforms import centre_crop, resample_images, resample_labels
from nnunet_vit_mae.devices import copied, on_device
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.absence import kept_contrasts

SUPPORTED_SPATIAL = {  # settings of `SpatialTransform`, beside those of its affine maps
    "p_elastic_deform": 0,
    "random_crop": False,
    "mode_image": "bilinear",
    "mode_seg": "bilinear",
    "padding_mode_image": "zeros",
    "border_mode_seg": "constant",
    "padding_value_seg": -1,
}
Drawn = Sequence[dict[str, Any] | None]  # the parameters of each sample, None if it is not changed


@dataclass
class SegmentationBatch:
    """Images (b c z y x), segmentations (b 1 z y x), and the labels that may occur in these."""

    image: Tensor
    segmentation: Tensor
    labels: Sequence[int]
    resolutions: list[Tensor] | None = None  # the segmentation, fine to coarse, with deep supervision


def repeatable(transform: ComposeTransforms) -> ComposeTransforms:
    """Return nnU-Net's augmentation without its stopwatch, so that random seeds alone decide the result.

    nnU-Net measures which of two ways of blurring is the faster one, and they round differently.
    """
    for part in transform.transforms:
        step = part.transform if isinstance(part, RandomTransform) else part
        if isinstance(step, GaussianBlurTransform):
            step.benchmark = False
    return transform


class BatchAugmentation:
    """Augment a batch as nnU-Net's `transform` augments each sample, and keep absent contrasts absent.

    Raises `UserError` for a transform, or a setting of the spatial transform, that is not supported here.
    """

    def __init__(self, transform: ComposeTransforms, labels: Sequence[int], *, contrast_dropout: float):
        self.steps = [_Step.of(part) for part in transform.transforms]
        self.labels, self.contrast_dropout = labels, contrast_dropout

    @torch.no_grad()
    def __call__(self, image: Tensor, segmentation: Tensor) -> tuple[Tensor, Tensor | list[Tensor]]:
        """Take enlarged patches from nnU-Net's loader, and return images and targets of the patch size.

        With deep supervision there are targets for all resolutions. The device is waited for once, before it has begun.
        """
        present = image.flatten(2).any(dim=2).cpu().numpy()
        absent = torch.from_numpy(~np.stack([kept_contrasts(sample, self.contrast_dropout) for sample in present]))
        batch = SegmentationBatch(image, segmentation, self.labels)
        for step in self.steps:
            step.apply(batch)
        batch.image[copied(absent, image.device)] = 0
        return batch.image, batch.resolutions or batch.segmentation


@dataclass(frozen=True)
class _Step:
    """A transform, its copy that draws parameters, and the probability that it is applied (None: always)."""

    transform: Any
    drawing: Any
    probability: float | None

    @classmethod
    def of(cls, transform: BasicTransform) -> _Step:
        probability = None
        if isinstance(transform, RandomTransform):
            probability, transform = transform.apply_probability, transform.transform
        if type(transform) not in APPLY:
            raise UserError(
                f"nnU-Net's {type(transform).__name__} has no counterpart on the device: plan with "
                'finetuning.augmentation "loader".'
            )
        drawing = transform
        if isinstance(transform, SpatialTransform):
            other = {
                name: now for name, value in SUPPORTED_SPATIAL.items() if (now := getattr(transform, name)) != value
            }
            if other:
                raise UserError(
                    f"nnU-Net's SpatialTransform has settings without a counterpart on the device ({other}): plan with "
                    'finetuning.augmentation "loader".'
                )
            # a copy with a tiny patch: the transform itself would compute the coordinates of every voxel on the CPU
            drawing = copy(transform)
            drawing.patch_size = [1] * len(transform.patch_size)
        return cls(transform, drawing, probability)

    def apply(self, batch: SegmentationBatch) -> None:
        """Change the batch in place."""
        stub = torch.empty(()).expand(batch.image.shape[1:])  # only the shape of the image matters for drawing
        drawn = [
            self.drawing.get_parameters(image=stub)
            if self.probability is None or torch.rand(()).item() < self.probability
            else None
            for _ in batch.image
        ]
        APPLY[type(self.transform)](self.transform, batch, drawn)


# ---------- one function for each transform


def _spatial(transform: SpatialTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    patch = tuple(transform.patch_size)
    affines = {n: values["affine"] for n, values in enumerate(drawn) if values and values["affine"] is not None}
    image, labels = batch.image, batch.segmentation
    batch.image, batch.segmentation = (centre_crop(volumes, patch).clone() for volumes in (image, labels))
    if affines:
        moved = on_device([*affines], image.device)
        affine = copied(torch.from_numpy(np.stack([*affines.values()])), image.device, image.dtype)
        batch.image[moved] = resample_images(image[moved], affine, patch)
        batch.segmentation[moved] = resample_labels(labels[moved], affine, patch, batch.labels)


def _slices(transform: Convert3DTo2DTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    batch.image, batch.segmentation = batch.image.flatten(1, 2), batch.segmentation.flatten(1, 2)


def _volumes(transform: Convert2DTo3DTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    depth = batch.segmentation.shape[1]  # the segmentation has one channel
    batch.image, batch.segmentation = (
        batch.image.unflatten(1, (-1, depth)),
        batch.segmentation.unflatten(1, (-1, depth)),
    )


def _noise(transform: GaussianNoiseTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, batch_transforms.noise, "sigmas", where="apply_idx")


def _blur(transform: GaussianBlurTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, batch_transforms.blur, "sigmas")


def _brightness(transform: MultiplicativeBrightnessTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, batch_transforms.brightness, "multipliers")


def _contrast(transform: ContrastTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    function = partial(batch_transforms.contrast, preserve_range=transform.preserve_range)
    _change(batch, drawn, function, "multipliers")


def _low_resolution(transform: SimulateLowResolutionTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, batch_transforms.lower_resolution, "scales")


def _gamma(transform: GammaTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, batch_transforms.gamma, "gamma", "invert_image", "retain_stats")


def _mirror(transform: MirrorTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    for sample, values in enumerate(drawn):
        if values and values["axes"]:
            axes = [axis + 1 for axis in values["axes"]]
            batch.image[sample] = batch.image[sample].flip(axes)
            batch.segmentation[sample] = batch.segmentation[sample].flip(axes)


def _mask(transform: MaskImageTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    outside = batch.segmentation[:, transform.channel_idx_in_seg, None] < 0
    channels = on_device(transform.apply_to_channels, batch.image.device)
    batch.image[:, channels] = batch.image[:, channels].masked_fill(outside, transform.set_outside_to)


def _remove_label(transform: RemoveLabelTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    batch.segmentation[batch.segmentation == transform.label_value] = transform.set_to


def _regions(transform: ConvertSegmentationToRegionsTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    labels = batch.segmentation[:, transform.channel_in_seg]
    regions = [copied(region, labels.device, labels.dtype) for region in transform.regions]
    batch.segmentation = torch.stack([torch.isin(labels, region) for region in regions], dim=1)


def _resolutions(transform: DownsampleSegForDSTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    samples = [transform(segmentation=sample)["segmentation"] for sample in batch.segmentation]
    batch.resolutions = [torch.stack(parts) for parts in zip(*samples, strict=True)]


def _change(
    batch: SegmentationBatch,
    drawn: Drawn,
    function: Callable[..., Tensor],
    *names: str,
    where: str = "apply_to_channel",
) -> None:
    """Call `function` with all drawn channels as rows, and with the parameters of these names for each row."""
    rows: list[tuple[int, int]] = []
    columns: list[list[Tensor]] = [[] for _ in names]
    for sample, parameters in enumerate(drawn):
        channels = [] if parameters is None else _channel_numbers(parameters[where])
        if parameters is None or not channels:
            continue
        rows += [(sample, channel) for channel in channels]
        for column, name in zip(columns, names, strict=True):
            values = torch.as_tensor(parameters[name])  # one for each channel, or one for all
            column.append(values if values.ndim else values.expand(len(channels)))
    if rows:
        place = tuple(on_device(numbers, batch.image.device) for numbers in zip(*rows, strict=True))
        batch.image[place] = function(batch.image[place], *map(torch.cat, columns))


def _channel_numbers(channels: Any) -> list[int]:
    """Return the numbers of channels that nnU-Net gives as numbers or as a mask."""
    chosen = torch.as_tensor(channels)
    return (chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen).tolist()


APPLY: Mapping[type, Callable[[Any, SegmentationBatch, Drawn], None]] = {
    Convert3DTo2DTransform: _slices,
    SpatialTransform: _spatial,
    Convert2DTo3DTransform: _volumes,
    GaussianNoiseTransform: _noise,
    GaussianBlurTransform: _blur,
    MultiplicativeBrightnessTransform: _brightness,
    ContrastTransform: _contrast,
    SimulateLowResolutionTransform: _low_resolution,
    GammaTransform: _gamma,
    MirrorTransform: _mirror,
    MaskImageTransform: _mask,
    RemoveLabelTransform: _remove_label,
    ConvertSegmentationToRegionsTransform: _regions,
    DownsampleSegForDSTransform: _resolutions,
}
