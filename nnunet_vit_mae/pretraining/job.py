"""What a pre-training computes, apart from where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.optimisation import warmup_cosine
from nnunet_vit_mae.pretraining.affines import AffineDrawing
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.pretraining.volumes import Cache, DeviceCache
from nnunet_vit_mae.settings import Network, Pretraining


@dataclass(frozen=True, kw_only=True)
class PretrainingJob:
    """Everything that decides what a run computes."""

    files: Sequence[Path]  # preprocessed volumes, c z y x
    channel_names: Sequence[str]
    patch_size: tuple[int, ...]  # voxels, z y x
    spacing: tuple[float, ...]  # mm, z y x; for positions in mm, rotations and pictures
    network: Network
    protocol: Pretraining
    cache: Cache | DeviceCache | None = None

    @property
    def masking(self) -> Masking:
        """The shares of tokens that are hidden and rebuilt."""
        return Masking(mask_ratio=self.protocol.mask_ratio, rebuilt_share=self.protocol.rebuilt_share)

    @property
    def drawing(self) -> MaskDrawing:
        """How the masks of a crop are drawn."""
        return MaskDrawing(
            masking=self.masking,
            token=self.network.token,
            adaptive=self.network.adaptive,
            skip_background=self.protocol.skip_background,
            masks_per_crop=self.protocol.masks_per_crop,
        )

    @property
    def affines(self) -> AffineDrawing | None:
        """How crops are rotated and scaled, if they are."""
        rotation, scaling = self.protocol.rotation, self.protocol.scaling
        if not rotation and scaling == (1.0, 1.0):
            return None
        return AffineDrawing(rotation=rotation, scaling=scaling, spacing=self.spacing)

    def crops(self) -> RandomCrops:
        """Return the crops of the run, with their masks."""
        return RandomCrops(
            self.files,
            self.patch_size,
            self.drawing,
            self.protocol.seed,
            self.cache,
            crops_per_volume=self.protocol.crops_per_volume,
            affines=self.affines,
            mirroring=self.protocol.mirroring,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Return the steps of an epoch: a sample for each case, rounded up to whole batches.

        The next epoch starts where it ended. With several samples per volume an epoch reads only some of the cases, and
        the next one others.
        """
        return math.ceil(len(self.files) / self.protocol.batch_size)

    @property
    def steps(self) -> int:
        """Return the steps of the whole run."""
        return self.protocol.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step: warm-up and cosine, as in the original."""
        return self.protocol.lr * warmup_cosine((step + 1) / (self.steps + 1), self.protocol.warmup)

    def last_rate(self, epoch: int) -> float:
        """Return the learning rate of the last step of an epoch, counted from 0."""
        return self.learning_rate((epoch + 1) * self.steps_per_epoch - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types, for `config.json`: what has to stay the same when a run goes on."""
        protocol = self.protocol.to_dict()
        del protocol["compile"]  # it changes no more than the rounding, and runs may go on elsewhere
        return {
            "cases": [file.stem for file in self.files],
            "channel_names": list(self.channel_names),
            "patch_size": list(self.patch_size),
            "spacing": list(self.spacing),
            "network": self.network.to_dict(),
            "pretraining": protocol,
            "half_precision_crops": self.cache is not None,
        }
