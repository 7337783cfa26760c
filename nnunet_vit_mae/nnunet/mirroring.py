"""Which axes training may mirror: not the one from left to right where labels name a side.

nnU-Net mirrors crops along all axes, in training and in prediction. The mirror image of a nearly symmetric body looks
like another body, but its left parotid is still called left: nothing in it tells a network which is which.
nnU-Net's advice is a trainer without that axis; here the axis is found in the headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_vit_mae.imaging.sides import label_with_side
from nnunet_vit_mae.presets import AXES
from nnunet_vit_mae.storage.pickles import read_properties

MOST_CASES = 100  # whose headers are looked at


@dataclass(frozen=True)
class Mirroring:
    """The axes of a preprocessed volume (0, 1, 2: z y x) that may be mirrored, and why."""

    axes: tuple[int, ...]
    reason: str

    @property
    def along(self) -> str:
        """Return the axes as the settings name them."""
        return "".join(AXES[axis] for axis in self.axes) or "none"

    def __str__(self) -> str:
        what = f"Crops are mirrored along {', '.join(self.along)}" if self.axes else "No crop is mirrored"
        return f"{what}: {self.reason}."


def mirroring_of(choice: str, labels: Iterable[str], folder: Path, transpose: Sequence[int]) -> Mirroring:
    """Return what `finetuning.mirroring` or `pretraining.mirroring` stands for in a dataset.

    Args:
        choice: `auto`, `none`, or the axes to mirror, such as `zy`.
        labels: Names of the labels.
        folder: Preprocessed cases, with what nnU-Net keeps of their headers.
        transpose: nnU-Net's `transpose_forward`: axes of an image (z y x) in the order of the preprocessed volume.

    Raises:
        UserError: If the properties of a case are damaged.
    """
    if choice == "none":
        return Mirroring((), "the plans say none")
    if choice != "auto":
        return Mirroring(tuple(axis for axis in range(3) if AXES[axis] in choice), "the plans say so")
    label = label_with_side(labels)
    if label is None:
        return Mirroring((0, 1, 2), "no label names a side")
    sides = {left_right_axis(read_properties(file), transpose) for file in _some_properties(folder)}
    why = f"the label {label} names a side"
    if not sides or None in sides:
        unknown = "no header says which axis leads from left to right" if sides else "no case is preprocessed yet"
        return Mirroring((), f"{why}, and {unknown}")
    axes = tuple(axis for axis in range(3) if axis not in sides)
    across = " or ".join(AXES[axis] for axis in sorted(sides))
    return Mirroring(axes, f"{why}, and {across} leads from left to right")


def left_right_axis(properties: Mapping[str, Any], transpose: Sequence[int]) -> int | None:
    """Return the axis of a preprocessed volume that runs most nearly from left to right.

    Args:
        properties: What nnU-Net keeps of the header of the image.
        transpose: As in `mirroring_of`.

    Returns:
        The axis, or None if the format of the image says nothing about the patient.
    """
    if (stated := properties.get("sitk_stuff")) is not None:
        cosines = np.array(stated["direction"])
        columns = cosines.reshape(math.isqrt(cosines.size), -1)  # unit vectors of x y z, or of x y alone
    elif (stated := properties.get("nibabel_stuff")) is not None:
        columns = np.array(stated.get("reoriented_affine", stated["original_affine"]))[:3, :3]
        columns = columns / np.linalg.norm(columns, axis=0)
    else:
        return None
    return list(transpose).index(2 - int(np.abs(columns[0]).argmax()))


def _some_properties(folder: Path) -> list[Path]:
    files = sorted(folder.glob("[!.]*.pkl"))
    return files[:: max(1, len(files) // MOST_CASES)]
