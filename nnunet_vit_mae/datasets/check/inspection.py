"""Inspection of single cases: every image and label of a raw dataset is read once, one case at a time.

An error stops training or makes its result wrong; a warning may be intended. Only a few numbers of each case are kept
to compare cases, so that memory does not grow with the dataset. Volumes are z y x; spacings are mm, x y z.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from nnunet_vit_mae.datasets.check.ct_intensities import SAMPLE, CTIntensities
from nnunet_vit_mae.datasets.contrasts.cases import find_case_images
from nnunet_vit_mae.datasets.contrasts.record import Channels, read_channels, read_contrasts
from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, NIFTI, cases_in, other_formats
from nnunet_vit_mae.imaging.ct_clipping import is_ct
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.imaging.grids import turned_geometry
from nnunet_vit_mae.imaging.labels import Labels, read_labels, whole_numbers
from nnunet_vit_mae.imaging.stated_geometry import nifti_ambiguities
from nnunet_vit_mae.imaging.volumes import Geometry, read_geometry, read_volume, refuse_damaged, without_warnings_of_itk
from nnunet_vit_mae.processes.workers import run_each

ERROR, WARNING = "error", "warning"
LABELS_OF = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesUn": None}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a case (`folder/name`) or, if `case` is empty, with the dataset."""

    level: str
    kind: str
    case: str
    text: str


@dataclass(frozen=True)
class ChannelSummary:
    """Percentiles of one image's intensities above its minimum (the background), and the hash of all its voxels."""

    p1: float
    median: float
    p99: float
    hash: str


@dataclass(frozen=True)
class CaseSummary:
    """What is known about one case; volumes are mm3 by label value, None without a readable label."""

    folder: str
    name: str
    channels: Mapping[int, ChannelSummary] = field(default_factory=dict)
    geometry: Geometry | None = None
    volumes: Mapping[int, float] | None = None
    ct: Mapping[int, CTIntensities] = field(default_factory=dict)  # by channel, of labelled training cases
    findings: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def thickness(self) -> float:
        """Largest spacing in mm; NaN if nothing could be read."""
        return max(self.geometry.spacing) if self.geometry else float("nan")

    @property
    def orientation(self) -> str:
        """Directions of the axes x y z as three letters, such as LPS."""
        assert self.geometry is not None
        return self.geometry.axes


@dataclass(frozen=True)
class InspectionTask:
    """A case to inspect: images by channel, label, the channels that may be all zeros, and those of CT."""

    folder: str
    name: str
    images: Mapping[int, Path]
    label: Path | None
    blank: frozenset[int]
    ct: frozenset[int] = frozenset()  # channels that nnU-Net normalises as CT

    @property
    def label_name(self) -> str:
        """Return how findings call the label."""
        return f"the label {self.label.parent.name}/{self.label.name}" if self.label else "no label"

    def finding(self, level: str, kind: str, text: str) -> Finding:
        """Return a finding in this case."""
        return Finding(level, kind, f"{self.folder}/{self.name}", text)


# ---------- which files


def find_tasks(raw: Path) -> tuple[list[InspectionTask], Channels, Labels, list[Finding]]:
    """Find the cases of the three image folders, and what is wrong without opening an image.

    Raises `UserError` if dataset.json does not describe a dataset, or if there are no images.
    """
    channels, labels = read_channels(raw), read_labels(raw / DESCRIPTION)
    record = read_contrasts(raw)
    tasks, findings = [], list(_description_findings(raw, channels.ending, labels))
    ct = frozenset(number for number, name in enumerate(channels.names) if is_ct(name))
    label_files = {folder: cases_in(raw / name, channels.ending) if name else {} for folder, name in LABELS_OF.items()}
    for case in find_case_images(raw, channels):
        folder = case.folder.name
        of_case = record.get(folder, {}).get(case.name)
        absent = {*of_case.filled, *of_case.blank} if of_case else set()
        blank = frozenset(number for number, name in enumerate(channels.names) if name in absent)
        known = {number: file for number, file in sorted(case.files.items()) if number < len(channels.names)}
        task = InspectionTask(folder, case.name, known, label_files[folder].get(case.name), blank, ct)
        findings += [
            task.finding(ERROR, "misnamed", f"{file.name} is not named like {case.name}_0000{channels.ending}")
            for file in case.misnamed
        ]
        if not case.misnamed:  # otherwise, the names have to be corrected first
            findings += _missing_files(task, case.files, channels)
        tasks.append(task)
    if not any(task.images for task in tasks):
        folder = raw / "imagesTr"
        others = other_formats(folder) if folder.is_dir() else ""
        raise UserError(
            f"There are no images such as CASE_0000{channels.ending} in {folder}{others}: put them there, or correct "
            "file_ending in dataset.json."
        )
    stated = read_description(raw / DESCRIPTION).content.get("numTraining")
    if stated != (count := len(label_files["imagesTr"])):
        text = f"numTraining is {stated} in dataset.json, but labelsTr has {count} labels"
        findings.append(Finding(ERROR, "numTraining", "", text))
    return [task for task in tasks if task.images], channels, labels, findings


