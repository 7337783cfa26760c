"""Random crops of preprocessed volumes, read directly from nnU-Net's `.b2nd` files.

Only the blocks under a crop are decompressed; no segmentation is read and no enlarged crop is cut, since masked
autoencoding needs shifts and flips but no rotation. There is no intensity noise: norm-pix would make it the target.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blosc2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from nnunet_vit_mae.pretraining.cache import Cache

MMAP: dict[str, Any] = {} if os.name == "nt" else {"mmap_mode": "r"}  # blosc2 cannot map files on Windows


class RandomCrops(Dataset):
    """An endless sequence of samples: pass after pass over the files, each pass in an order of its own.

    Sample `index` depends on the seed and the index alone: the same in any worker or process and after any restart.
    With a cache all samples are in half precision, whether their volumes are in it or not.
    """

    def __init__(
        self, files: Sequence[Path], patch_size: Sequence[int], tokens: int, seed: int, cache: Cache | None = None
    ):
        self.files, self.patch_size, self.tokens, self.seed = list(files), tuple(patch_size), tokens, seed
        self.cache = cache
        self._pass, self._order = -1, np.empty(0, dtype=int)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """A crop (c z y x) and the noise that decides which of its tokens stay visible (n)."""
        random = np.random.default_rng((self.seed, 1, index))
        file = self.file_of(index)
        kept = self.cache.get(file) if self.cache else None
        crop = torch.from_numpy(random_crop(open_volume(file) if kept is None else kept, self.patch_size, random))
        flipped = tuple(axis for axis in (1, 2, 3) if random.random() < 0.5)
        noise = random.random(self.tokens, dtype=np.float32)
        return crop.to(torch.half if self.cache else torch.float).flip(flipped), torch.from_numpy(noise)

    def file_of(self, index: int) -> Path:
        """The file that a sample is cut from."""
        number, position = divmod(index, len(self.files))
        if number != self._pass:  # neighbouring samples share a pass
            self._pass, self._order = number, np.random.default_rng((self.seed, 0, number)).permutation(len(self.files))
        return self.files[self._order[position]]


class ConsecutiveBatches(Sampler[list[int]]):
    """The samples of steps `first` to `last` (excluded), a batch at a time: of each batch, one process's share."""

    def __init__(self, first: int, last: int, batch_size: int, *, rank: int = 0, processes: int = 1):
        self.first, self.last, self.batch_size = first, last, batch_size
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield list(range(step * self.batch_size + self.rank, (step + 1) * self.batch_size, self.processes))

    def __len__(self) -> int:
        return self.last - self.first


def open_volume(file: Path, *, threads: int = 1) -> Any:
    """A preprocessed volume (c z y x), to be read by slicing."""
    return blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": threads}, **MMAP)


def random_crop(volume: Any, patch_size: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """A crop (c z y x) at a random place; where the volume is smaller than the crop, zeros stand around it.

    `volume` is an array or an open file; a crop of an array may be a view.
    """
    starts = [_random_start(voxels, side, random) for voxels, side in zip(volume.shape[1:], patch_size, strict=True)]
    inside = [
        slice(max(0, start), min(voxels, start + side))
        for start, voxels, side in zip(starts, volume.shape[1:], patch_size, strict=True)
    ]
    piece = volume[(slice(None), *inside)]
    if piece.shape[1:] == tuple(patch_size):
        return piece
    crop = np.zeros((volume.shape[0], *patch_size), dtype=piece.dtype)
    target = [slice(part.start - start, part.stop - start) for part, start in zip(inside, starts, strict=True)]
    crop[:, *target] = piece
    return crop


def _random_start(voxels: int, side: int, random: np.random.Generator) -> int:
    """Anywhere inside; for a volume smaller than the crop, anywhere that keeps all of it."""
    low, high = sorted((0, voxels - side))
    return int(random.integers(low, high + 1))
