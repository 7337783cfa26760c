"""nnU-Net's own training transforms, drawn by nnU-Net and applied to a batch on the device that trains.

Whether and how strongly a sample is changed is drawn by the `get_parameters` of nnU-Net's transforms themselves, so
that probabilities and ranges are theirs, whatever a version of nnU-Net makes them. Only the arithmetic is ours.
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
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTransform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from torch import Tensor

from nnunet_vit_mae import batch_transforms as augmentation
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.nnunet.absence import kept_contrasts

SPATIAL = {  # what ours does, beside the affine maps that are drawn
    "p_elastic_deform": 0,
    "random_crop": False,
    "mode_image": "bilinear",
    "mode_seg": "bilinear",
    "padding_mode_image": "zeros",
    "border_mode_seg": "constant",
    "padding_value_seg": -1,
}
Drawn = Sequence[dict[str, Any] | None]  # parameters for each sample; None: it stays as it is


@dataclass
class SegmentationBatch:
    """Images (b c z y x), segmentations (b 1 z y x), and the labels that may be in these."""

    image: Tensor
    segmentation: Tensor
    labels: Sequence[int]


class BatchAugmentation:
    """Augments a batch as nnU-Net's `transform` augments each of its samples; absent contrasts stay absent.

    Raises `UserError` when nnU-Net has a transform, or a setting of its spatial one, that is not known here.
    """

    def __init__(self, transform: ComposeTransforms, labels: Sequence[int], *, contrast_dropout: float):
        self.steps = [_Step.of(one) for one in transform.transforms]
        self.labels, self.contrast_dropout = labels, contrast_dropout

    @torch.no_grad()
    def __call__(self, image: Tensor, segmentation: Tensor) -> tuple[Tensor, Tensor]:
        """Enlarged patches as nnU-Net's loader cuts them in; images and targets of the patch's size out."""
        present = image.flatten(2).any(dim=2).cpu().numpy()
        absent = torch.from_numpy(~np.stack([kept_contrasts(sample, self.contrast_dropout) for sample in present]))
        batch = SegmentationBatch(image, segmentation, self.labels)
        for step in self.steps:
            step.apply(batch)
        batch.image[absent.to(image.device)] = 0
        return batch.image, batch.segmentation


@dataclass(frozen=True)
class _Step:
    """A transform, its twin that only draws parameters, and the probability of a sample to meet it (None: always)."""

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
                f"nnU-Net's {type(transform).__name__} has no counterpart for a batch: plan with "
                'finetuning.augmentation "loader".'
            )
        drawing = transform
        if isinstance(transform, SpatialTransform):
            other = {name: now for name, does in SPATIAL.items() if (now := getattr(transform, name)) != does}
            if other:
                raise UserError(
                    f"nnU-Net's SpatialTransform has settings without a counterpart for a batch ({other}): plan with "
                    'finetuning.augmentation "loader".'
                )
            # the twin, for the transform itself would compute the place of every voxel, on the CPU
            drawing = copy(transform)
            drawing.patch_size = [1] * len(transform.patch_size)
        return cls(transform, drawing, probability)

    def apply(self, batch: SegmentationBatch) -> None:
        """Change the batch in place."""
        stub = torch.empty(()).expand(batch.image.shape[1:])  # of an image they draw for, only the shape counts
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
    affines = {n: found["affine"] for n, found in enumerate(drawn) if found and found["affine"] is not None}
    image, labels = batch.image, batch.segmentation
    # a copy: these views are written to
    batch.image, batch.segmentation = (augmentation.centre_crop(one, patch).clone() for one in (image, labels))
    if affines:
        moved, affine = list(affines), torch.from_numpy(np.stack([*affines.values()])).to(image)
        batch.image[moved] = augmentation.resample_images(image[moved], affine, patch)
        batch.segmentation[moved] = augmentation.resample_labels(labels[moved], affine, patch, batch.labels)


def _slices(transform: Convert3DTo2DTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    batch.image, batch.segmentation = batch.image.flatten(1, 2), batch.segmentation.flatten(1, 2)


def _volumes(transform: Convert2DTo3DTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    depth = batch.segmentation.shape[1]  # it had one channel
    batch.image, batch.segmentation = (one.unflatten(1, (-1, depth)) for one in (batch.image, batch.segmentation))


def _noise(transform: GaussianNoiseTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, augmentation.noise, "sigmas", where="apply_idx")


def _blur(transform: GaussianBlurTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, augmentation.blur, "sigmas")


def _brightness(transform: MultiplicativeBrightnessTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, augmentation.brightness, "multipliers")


def _contrast(transform: ContrastTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    function = partial(augmentation.contrast, preserve_range=transform.preserve_range)
    _change(batch, drawn, function, "multipliers")


def _low_resolution(transform: SimulateLowResolutionTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, augmentation.lower_resolution, "scales")


def _gamma(transform: GammaTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    _change(batch, drawn, augmentation.gamma, "gamma", "invert_image", "retain_stats")


def _mirror(transform: MirrorTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    for sample, found in enumerate(drawn):
        if found and found["axes"]:
            axes = [axis + 1 for axis in found["axes"]]
            batch.image[sample] = batch.image[sample].flip(axes)
            batch.segmentation[sample] = batch.segmentation[sample].flip(axes)


def _mask(transform: MaskImageTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    outside = batch.segmentation[:, transform.channel_idx_in_seg, None] < 0
    channels = transform.apply_to_channels
    batch.image[:, channels] = batch.image[:, channels].masked_fill(outside, transform.set_outside_to)


def _remove_label(transform: RemoveLabelTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    batch.segmentation[batch.segmentation == transform.label_value] = transform.set_to


def _regions(transform: ConvertSegmentationToRegionsTransform, batch: SegmentationBatch, drawn: Drawn) -> None:
    labels = batch.segmentation[:, transform.channel_in_seg]
    batch.segmentation = torch.stack([torch.isin(labels, region.to(labels)) for region in transform.regions], dim=1)


def _change(
    batch: SegmentationBatch,
    drawn: Drawn,
    function: Callable[..., Tensor],
    *names: str,
    where: str = "apply_to_channel",
) -> None:
    """Give `function` all channels that were drawn as rows, with the parameters of each by these names."""
    rows: list[tuple[int, int]] = []
    columns: list[list[Tensor]] = [[] for _ in names]
    for sample, found in enumerate(drawn):
        chosen = [] if found is None else _numbers(found[where])
        if found is None or not chosen:
            continue
        rows += [(sample, channel) for channel in chosen]
        for column, name in zip(columns, names, strict=True):
            values = torch.as_tensor(found[name])  # one for each channel, or one for all
            column.append(values if values.ndim else values.expand(len(chosen)))
    if rows:
        place = tuple(torch.tensor(rows, device=batch.image.device).T)
        batch.image[place] = function(batch.image[place], *map(torch.cat, columns))


def _numbers(channels: Any) -> list[int]:
    """Channels as nnU-Net writes them: numbers, or a mask."""
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
}
