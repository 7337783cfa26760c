"""Labels with the values that nnU-Net requires, 1, 2 and so on; masks often have others, such as 255.

Which values there are is known once all studies are converted. Until the dataset is complete the labels wait in a
folder of their own, so that a conversion that was stopped at any time can go on, also with other numbers.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import visible_files
from nnunet_vit_mae.imaging.volumes import read_image
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.storage.files import replacing

HIGHEST_LABEL = 255  # of a label in uint8; the only value other than 0 of a mask that is an image


def numbers_of(found: Iterable[int], given: Sequence[int] = ()) -> dict[int, int]:
    """Number the values of all labels; background stays 0.

    Values with a gap are not numbered unless they are given, for another cohort of the same labels may have all of
    them, and would get other numbers.

    Args:
        found: The values in the labels.
        given: The values that there can be, in the order of their numbers; empty if they are 1, 2 and so on.

    Raises:
        UserError: If values have gaps and none are given, a value is not among the given ones, or these are not values
            of labels.

    Example:
        >>> numbers_of([0, 2, 1]), numbers_of([0, 255]), numbers_of([53, 0], given=[17, 53])
        ({1: 1, 2: 2}, {255: 1}, {17: 1, 53: 2})
    """
    values = sorted({*found} - {0})
    text = " ".join(map(str, values))
    if given:
        if len({*given}) < len(given) or max(given) > HIGHEST_LABEL:
            raise UserError(f"--label_values takes different values from 1 to {HIGHEST_LABEL}: check {given}.")
        if not {*values} <= {*given}:
            raise UserError(f"The labels have the values {text}: give all of them with --label_values.")
    elif values not in ([*range(1, len(values) + 1)], [HIGHEST_LABEL]):
        raise UserError(
            f"The labels have the values {text}, and nnU-Net requires 1, 2 and so on: call again with --label_values "
            f"{text}, which numbers them in this order (add those that are in other cohorts alone). Nothing has to be "
            "converted again."
        )
    return {value: number for number, value in enumerate(given or values, start=1)}


def are_renumbered(numbers: Mapping[int, int]) -> bool:
    """Return whether a label gets another value than it has."""
    return any(value != number for value, number in numbers.items())


def place_labels(waiting: Path, folder: Path, numbers: Mapping[int, int]) -> None:
    """Write the labels that wait in a folder to `folder`, with their numbers in place of their values.

    Raises:
        WriteError: If a label cannot be written.
    """
    number_of = np.zeros(HIGHEST_LABEL + 1, np.uint8)
    number_of[list(numbers)] = list(numbers.values())
    for file in visible_files(waiting) if waiting.is_dir() else []:
        if not are_renumbered(numbers):
            folder.mkdir(exist_ok=True)
            with replacing(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)
            continue
        label = read_image(file)
        numbered = sitk.GetImageFromArray(number_of[sitk.GetArrayViewFromImage(label)])
        numbered.CopyInformation(label)
        write_image(numbered, folder / file.name)
