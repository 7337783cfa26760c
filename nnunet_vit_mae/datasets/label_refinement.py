"""Hand-drawn regions turned into the structure itself: a threshold inside the circle, and no crumbs.

Raters circle a calcification quickly and generously. What is at least as dense as calcium within the circle is the
label; single annotated pixels are discarded as noise (ViTiac, section 2.1). Volumes are z y x.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_vit_mae.errors import UserError, reader_reason, reading
from nnunet_vit_mae.files import make_folder, replacing
from nnunet_vit_mae.imaging.channels import cases_in, channel_file_name, ending_in, visible_files
from nnunet_vit_mae.imaging.labels import read_labels, read_volume, whole_numbers
from nnunet_vit_mae.imaging.volumes import without_warnings_of_itk

REPORT = "refinement.csv"
CONNECTIVITIES = ("2d", "3d")


@dataclass(frozen=True)
class Rule:
    """What stays of a label: voxels of at least `threshold` in components of at least `min_voxels`.

    Voxels that touch at a corner belong together. `2d` looks at each slice across z (the last axis of the file) on its
    own, as a rater does, `3d` at the volume. `labels` are the values to refine, each for itself; None: all but ignore.
    """

    threshold: float = 130.0  # HU
    min_voxels: int = 2
    connectivity: str = "2d"
    labels: tuple[int, ...] | None = None

    @property
    def neighbours(self) -> np.ndarray:
        """3 3 3, true where a voxel touches the central one."""
        structure = np.ones((3, 3, 3), bool)
        if self.connectivity == "2d":
            structure[[0, 2]] = False
        return structure


@dataclass(frozen=True)
class Change:
    """What became of one label value in one case, in voxels."""

    case: str
    label: int
    before: int
    below_threshold: int
    in_small_components: int
    after: int
    components_dropped: int
    removed_mm3: float


@dataclass(frozen=True)
class Pair:
    """A label image and the channel of its case to compare with the threshold."""

    case: str
    label: Path
    image: Path


def refine(image: np.ndarray, label: np.ndarray, rule: Rule, values: tuple[int, ...]) -> tuple[np.ndarray, list[tuple]]:
    """The refined label (z y x, same type), and for each value: voxels before, below, small, after, components."""
    refined, counts = label.copy(), []
    dense = image >= rule.threshold  # false for NaN
    for value in values:
        circled = label == value
        kept = circled & dense
        labelled: Any = ndimage.label(kept, rule.neighbours)  # untyped there
        components, number = labelled
        small = np.bincount(components.ravel(), minlength=number + 1) < rule.min_voxels
        small[0] = False
        crumbs = small[components]
        refined[circled & (~dense | crumbs)] = 0
        before, above, crumbled = (int(np.count_nonzero(mask)) for mask in (circled, kept, crumbs))
        counts.append((before, before - above, crumbled, above - crumbled, int(small.sum())))
    return refined, counts


def find_pairs(images: Path, labels: Path, channel: int) -> list[Pair]:
    """A pair for each label; raises `UserError` when a folder or the channel of a case is missing."""
    ending = ending_in(labels, "-l")
    if not images.is_dir():
        raise UserError(f"{images} is not a folder: check -i.")
    pairs = [
        Pair(case, file, images / channel_file_name(case, channel, ending))
        for case, file in cases_in(labels, ending).items()
    ]
    present = set(visible_files(images))
    if missing := [pair for pair in pairs if pair.image not in present]:
        raise UserError(
            f"{missing[0].image} is missing ({len(missing)} of {len(pairs)} labels have no such image): check -i and "
            "--channel."
        )
    return pairs


def values_to_refine(rule: Rule, description: Path) -> tuple[int, ...] | None:
    """The values that the rule asks for, checked against `dataset.json` where there is one; None: all that occur."""
    known = read_labels(description).foreground if description.is_file() else ()
    chosen = rule.labels
    if chosen and known and (unknown := [value for value in chosen if value not in known]):
        listed = ", ".join(map(str, known))
        raise UserError(f"--labels {unknown[0]}: {description} lists only {listed} as labels to refine.")
    return chosen or known or None


def refine_case(pair: Pair, rule: Rule, values: tuple[int, ...] | None, output: Path) -> list[Change]:
    """Write the refined label of a case to the folder `output`; values None: all that occur but the background.

    Raises `UserError` when its files cannot be read, do not fit or hold no label.
    """
    with reading(pair.case):
        image, geometry = read_volume(pair.image)
        label, of_label = read_volume(pair.label)
    if difference := geometry.difference(of_label):
        raise UserError(f"{pair.case} has image and label that differ in {difference}: resample one to the other.")
    if not whole_numbers(label):
        raise UserError(f"{pair.case} has a label with numbers that are not integers: give a segmentation.")
    if values is None:
        values = tuple(int(value) for value in np.unique(label) if value != 0)
    refined, counts = refine(image, label, rule, values)
    _write(refined, pair.label, output / pair.label.name)
    voxel = float(np.prod(geometry.spacing))
    return [
        Change(pair.case, value, *count, removed_mm3=round((count[0] - count[3]) * voxel, 3))
        for value, count in zip(values, counts, strict=True)
    ]


def refine_all(
    pairs: list[Pair], rule: Rule, values: tuple[int, ...] | None, output: Path
) -> Iterator[tuple[Pair, list[Change], str | None]]:
    """Refine one case after another: the changes, or the problem that left a case out."""
    make_folder(output)
    with without_warnings_of_itk():
        for pair in pairs:
            try:
                yield pair, refine_case(pair, rule, values, output), None
            except UserError as error:
                yield pair, [], str(error)


def write_changes(changes: list[Change], file: Path) -> None:
    """A CSV file with a row for each case and label."""
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Change)])
        writer.writeheader()
        writer.writerows(asdict(change) for change in changes)


def _write(array: np.ndarray, like: Path, file: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(sitk.ReadImage(str(like)))
    try:
        with replacing(file) as temporary:
            sitk.WriteImage(image, str(temporary), useCompression=True)
    except (OSError, RuntimeError) as error:  # RuntimeError is SimpleITK's
        raise UserError(f"{file} cannot be written ({reader_reason(error)}): choose another place with -o.") from None
