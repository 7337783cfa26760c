"""What stays of a generously drawn label, as `mae3d_refine_labels` takes it from its flags."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CONNECTIVITIES = ("2d", "3d")


@dataclass(frozen=True)
class RefinementRule:
    """What stays of a label: voxels of at least `threshold` in components of at least `min_voxels`.

    Voxels that share a corner are connected. `2d` finds components in each slice across z (the last axis of the file)
    separately, as a rater sees them, `3d` in the volume. `labels` are the values to refine, each separately; None
    refines all but the ignore label.
    """

    threshold: float = 130.0  # HU
    min_voxels: int = 2
    connectivity: str = CONNECTIVITIES[0]
    labels: tuple[int, ...] | None = None

    @property
    def neighbours(self) -> np.ndarray:
        """Structuring element (3 3 3, z y x), true where a voxel is connected to the central one."""
        structure = np.ones((3, 3, 3), bool)
        if self.connectivity == "2d":
            structure[[0, 2]] = False
        return structure
