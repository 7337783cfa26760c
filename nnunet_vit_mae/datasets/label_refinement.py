"""Refine hand-drawn labels by a threshold and a smallest component size.

Raters circle a calcification quickly and generously. The label is what reaches the density of calcium inside the
circle; single annotated pixels are discarded as noise (ViTiac, section 2.1). Volumes are z y x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from nnunet_vit_mae.datasets.refinement_rule import RefinementRule
from nnunet_vit_mae.errors import UserError, reading
from nnunet_vit_mae.imaging.channels import cases_in, channel_file_name, ending_in, visible_files
from nnunet_vit_mae.imaging.labels import read_labels, whole_numbers
from nnunet_vit_mae.imaging.volumes import NOT_FINITE, all_finite, read_image, read_volume, without_warnings_of_itk
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_instances
from nnunet_vit_mae.storage.files import make_folder

REPORT = "refinement.csv"


class RefinedVoxels(NamedTuple):
    """Voxels of a label value before and after its refinement, and what was removed in between."""

    before: int
    below_threshold: int
    in_small_components: int
    after: int
    components_dropped: int


@dataclass(frozen=True)
class LabelChange:
    """How refinement changed one label value of one case, in voxels."""

    case: str
    label: int
    before: int
    below_threshold: int
    in_small_components: int
    after: int
    components_dropped: int
    removed_mm3: float


@dataclass(frozen=True)
class CaseToRefine:
    """A label image, and the channel of its case to compare with the threshold."""

    case: str
    label: Path
    image: Path


@dataclass(frozen=True)
class RefinedLabels:
    """Changes of all labels, problems of cases that could not be refined, and the number of labels written."""

    changes: list[LabelChange]
    problems: list[str]
    written: int


def refine(
    image: np.ndarray, label: np.ndarray, rule: RefinementRule, values: tuple[int, ...]
) -> tuple[np.ndarray, list[RefinedVoxels]]:
    """Refine the label of one case.

    Args:
        image: Intensities (z y x), in the unit of the rule's threshold.
        label: Label values (z y x) on the same grid.
        rule: What stays of a label.
        values: The label values to refine.

    Returns:
        The refined label in the same data type, and the voxels of each value.
    """
    refined, counts = label.copy(), []
    dense = image >= rule.threshold  # false for NaN
    for value in values:
        circled = label == value
        kept = circled & dense
        labelled: Any = ndimage.label(kept, rule.neighbours)  # SciPy has no type for it
        components, number = labelled
        is_small = np.bincount(components.ravel(), minlength=number + 1) < rule.min_voxels
        is_small[0] = False  # the background
        in_small = is_small[components]
        refined[circled & (~dense | in_small)] = 0
        before, above, small = (int(np.count_nonzero(mask)) for mask in (circled, kept, in_small))
        counts.append(RefinedVoxels(before, before - above, small, above - small, int(is_small.sum())))
    return refined, counts


def find_cases_to_refine(images: Path, labels: Path, channel: int) -> list[CaseToRefine]:
    """Find the image of each label; raises `UserError` if a folder or the channel of a case is missing."""
    ending = ending_in(labels, "-l")
    if not images.is_dir():
        raise UserError(f"{images} is not a folder: check -i.")
    cases = [
        CaseToRefine(case, file, images / channel_file_name(case, channel, ending))
        for case, file in cases_in(labels, ending).items()
    ]
    present = set(visible_files(images))
    if missing := [case for case in cases if case.image not in present]:
        raise UserError(
            f"{missing[0].image} is missing ({len(missing)} of {len(cases)} labels have no such image): check the "
            "names of the images, and --channel."
        )
    return cases


def values_to_refine(rule: RefinementRule, description: Path) -> tuple[int, ...] | None:
    """Return the label values to refine, checked against dataset.json if it exists; None means all that occur."""
    known = read_labels(description).foreground if description.is_file() else ()
    chosen = rule.labels
    if chosen and known and (unknown := [value for value in chosen if value not in known]):
        listed = ", ".join(map(str, known))
        raise UserError(f"--labels {unknown[0]}: {description} lists only {listed} as labels to refine.")
    return chosen or known or None


def refine_case(
    case: CaseToRefine, rule: RefinementRule, values: tuple[int, ...] | None, output: Path
) -> list[LabelChange]:
    """Write the refined label of a case to the folder `output`; if `values` is None, all foreground is refined.

    Raises `UserError` if its files cannot be read, are on different grids, or hold no label.
    """
    with reading(case.case):
        image, geometry = read_volume(case.image)
        label, label_geometry = read_volume(case.label)
    if difference := geometry.difference(label_geometry):
        raise UserError(f"{case.case} has image and label that differ in {difference}: resample one to the other.")
    if not whole_numbers(label) or not all_finite(label, case.label):
        raise UserError(f"{case.case} has a label with values that are not integers: give a segmentation.")
    if not all_finite(image, case.image):
        raise UserError(f"{case.case} has an image that {NOT_FINITE}.")
    if values is None:
        values = tuple(int(value) for value in np.unique(label) if value != 0)
    refined, counts = refine(image, label, rule, values)
    _write_like(refined, case.label, output / case.label.name)
    voxel_volume = float(np.prod(geometry.spacing))
    return [
        LabelChange(case.case, value, *voxels, removed_mm3=round((voxels.before - voxels.after) * voxel_volume, 3))
        for value, voxels in zip(values, counts, strict=True)
    ]


def refine_folder(images: Path, labels: Path, rule: RefinementRule, output: Path, *, channel: int) -> RefinedLabels:
    """Refine all labels of a folder and write them with a table of changes to the new folder `output`.

    A case that cannot be refined does not stop the others. Raises `UserError` if a folder, a channel or a label value
    does not exist.
    """
    cases = find_cases_to_refine(images, labels, channel)
    values = values_to_refine(rule, labels.resolve().parent / "dataset.json")
    make_folder(output)
    for file in cases_in(output, ending_in(labels, "-l")).values():
        file.unlink()  # of a call that was stopped: its case may have no label any more, or one that is refused
    changes, problems = [], []
    with without_warnings_of_itk():
        for case in with_progress(cases, unit="case", desc="refining"):
            try:
                changes += refine_case(case, rule, values, output)
            except UserError as error:
                problems.append(str(error))
    write_instances(LabelChange, changes, output / REPORT)
    return RefinedLabels(changes, problems, len(cases) - len(problems))


def refinement_table(changes: Sequence[LabelChange]) -> str:
    """Return the voxels of each label that has changed, and the sums over all labels."""
    row = "{:24}  {:5}  {:7}  {:15}  {:19}  {:7}".format
    lines = [f"{'case':24}  label   before  below threshold  in small components    after"]
    changed = [change for change in changes if change.after != change.before]
    for change in changed:
        voxels = (change.before, change.below_threshold, change.in_small_components, change.after)
        note = "" if change.after else "  (now empty)"
        lines.append(row(change.case, change.label, *voxels) + note)
    parts = ("before", "below_threshold", "in_small_components", "after")
    lines.append(row("all", "", *(sum(getattr(change, part) for change in changes) for part in parts)))
    lines.append(f"{len(changed)} of {len(changes)} labels have changed.")
    return "\n".join(lines)


def _write_like(array: np.ndarray, like: Path, file: Path) -> None:
    """Write a label with the geometry of the image `like`."""
    image = sitk.GetImageFromArray(array)
    image.CopyInformation(read_image(like))
    write_image(image, file)