def _description_findings(raw: Path, ending: str, labels: Labels) -> Iterator[Finding]:
    values = sorted(labels.known)
    if values != list(range(len(values))):
        text = f"labels in dataset.json are {', '.join(map(str, values))}, but nnU-Net requires 0, 1, 2 and so on"
        yield Finding(ERROR, "label values", "", text)
    description = read_description(raw / DESCRIPTION)
    listed, order = description.needed("labels"), description.regions_class_order
    if listed.get("background") != (0,):
        yield Finding(ERROR, "label values", "", "dataset.json must list background with the label 0")
    if labels.ignore is not None and labels.ignore != max(values):
        text = f"ignore is {labels.ignore} in dataset.json, but nnU-Net requires the highest label, {max(values)}"
        yield Finding(ERROR, "label values", "", text)
    if any(len(region) > 1 for region in labels.values.values()) and len(order or ()) != len(labels.values):
        text = f"regions_class_order in dataset.json must have a label for each of the {len(labels.values)} regions"
        yield Finding(ERROR, "regions", "", text)
    for folder in (*LABELS_OF, *filter(None, LABELS_OF.values())):
        hidden = sorted(file.name for file in (raw / folder).glob(".*") if file.name.endswith(ending))
        if hidden:
            text = f"{folder} has {len(hidden)} hidden files such as {hidden[0]}, which nnU-Net takes for images"
            yield Finding(WARNING, "hidden files", "", text)
    if not (raw / "labelsTr").is_dir():
        yield Finding(ERROR, "no labels", "", "there is no folder labelsTr")


def _missing_files(task: InspectionTask, files: Mapping[int, Path], channels: Channels) -> Iterator[Finding]:
    if not files:
        yield task.finding(ERROR, "no image", "has a label, but no image")
        return
    for number, name in enumerate(channels.headings):
        if number not in files:
            text = f"lacks channel {number:04d} ({name}); if it was not acquired, use mae3d_fill_contrasts"
            yield task.finding(ERROR, "missing channel", text)
    if beyond := [number for number in files if number >= len(channels.names)]:
        yield task.finding(ERROR, "unknown channel", f"has channel {min(beyond):04d}, which dataset.json does not list")
    if task.folder == "imagesTr" and task.label is None:
        labels = next(iter(files.values())).parent.with_name("labelsTr")
        others = [name for ending in IMAGE_ENDINGS if (labels / (name := f"{task.name}{ending}")).is_file()]
        text = "has no label in labelsTr; move unlabelled cases to imagesUn"
        if others:
            text = f"has a label named {others[0]}, but labels must end with {channels.ending}, as the images do"
        yield task.finding(ERROR, "missing label", text)


# ---------- one case


def inspect_case(task: InspectionTask, known: frozenset[int]) -> CaseSummary:
    """Read the files of a case; unusable files become findings. `known` are the label values in dataset.json."""
    findings: list[Finding] = []
    summaries: dict[int, ChannelSummary] = {}
    reference: Geometry | None = None
    ct_images: dict[int, np.ndarray] = {}
    with without_warnings_of_itk():
        for number, file in task.images.items():
            try:
                array, geometry = _stored_volume(file)
                findings += [task.finding(WARNING, "header", f"{file.name} {text}") for text in nifti_ambiguities(file)]
            except Exception as error:  # noqa: BLE001 (readers raise many kinds, and all other files are inspected too)
                findings.append(
                    task.finding(ERROR, "unreadable", f"{file.name} cannot be read: {reader_reason(error)}")
                )
                continue
            reference = reference or geometry
            if difference := _difference(reference, geometry):
                findings.append(task.finding(ERROR, "geometry", f"{file.name} differs from the first in {difference}"))
            summary = _summarise_channel(task, number, array, findings)
            if summary:
                summaries[number] = summary
                if number in task.ct:
                    ct_images[number] = array
        if len({summary.hash for summary in summaries.values()}) < len(summaries):
            findings.append(task.finding(WARNING, "duplicate", "has the same voxels in two channels"))
        label = _read_label(task, reference, findings) if task.label else None
    volumes, ct = None if label is None else _label_volumes(*label), {}
    if unknown := sorted(set(volumes or ()) - known):
        text = f"{task.label_name} holds {', '.join(map(str, unknown[:5]))}, which dataset.json does not list"
        findings.append(task.finding(ERROR, "unknown label", text))
    if label is not None and task.folder == "imagesTr":
        array, _ = label
        ct = {n: CTIntensities.of(image, array) for n, image in ct_images.items() if image.shape == array.shape}
    return CaseSummary(task.folder, task.name, summaries, reference, volumes, ct, tuple(findings))


