"""Labels with the values that nnU-Net requires, 1, 2 and so on; masks often have others, such as 255.

Which values there are is known once all studies are converted. Until then the labels wait in a folder of their own, so
that a conversion that was stopped at any time can go on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.imaging.channels import visible_files
from nnunet_vit_mae.imaging.volumes import read_image
from nnunet_vit_mae.imaging.writing import write_image

HIGHEST_LABEL = 255  # of a label in uint8


def numbers_of(values: Iterable[int]) -> dict[int, int]:
    """Number the values of all labels in ascending order; background stays 0.

    Example:
        >>> numbers_of([0, 53, 17, 0]), numbers_of([2, 1])
        ({17: 1, 53: 2}, {1: 1, 2: 2})
    """
    return {value: number for number, value in enumerate(sorted({*values} - {0}), start=1)}


def are_renumbered(numbers: Mapping[int, int]) -> bool:
    """Return whether a label gets another value than it has."""
    return any(value != number for value, number in numbers.items())


def place_labels(waiting: Path, folder: Path, numbers: Mapping[int, int]) -> None:
    """Take the labels that wait in a folder to `folder`, with their numbers in place of their values.

    Raises:
        WriteError: If a label cannot be written.
    """
    number_of = np.zeros(HIGHEST_LABEL + 1, np.uint8)
    number_of[list(numbers)] = list(numbers.values())
    for file in visible_files(waiting) if waiting.is_dir() else []:
        if not are_renumbered(numbers):
            folder.mkdir(exist_ok=True)
            file.replace(folder / file.name)
            continue
        label = read_image(file)
        numbered = sitk.GetImageFromArray(number_of[sitk.GetArrayViewFromImage(label)])
        numbered.CopyInformation(label)
        write_image(numbered, folder / file.name)
