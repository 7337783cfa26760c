"""Random crops of preprocessed volumes, read directly from nnU-Net's `.b2nd` files.

Only the blocks under a crop are decompressed; no segmentation is read and no enlarged crop is cut: where crops are
rotated, their corners are empty and take no part. There is no intensity noise: norm-pix would make it the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from nnunet_vit_mae.networks.adaptive import contrast_images, present_contrasts
from nnunet_vit_mae.networks.masking import Masking, Masks, background_tokens
from nnunet_vit_mae.networks.tokenizer import grid_of
from nnunet_vit_mae.presets import AXES
from nnunet_vit_mae.pretraining.affines import AffineDrawing, moved, tokens_reached
from nnunet_vit_mae.pretraining.volumes import Cache, DeviceCache, open_volume
from nnunet_vit_mae.settings import Triple, token_grid

REGION = 1.5  # sides of what is read for several crops, in sides of one: they differ, and share most of their blocks


class Samples(NamedTuple):
    """What the network of pre-training is given: a crop with several masks is as many samples."""

    volume: Float[Tensor, "s c z y x"]
    masks: Masks
    present: list[list[int]]  # channels of each sample; adaptive: those that hold anything but zeros

    def first(self) -> Samples:
        """Return the first sample alone."""
        images = len(self.present[0]) if len(self.masks.visible) > len(self.present) else 1
        return Samples(self.volume[:1], Masks(*(part[:images] for part in self.masks)), self.present[:1])


class CropBatch(NamedTuple):
    """What a reader hands over: crops as they lie in their volumes, and what is to be done where the network trains.

    The crops may be on the device already; all else is on the host, which decides what is done.
    """

    crops: Float[Tensor, "b c z y x"]
    flips: Bool[Tensor, "b 3"]  # along z y x
    masks: Masks  # of the flipped crops
    present: list[list[int]]  # of each sample, of which a crop gives as many as it has masks
    affines: Float[Tensor, "b 3 3"] | None = None  # of the flipped crops; None: they are neither rotated nor scaled

    def pinned(self) -> CropBatch:
        """Return the same with all that is on the host in memory from which a GPU copies without being waited for."""
        crops = self.crops if self.crops.is_cuda else self.crops.pin_memory()
        return self._replace(crops=crops, flips=self.flips.pin_memory(), masks=self.masks.pinned())

    def samples(self, device: torch.device) -> Samples:
        """Flip, rotate and scale the crops on the device, and repeat them for each of their masks."""
        crops, flips = self.crops.to(device, non_blocking=True), self.flips.to(device, non_blocking=True)
        for axis in range(3):
            crops = torch.where(flips[:, axis, None, None, None, None], crops.flip(2 + axis), crops)
        if self.affines is not None:
            crops = moved(crops.float(), self.affines)
        repeats = len(self.present) // len(crops)
        volume = (crops.repeat_interleave(repeats, dim=0) if repeats > 1 else crops).float()
        return Samples(volume, self.masks.to(device), self.present)


@dataclass(frozen=True, kw_only=True)
class MaskDrawing:
    """How masks are drawn for crops."""

    masking: Masking
    token: Triple
    adaptive: bool = False  # each present contrast has a mask of its own
    skip_background: bool = False
    masks_per_crop: int = 1

    def noise_size(self, patch_size: Sequence[int], channels: int) -> int:
        """Return how many random numbers a mask takes."""
        return (channels if self.adaptive else 1) * math.prod(token_grid(patch_size, self.token))

    def draw(
        self,
        crops: Float[Tensor, "b c z y x"],
        inside: Int[Tensor, "b 3 2"],
        flips: Bool[Tensor, "b 3"],
        noise: Float[Tensor, "b masks n"],
        affines: Float[Tensor, "b 3 3"] | None = None,
    ) -> tuple[Masks, list[list[int]]]:
        """Draw the masks of crops as they are where the network trains, and say which channels each sample has.

        Args:
            crops: Crops before their flips.
            inside: First voxel along z y x that lies in the volume, and the first one behind it that does not.
            flips: Axes to flip.
            noise: Random numbers for each mask.
            affines: How they are rotated and scaled then.
        """
        channels, repeats, noise = crops.shape[1], noise.shape[1], noise.flatten(0, 1)
        present = [list(range(channels))] * len(noise)
        taking_part = self._taking_part(crops, inside, flips, affines)
        if taking_part is not None:
            taking_part = taking_part.repeat_interleave(repeats, dim=0)
        if self.adaptive:
            present = [own for own in present_contrasts(crops) for _ in range(repeats)]
            images = contrast_images(present, noise.device)
            noise = noise.unflatten(1, (channels, -1))[images]
            if taking_part is not None:
                taking_part = taking_part.unflatten(1, (channels, -1))[images]
        return self.masking.draw(noise, taking_part), present

    def _taking_part(
        self,
        crops: Float[Tensor, "b c z y x"],
        inside: Int[Tensor, "b 3 2"],
        flips: Bool[Tensor, "b 3"],
        affines: Float[Tensor, "b 3 3"] | None,
    ) -> Bool[Tensor, "b n"] | None:
        """Return which tokens of the flipped and moved crops are shown or hidden at all; None: all of them.

        Tokens wholly outside of the volume never are: they would teach where the padding is.
        """
        patch = torch.tensor(crops.shape[2:])
        sequences = crops.shape[1] if self.adaptive else 1
        found = None
        if affines is not None or (inside[..., 0] > 0).any() or (inside[..., 1] < patch).any():
            start = torch.where(flips, patch - inside[..., 1], inside[..., 0])
            stop = torch.where(flips, patch - inside[..., 0], inside[..., 1])
            z, y, x = (
                (torch.arange(tokens) * side < stop[:, axis, None])
                & ((torch.arange(tokens) + 1) * side > start[:, axis, None])
                for axis, (tokens, side) in enumerate(zip(grid_of(crops, self.token), self.token, strict=True))
            )
            found = (z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]).flatten(1)
            if affines is not None:
                bounds = torch.stack([start, stop], dim=-1)
                found = tokens_reached(found, affines, bounds, patch.tolist(), self.token)
            found = found.repeat(1, sequences)
        if self.skip_background:
            flipped = torch.stack([crop.flip(_axes(flip)) for crop, flip in zip(crops, flips, strict=True)]).float()
            if affines is not None:
                flipped = moved(flipped, affines)
            images = flipped.flatten(0, 1)[:, None] if self.adaptive else flipped
            content = ~background_tokens(images, self.token).unflatten(0, (len(crops), sequences)).flatten(1)
            found = content if found is None else found & content
        return found


def _axes(flip: Bool[Tensor, " 3"]) -> list[int]:
    """Return the axes of a crop (c z y x) that are flipped."""
    return [axis + 1 for axis, chosen in enumerate(flip.tolist()) if chosen]


class RandomCrops(Dataset):
    """An endless sequence of reads: pass after pass over the files, each pass in an order of its own.

    What a read gives depends on the seed and its number alone: the same in any worker or process and after any restart.
    With a cache all crops are in half precision, whether their volumes are in it or not; with one on a device they are
    cut there.

    Args:
        files: Preprocessed volumes (c z y x).
        patch_size: Voxels of a crop (z y x).
        drawing: How masks are drawn.
        seed: Random seed of the order, the crops and the masks.
        cache: Volumes in memory; None: all are read from their files.
        crops_per_volume: Crops that are cut from what is read of a volume at once.
        affines: How crops are rotated and scaled, with random numbers of their own; None: not at all.
        mirroring: Axes (some of `zyx`) along which half of the crops are flipped.
    """

    def __init__(
        self,
        files: Sequence[Path],
        patch_size: Sequence[int],
        drawing: MaskDrawing,
        seed: int,
        cache: Cache | DeviceCache | None = None,
        *,
        crops_per_volume: int = 1,
        affines: AffineDrawing | None = None,
        mirroring: str = AXES,
    ):
        self.files, self.patch_size, self.drawing, self.seed = list(files), tuple(patch_size), drawing, seed
        self.cache = cache
        self.crops_per_volume, self.affines = crops_per_volume, affines
        self.mirrored = np.array([axis in mirroring for axis in AXES])
        self._pass, self._order = -1, np.empty(0, dtype=int)

    def __getitem__(self, reads: Sequence[int]) -> CropBatch:
        crops, inside, flips, noise, maps = [], [], [], [], []
        for read in reads:
            random = np.random.default_rng((self.seed, 1, read))
            volume = self._volume(self.file_of(read), random)
            for _ in range(self.crops_per_volume):
                crop, box = random_crop(volume, self.patch_size, random)
                crops.append(crop)
                inside.append(box)
                flips.append((random.random(3) < 0.5) & self.mirrored)
                size = self.drawing.noise_size(self.patch_size, volume.shape[0])
                noise.append(random.random((self.drawing.masks_per_crop, size), dtype=np.float32))
            if self.affines is not None:
                own = np.random.default_rng((self.seed, 2, read))
                maps += [self.affines.draw(own) for _ in range(self.crops_per_volume)]
        dtype = torch.float if self.cache is None else torch.half
        batch = torch.stack([crop.to(dtype) for crop in crops])  # the only copy of cached crops, which are views
        flipped = torch.from_numpy(np.stack(flips))
        affines = torch.from_numpy(np.stack(maps)).float() if maps else None
        masks, present = self.drawing.draw(
            batch, torch.tensor(inside), flipped, torch.from_numpy(np.stack(noise)), affines
        )
        return CropBatch(batch, flipped, masks, present, affines)

    def file_of(self, read: int) -> Path:
        """Return the file that a read is of."""
        number, position = divmod(read, len(self.files))
        if number != self._pass:  # neighbouring reads share a pass
            self._pass, self._order = number, np.random.default_rng((self.seed, 0, number)).permutation(len(self.files))
        return self.files[self._order[position]]

    def _volume(self, file: Path, random: np.random.Generator) -> Any:
        """Return what crops are cut from: for one the volume, open; for several a part of it that is read once."""
        kept = None if self.cache is None else self.cache.get(file)
        volume = open_volume(file, in_half_precision=self.cache is not None) if kept is None else kept
        if self.crops_per_volume == 1:
            return volume
        sides = [min(a, round(REGION * b)) for a, b in zip(volume.shape[1:], self.patch_size, strict=True)]
        return random_crop(volume, sides, random)[0]


class ConsecutiveBatches(Sampler[list[int]]):
    """The reads of steps `first` to `last` (excluded), a batch at a time; of each batch one process has its share."""

    def __init__(self, first: int, last: int, reads: int, *, rank: int = 0, processes: int = 1):
        self.first, self.last, self.reads = first, last, reads
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.of, range(self.first, self.last))

    def of(self, step: int) -> list[int]:
        """Return the reads of a step."""
        return list(range(step * self.reads + self.rank, (step + 1) * self.reads, self.processes))

    def __len__(self) -> int:
        return self.last - self.first


def random_crop(
    volume: Any, patch_size: Sequence[int], random: np.random.Generator
) -> tuple[Float[Tensor, "c z y x"], list[tuple[int, int]]]:
    """Cut a crop (c z y x) at a random place; where the volume is smaller than the crop, zeros stand around it.

    `volume` is an array, a tensor or an open file; a crop of the first two may be a view.

    Returns:
        The crop, and where the volume is in it: the first voxel along z y x, and the first one behind it.
    """
    starts = [_random_start(voxels, side, random) for voxels, side in zip(volume.shape[1:], patch_size, strict=True)]
    source = [
        slice(max(0, start), min(voxels, start + side))
        for start, voxels, side in zip(starts, volume.shape[1:], patch_size, strict=True)
    ]
    inside = [(part.start - start, part.stop - start) for part, start in zip(source, starts, strict=True)]
    piece = torch.as_tensor(volume[(slice(None), *source)])
    if piece.shape[1:] == tuple(patch_size):
        return piece, inside
    crop = piece.new_zeros(piece.shape[0], *patch_size)
    crop[:, *(slice(*part) for part in inside)] = piece
    return crop, inside


def _random_start(voxels: int, side: int, random: np.random.Generator) -> int:
    """Draw the first voxel of a crop; of a volume that is smaller than the crop, all of it is kept."""
    low, high = sorted((0, voxels - side))
    return int(random.integers(low, high + 1))
