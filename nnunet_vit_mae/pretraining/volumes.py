"""Preprocessed volumes in their files, checked; and in memory, in half precision and not compressed.

Of a volume in memory a crop is a copy and nothing else. The memory is that of the host, which readers share, or that of
the device that trains, which then needs no reader.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import blosc2
import joblib
import numpy as np
import torch
from torch import Tensor

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.processes.memory import SHARED_MEMORY, shared_memory
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.limits import too_many_voxels
from nnunet_vit_mae.units import size_text

CHECKED_AT_ONCE = 8
ITEM = np.dtype(np.float16).itemsize
AGAIN = ": preprocess this case again."  # ends the sentence on a file


class Volume:
    """A preprocessed volume (c z y x) in its file, read by slicing.

    Raises `UserError` for a part that is damaged, or has voxels that half precision cannot hold if it is to hold them.
    """

    def __init__(self, file: Path, array: Any, *, in_half_precision: bool):
        self.file, self._array, self.in_half_precision = file, array, in_half_precision
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.dtype: np.dtype = array.dtype

    def __getitem__(self, part: Any) -> np.ndarray:
        with _damage_in_words(self.file):
            voxels = self._array[part]
        if self.in_half_precision and not np.abs(voxels).max() <= np.finfo(np.float16).max:
            raise UserError(f"{self.file} has voxels that half precision cannot hold: leave out --cache.")
        return voxels


def open_volume(file: Path, *, threads: int = 1, in_half_precision: bool = False) -> Volume:
    """Open a preprocessed volume, whose voxels are to be held in half precision or not.

    Raises `UserError` if the file is missing, damaged or no array, or has more voxels than the limit.
    """
    with _damage_in_words(file):
        # not mapped: page faults cost more than reads where the file has to come from a disk
        array: Any = blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": threads})
        if not isinstance(array, blosc2.NDArray):
            raise UserError(f"{file} holds no array{AGAIN}")
        volume = Volume(file, array, in_half_precision=in_half_precision)
    if problem := too_many_voxels(volume.shape[1:]):
        raise UserError(f"{file} {problem}.")
    return volume


@contextmanager
def _damage_in_words(file: Path) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{file} is missing{AGAIN}") from None
    except Exception as error:  # noqa: BLE001 (blosc2 raises many kinds for damaged files)
        raise UserError(f"{file} is damaged ({reader_reason(error)}){AGAIN}") from None


def volume_problem(file: Path, channels: int) -> str | None:
    """Return what is wrong with a preprocessed volume, or None: its header and its last block are read."""
    try:
        volume = open_volume(file)
        if len(volume.shape) != 4 or volume.shape[0] != channels or min(volume.shape) < 1:
            return f"has the shape {volume.shape} instead of {channels} channels of three axes"
        if not np.issubdtype(volume.dtype, np.floating):
            return f"holds {volume.dtype} instead of floating-point numbers"
        volume[:, -1:, -1:, -1:]
    except UserError as error:
        return str(error).removeprefix(f"{file} ").removesuffix(AGAIN).rstrip(".")
    return None


def volume_problems(files: Sequence[Path], channels: int) -> dict[Path, str]:
    """Return the problem of each volume that has one, several of them being read at a time."""
    with ThreadPoolExecutor(CHECKED_AT_ONCE) as threads:
        problems = threads.map(lambda file: volume_problem(file, channels), files)
        return {file: problem for file, problem in zip(files, problems, strict=True) if problem}


class Cache(AbstractContextManager):
    """Volumes in shared memory, in the order of their files, as many as fit into a limit.

    The memory is freed once the block has ended and nobody holds a volume, or the process that made it was killed.
    """

    def __init__(self, files: Sequence[Path], limit: int, *, copies: int = 1, spare: int = 0):
        """Read the volumes; `limit` is in bytes, for as many `copies` of the cache as are made on this machine.

        Beside it, `spare` bytes of shared memory stay free. Raises `UserError` when there is less shared memory, or for
        voxels that half precision cannot hold.
        """
        self.places: dict[Path, tuple[int, tuple[int, ...]]] = {}
        size = 0
        for file in files:
            shape = open_volume(file).shape
            if (size + math.prod(shape) * ITEM) * copies > limit:
                break
            self.places[file] = (size, shape)
            size += math.prod(shape) * ITEM
        total = size * copies
        room, free = shared_memory()
        # of what is free, another copy may have taken its part already
        if total + spare > room or size + spare > free:
            raise UserError(
                f"A cache of {size_text(total)}, and {size_text(spare)} for batches, do not fit into "
                f"{SHARED_MEMORY}, with {size_text(free)} free: give a smaller --cache, or enlarge "
                f"{SHARED_MEMORY} (docker run --shm-size, for instance)."
            )
        self._memory = SharedMemory(create=True, size=max(1, size))
        try:
            for file in _with_progress(self.places, "reading into memory"):
                self._place(file)[...] = _read_in_half_precision(file)
        except BaseException:
            self._memory.unlink()
            raise

    def __exit__(self, *_: object) -> None:
        self._memory.unlink()

    def __len__(self) -> int:
        return len(self.places)

    def get(self, file: Path) -> np.ndarray | None:
        """Return the volume of a file (c z y x), not to be written to; None when it is not in the cache."""
        return self._place(file) if file in self.places else None

    def _place(self, file: Path) -> np.ndarray:
        start, shape = self.places[file]
        return np.ndarray(shape, np.float16, self._memory.buf, start)


class DeviceCache:
    """All volumes in the memory of a device; each process that trains makes its own."""

    def __init__(self, files: Sequence[Path], device: torch.device):
        """Read the volumes; raises `UserError` for voxels that half precision cannot hold."""
        reading = _with_progress(files, "reading into the memory of the device")
        self.volumes = {file: torch.from_numpy(_read_in_half_precision(file)).to(device) for file in reading}

    def __len__(self) -> int:
        return len(self.volumes)

    def get(self, file: Path) -> Tensor:
        """Return the volume of a file (c z y x), not to be written to."""
        return self.volumes[file]


def bytes_in_half_precision(files: Sequence[Path]) -> int:
    """Return the memory that all volumes take."""
    return sum(math.prod(open_volume(file).shape) for file in files) * ITEM


def _with_progress(files: Iterable[Path], what: str) -> Iterator[Path]:
    """Show how many volumes are read, on rank 0 alone: all others read at the same time."""
    return with_progress(files, desc=what, unit="volume", shown=distributed.is_rank_0())


def _read_in_half_precision(file: Path) -> np.ndarray:
    return open_volume(file, threads=joblib.cpu_count(), in_half_precision=True)[:].astype(np.float16)
