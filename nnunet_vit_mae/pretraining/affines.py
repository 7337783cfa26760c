"""Rotation and scaling of crops: drawn where crops are read, carried out for a whole batch where the network trains.

Masks depend on them, because what a rotation brings in from beyond a crop is not part of the scan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.spatial.transform import Rotation
from torch import Tensor

from nnunet_vit_mae.batch_transforms import resample_images
from nnunet_vit_mae.devices import copied, on_device
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.settings import Triple

SHARE = 0.2  # of all crops that are rotated, and of all that are scaled, as in nnU-Net and nnssl


@dataclass(frozen=True, kw_only=True)
class AffineDrawing:
    """How crops are rotated and scaled.

    Args:
        rotation: Largest angle about each axis, in degrees.
        scaling: Smallest and largest factor by which structures grow.
        spacing: mm along z y x: angles and sizes are those in the patient.
    """

    rotation: float
    scaling: tuple[float, float]
    spacing: tuple[float, ...]

    def draw(self, random: np.random.Generator) -> Float[np.ndarray, "3 3"]:
        """Draw the map of a crop, from its voxels (z y x from the centre) to where they are taken from."""
        rotated, scaled = random.random(2) < SHARE
        angles = random.uniform(-self.rotation, self.rotation, 3)
        factor = math.exp(random.uniform(*np.log(self.scaling)))
        turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() if rotated else np.eye(3)
        spacing = np.array(self.spacing)
        return turn * spacing / spacing[:, None] / (factor if scaled else 1.0)


def moved(volumes: Float[Tensor, "b c z y x"], affines: Float[Tensor, "b 3 3"]) -> Float[Tensor, "b c z y x"]:
    """Rotate and scale volumes, which may be on another device than the maps; zeros come in from beyond them.

    Those whose map is the identity stay as they are, to the digit.
    """
    chosen = _other_than_identity(affines)
    if not chosen:
        return volumes
    rows = on_device(chosen, volumes.device)
    maps = copied(affines[chosen], volumes.device)
    return volumes.index_copy(0, rows, resample_images(volumes[rows], maps, volumes.shape[2:]))


def tokens_reached(
    taking_part: Bool[Tensor, "b n"],
    affines: Float[Tensor, "b 3 3"],
    bounds: Int[Tensor, "b 3 2"],
    patch_size: Sequence[int],
    token: Triple,
) -> Bool[Tensor, "b n"]:
    """Return which tokens of the moved crops hold anything of the scan.

    Args:
        taking_part: The same before crops are moved; it stays for those that are not.
        affines: The map of each crop.
        bounds: First voxel of a crop along z y x that lies in the scan, and the first one behind it that does not.
        patch_size: Voxels of a crop along z y x.
        token: Voxels of a token along z y x.
    """
    reached = taking_part.clone()
    centre = (torch.tensor(patch_size, dtype=torch.float64) - 1) / 2
    z, y, x = (torch.arange(side) - middle for side, middle in zip(patch_size, centre, strict=True))
    for crop in _other_than_identity(affines):
        inside = torch.ones(1, 1, *patch_size)
        for row, middle, (first, end) in zip(affines[crop].double(), centre, bounds[crop].tolist(), strict=True):
            place = (row[0] * z + middle)[:, None, None] + (row[1] * y)[:, None] + row[2] * x
            inside *= (place > first - 1) & (place < end)  # where interpolation gives its voxels any weight
        reached[crop] = patchify(inside, token)[0, :, 0].any(dim=1)
    return reached


def _other_than_identity(affines: Float[Tensor, "b 3 3"]) -> list[int]:
    return (affines != torch.eye(3)).flatten(1).any(dim=1).nonzero().flatten().tolist()
