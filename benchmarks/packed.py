"""A dataset in one file, and in the memory of the device that trains: what `ablation.py` runs on.

A GPU that is lent by the minute has no time to read files, and no nnU-Net installed. So `pack` writes a preprocessed
dataset into one file, where nnU-Net is; all else needs neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

TRIES = 10  # for a crop with foreground


@dataclasses.dataclass(frozen=True)
class Packed:
    """A dataset: volumes (n z y x, zeros behind each of them), their sizes, labels of the first ones, and plans."""

    name: str
    volumes: Tensor  # on the device, in half precision
    labels: Tensor  # on the device
    sizes: np.ndarray  # n 3
    patch: tuple[int, ...]
    strides: list[list[int]]  # of nnU-Net's U-Net

    @property
    def classes(self) -> int:
        """Return the number of outputs, the background among them."""
        return int(self.labels.max()) + 1

    @property
    def device(self) -> torch.device:
        """Return where the volumes are."""
        return self.volumes.device


def pack(dataset: str, output: Path) -> None:
    """Write the preprocessed volumes of a dataset of one channel, labelled ones first, and what its plans say."""
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.plans import load_plan
    from nnunet_vit_mae.pretraining.volumes import open_volume

    plan = load_plan(find_dataset(dataset), "nnUNetPlans", "3d_fullres")
    names = sorted(file.name[: -len("_seg.b2nd")] for file in plan.preprocessed_folder.glob("*_seg.b2nd"))
    files = [plan.preprocessed_folder / f"{name}.b2nd" for name in names]
    files += sorted(plan.unlabelled_folder.glob("*.b2nd")) if plan.unlabelled_folder.is_dir() else []
    volumes = [open_volume(file)[0] for file in files]
    labels = [open_volume(plan.preprocessed_folder / f"{name}_seg.b2nd")[0].clip(min=0) for name in names]
    sizes = np.array([volume.shape for volume in volumes])
    largest = tuple(sizes.max(axis=0))
    np.savez_compressed(
        output,
        # three digits are kept, which compress well
        volumes=np.stack([_filled(volume.round(2).astype(np.float16), largest) for volume in volumes]),
        labels=np.stack([_filled(label.astype(np.uint8), largest) for label in labels]),
        sizes=sizes,
        patch=plan.patch_size,
        strides=plan.configuration.network_arch_init_kwargs["strides"],
        name=plan.dataset.name,
    )


def _filled(array: np.ndarray, largest: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, most - side) for side, most in zip(array.shape, largest, strict=True)])


def unpack(file: Path, device: torch.device) -> Packed:
    """Read a packed dataset to the device."""
    with np.load(file, allow_pickle=False) as content:
        volumes, labels = (torch.from_numpy(content[part]).to(device) for part in ("volumes", "labels"))
        patch, strides = content["patch"].tolist(), content["strides"].tolist()
        return Packed(str(content["name"]), volumes, labels, content["sizes"], tuple(patch), strides)


def crops(packed: Packed, cases: np.ndarray, random: np.random.Generator) -> tuple[Tensor, list[np.ndarray]]:
    """Return crops (b 1 z y x) at random places of volumes, zeros around them, and which voxels are inside (`cut`)."""
    starts = np.array([place(packed.sizes[case], packed.patch, random) for case in cases])
    volume, inside = cut(packed.volumes, packed, cases, starts)
    return volume.float(), inside


def place(sizes: np.ndarray, patch: tuple[int, ...], random: np.random.Generator) -> list[int]:
    """Draw the first voxel of a crop; of a volume that is smaller than the crop, all of it is kept."""
    ends = [sorted((0, int(voxels) - side)) for voxels, side in zip(sizes, patch, strict=True)]
    return [int(random.integers(low, high + 1)) for low, high in ends]


def place_with_foreground(packed: Packed, labels: np.ndarray, case: int, random: np.random.Generator) -> list[int]:
    """Draw the first voxel of a crop, with foreground in it if a few tries find any."""
    start: list[int] = []
    for _ in range(TRIES):
        start = place(packed.sizes[case], packed.patch, random)
        box = tuple(slice(max(0, first), first + side) for first, side in zip(start, packed.patch, strict=True))
        if labels[box].any():
            break
    return start


def cut(source: Tensor, packed: Packed, cases: np.ndarray, starts: np.ndarray) -> tuple[Tensor, list[np.ndarray]]:
    """Cut crops (b 1 z y x) from the volumes or labels of cases.

    Returns:
        The crops, and for each axis which of its places (b side) lie inside the volume: voxels do if all theirs do.
    """
    places = [starts[:, axis, None] + np.arange(side) for axis, side in enumerate(packed.patch)]
    inside = [(at >= 0) & (at < packed.sizes[cases][:, axis, None]) for axis, at in enumerate(places)]
    index = [at.clip(0, side - 1) for at, side in zip(places, source.shape[1:], strict=True)]
    # in one copy each, for many small ones to a GPU take longer than the crops
    z, y, x = torch.from_numpy(np.concatenate(index, axis=1)).to(source.device).split(packed.patch, dim=1)
    in_z, in_y, in_x = torch.from_numpy(np.concatenate(inside, axis=1)).to(source.device).split(packed.patch, dim=1)
    chosen = torch.from_numpy(np.asarray(cases)).to(source.device)[:, None, None, None]
    voxels = source[chosen, z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]
    valid = in_z[:, :, None, None] & in_y[:, None, :, None] & in_x[:, None, None, :]
    return (voxels * valid)[:, None], inside


def covered(inside: Sequence[np.ndarray], token: tuple[int, int, int]) -> Tensor:
    """Return which tokens (b n) hold a voxel of their volume, given which places of each axis do; on the host."""
    z, y, x = (
        np.logical_or.reduceat(places, range(0, places.shape[1], part), axis=1)
        for places, part in zip(inside, token, strict=True)
    )
    tokens = z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]
    return torch.from_numpy(tokens.reshape(len(tokens), -1))
