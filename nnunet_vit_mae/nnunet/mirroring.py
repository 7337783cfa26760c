"""Along which axes fine-tuning mirrors: none where labels name a side of the body.

nnU-Net mirrors crops along all axes, in training and in prediction. The mirror image of a nearly symmetric body looks
like another body, but its left parotid is still called left: nothing in it tells a network which is which. Other axes
do the same to what is near a label, because a body on its head is a mirror image too (its cost: docs/evidence.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nnunet_vit_mae.imaging.sides import label_with_side
from nnunet_vit_mae.presets import AXES


@dataclass(frozen=True)
class Mirroring:
    """The axes of a preprocessed volume (some of `zyx`) that are mirrored, and why."""

    axes: str
    reason: str

    def __str__(self) -> str:
        what = f"Crops are mirrored along {', '.join(self.axes)}" if self.axes else "No crop is mirrored"
        return f"{what}: {self.reason}."

    def of_patch(self, dimensions: int) -> tuple[int, ...] | None:
        """Return the axes of a patch with 2 or 3 dimensions, as nnU-Net takes them; 2D patches lack the first one."""
        return tuple(axis for axis, name in enumerate(AXES[3 - dimensions :]) if name in self.axes) or None


def mirroring_of(choice: str, labels: Iterable[str]) -> Mirroring:
    """Return what `finetuning.mirroring` (`auto`, `none`, or axes such as `zy`) stands for with these labels."""
    if choice != "auto":
        return Mirroring("".join(axis for axis in AXES if axis in choice), "the plans say so")  # `none` has none
    label = label_with_side(labels)
    if label is None:
        return Mirroring(AXES, "no label names a side of the body")
    return Mirroring("", f"the label {label} names a side of the body")