def _stored_volume(file: Path) -> tuple[np.ndarray, Geometry]:
    """Return voxels (z y x) and geometry; nibabel reads NIfTI files, because SimpleITK replaces NaN by 0."""
    if not file.name.endswith(NIFTI):
        return read_volume(file)
    geometry = read_geometry(file)
    refuse_damaged(file)
    image: Any = nibabel.load(file)
    return np.asanyarray(image.dataobj).T.reshape(geometry.size[::-1]), geometry


def _summarise_channel(
    task: InspectionTask, number: int, array: np.ndarray, findings: list[Finding]
) -> ChannelSummary | None:
    """Summarise the intensities of an image; return None and append a finding if it is unusable."""
    name = task.images[number].name
    values = array.ravel()
    if values.dtype.kind == "f" and (bad := int(np.count_nonzero(~np.isfinite(values)))):
        text = f"{name} has {bad} voxels that are NaN or infinite, which nnU-Net's default reader replaces by 0"
        findings.append(task.finding(ERROR, "NaN or infinity", text))
        return None
    low, high = float(values.min()), float(values.max())
    if low == high:
        if low == 0 and number in task.blank:
            return None
        what = "all zeros; if it was not acquired, use mae3d_fill_contrasts" if low == 0 else f"{low:g} everywhere"
        findings.append(task.finding(ERROR, "constant", f"{name} is {what}"))
        return None
    sample = values[:: max(1, values.size // SAMPLE)]
    sample = sample[sample > low] if (sample > low).any() else sample
    p1, median, p99 = (float(value) for value in np.percentile(sample, (1, 50, 99)))
    digest = hashlib.sha256(str(array.shape).encode())
    for plane in array:  # in single precision, so that a copy of another data type has the same hash
        digest.update(np.ascontiguousarray(plane, np.float32).tobytes())
    return ChannelSummary(p1, median, p99, digest.hexdigest())


def _read_label(
    task: InspectionTask, reference: Geometry | None, findings: list[Finding]
) -> tuple[np.ndarray, Geometry] | None:
    """Return the voxels of a label and its geometry; return None and append a finding if the label is unusable."""
    assert task.label is not None
    name = task.label_name
    try:
        array, geometry = _stored_volume(task.label)
    except Exception as error:  # noqa: BLE001 (as above)
        findings.append(task.finding(ERROR, "unreadable", f"{name} cannot be read: {reader_reason(error)}"))
        return None
    if reference and (difference := _difference(reference, geometry)):
        findings.append(task.finding(ERROR, "geometry", f"{name} differs from the image in {difference}"))
    if not whole_numbers(array):
        findings.append(task.finding(ERROR, "not integers", f"{name} has values that are not integers"))
        return None
    return array, geometry


def _difference(reference: Geometry, other: Geometry) -> str | None:
    """Return how the geometry of an image differs from that of its case, with what to do if the voxels are the same."""
    difference = reference.difference(other)
    if difference and turned_geometry(other, reference).difference(reference) is None:
        return f"{difference}: it is stored along other axes ({other.axes}, not {reference.axes}), so turn it"
    return difference


def _label_volumes(array: np.ndarray, geometry: Geometry) -> dict[int, float]:
    """Return the volume of each label in mm3."""
    values, counts = np.unique(array, return_counts=True)
    voxels = {int(value): int(count) for value, count in zip(values, counts, strict=True)}
    voxel_volume = float(np.prod(geometry.spacing))
    return {value: count * voxel_volume for value, count in voxels.items() if value}


def inspect_all(tasks: Sequence[InspectionTask], labels: Labels, processes: int) -> Iterator[CaseSummary]:
    """Inspect all cases and yield each summary as soon as it is done; a case whose process died gets a finding."""
    for task, summary in run_each(partial(inspect_case, known=frozenset(labels.known)), tasks, processes):
        lost = task.finding(ERROR, "unreadable", "needs more memory than is available: give a smaller -np")
        yield summary or CaseSummary(task.folder, task.name, findings=(lost,))
