"""Problems that only show between cases: duplicates, leakage of patients, outliers, orientations and empty labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from nnunet_vit_mae.datasets.check.ct_intensities import clipping_of
from nnunet_vit_mae.datasets.check.inspection import ERROR, WARNING, CaseSummary, Finding
from nnunet_vit_mae.datasets.contrasts.record import Channels
from nnunet_vit_mae.imaging.labels import Labels
from nnunet_vit_mae.imaging.sides import is_right_handed, label_with_side

OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)
SMALLEST_UNIT = 0.02  # of the median range from the 1st to the 99th percentile: smaller differences do not count
FEWEST = 8  # with fewer cases, there are no outliers
SMALLEST_RATIO = float(np.log(1.5))  # the same for spacings and extents, which differ more: in logarithms
FEWEST_GEOMETRIES = 3
BIN = 0.5  # mm, in the histogram of slice thickness


def findings_across_cases(
    cases: Sequence[CaseSummary],
    channels: Channels,
    labels: Labels,
    patients: Mapping[str, str],
    *,
    reoriented: bool,
) -> Iterator[Finding]:
    """Yield findings about several cases.

    Args:
        cases: The cases.
        channels: Of the dataset.
        labels: Of the dataset.
        patients: The known patients by case.
        reoriented: Whether nnU-Net turns all images to the same axes.
    """
    yield from _duplicates(cases)
    yield from _same_names(cases)
    yield from _shared_patients(cases, patients)
    if not reoriented:
        yield from _other_axes(cases)
        yield from _mirror_images(cases, labels)
    yield from _thick_axes(cases)
    yield from _geometry_outliers(cases)
    yield from _intensity_outliers(cases, channels)
    yield from _clipped_ct(cases, channels)
    yield from _label_findings(cases, labels)


def robust_z(values: Sequence[float], smallest: float) -> np.ndarray:
    """Return each value's distance from the median, in median absolute deviations scaled to a normal distribution.

    `smallest` is the least unit, so that a good scan is not an outlier among scans that agree closely.
    """
    distance = np.asarray(values, float) - np.median(values)
    return distance / max(1.4826 * float(np.median(np.abs(distance))), smallest, 1e-12)


def intensity_scores(cases: Sequence[CaseSummary], number: int) -> dict[str, tuple[float, float]]:
    """Return the robust z-scores of a channel's median and 99th percentile by case; empty if there are few cases."""
    with_channel = [case for case in cases if number in case.channels]
    if len(with_channel) < FEWEST:
        return {}
    channels = [case.channels[number] for case in with_channel]
    unit = SMALLEST_UNIT * float(np.median([channel.p99 - channel.p1 for channel in channels]))
    medians = robust_z([channel.median for channel in channels], unit)
    highs = robust_z([channel.p99 for channel in channels], unit)
    return {str(case): (float(a), float(b)) for case, a, b in zip(with_channel, medians, highs, strict=True)}


def outliers_by_channel(cases: Sequence[CaseSummary], channels: Channels) -> list[set[str]]:
    """Return the outlying cases of each channel."""
    return [
        {case for case, scores in intensity_scores(cases, number).items() if max(map(abs, scores)) > OUTLIER}
        for number in range(len(channels.names))
    ]


def thickness_histogram(cases: Sequence[CaseSummary]) -> dict[str, int]:
    """Count cases by slice thickness (the largest spacing), in bins of half a millimetre."""
    bins = Counter(int(case.thickness / BIN + 1e-6) for case in cases if case.geometry)
    return {f"{number * BIN:g}-{(number + 1) * BIN:g} mm": bins[number] for number in sorted(bins)}


def _duplicates(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    by_hash: dict[str, list[CaseSummary]] = defaultdict(list)
    for case in cases:
        for image_hash in dict.fromkeys(channel.hash for channel in case.channels.values()):
            by_hash[image_hash].append(case)
    reported = set()
    for same in by_hash.values():
        first, *others = sorted(same, key=lambda case: case.folder != "imagesTs")  # a test case, if there is one
        for other in others:
            if (str(first), str(other)) not in reported:
                reported.add((str(first), str(other)))
                level = ERROR if (first.folder == "imagesTs") != (other.folder == "imagesTs") else WARNING
                yield Finding(level, "duplicate", str(other), f"has an image with the same voxels as one of {first}")


def _same_names(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    for name, folders in _first_cases({str(case): case.name for case in cases}, cases).items():
        if len(folders) > 1:
            case = f"{sorted(folders)[-1]}/{name}"
            yield Finding(WARNING, "same name", case, f"has a name that occurs in {' and in '.join(sorted(folders))}")


def _shared_patients(cases: Sequence[CaseSummary], patients: Mapping[str, str]) -> Iterator[Finding]:
    patient_of = {str(case): patients[case.name] for case in cases if case.name in patients}
    for patient, folders in _first_cases(patient_of, cases).items():
        if len(folders) > 1:
            level = ERROR if "imagesTs" in folders else WARNING
            listed = " and ".join(folders[folder] for folder in sorted(folders))
            text = f"is of patient {patient}: {listed}"
            yield Finding(level, "patient on two sides", folders[sorted(folders)[-1]], text)


def _first_cases(keys: Mapping[str, str], cases: Sequence[CaseSummary]) -> dict[str, dict[str, str]]:
    """Return the first case by key and folder; `keys` holds the key of each case."""
    folders: dict[str, dict[str, str]] = defaultdict(dict)
    for case in cases:
        if str(case) in keys:
            folders[keys[str(case)]].setdefault(case.folder, str(case))
    return folders


def _other_axes(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    orientations = Counter(case.orientation for case in cases if case.geometry)
    most = max(orientations, key=lambda name: orientations[name], default="")
    for case in cases:
        if case.geometry and case.orientation != most:
            text = f"has axes {case.orientation}, most have {most}: nnU-Net does not reorient images"
            yield Finding(WARNING, "orientation", str(case), text)


def _thick_axes(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    for case in cases:
        if case.geometry is None:
            continue
        thick = int(np.argmax(case.geometry.spacing))
        finer = sorted(case.geometry.spacing)[-2]
        if thick != 2 and case.thickness > 2 * finer:
            text = f"has thick slices along {'xyz'[thick]}, while most scans have them along z"
            yield Finding(WARNING, "orientation", str(case), text)


def _mirror_images(cases: Sequence[CaseSummary], labels: Labels) -> Iterator[Finding]:
    """Yield findings about images that teach the wrong side, as nnU-Net takes voxels as they are stored."""
    label = label_with_side(labels.values)
    right_handed = [case for case in cases if case.geometry and is_right_handed(case.geometry)]
    left_handed = [case for case in cases if case.geometry and not is_right_handed(case.geometry)]
    if label is None or not right_handed or not left_handed:
        return
    few, many = sorted((right_handed, left_handed), key=len)
    for case in few:
        text = (
            f"is stored as a mirror image of most others (axes {case.orientation}, such as {many[0]} "
            f"{many[0].orientation}), and the label {label} names a side: give all the same axes"
        )
        yield Finding(ERROR, "mirror image", str(case), text)


def _geometry_outliers(cases: Sequence[CaseSummary]) -> Iterator[Finding]:
    """Yield findings about spacings and extents that are a multiple, or a fraction, of those of the other cases."""
    readable = [(case, case.geometry) for case in cases if case.geometry]
    if len(readable) < FEWEST_GEOMETRIES:
        return
    spacings = np.array([geometry.spacing for _, geometry in readable])
    extents = spacings * [geometry.size for _, geometry in readable]
    for what, values in (("a spacing", spacings), ("an extent", extents)):
        scores = np.stack([robust_z(np.log(column).tolist(), SMALLEST_RATIO) for column in values.T], axis=1)
        for (case, _), own, score in zip(readable, values, np.abs(scores), strict=True):
            if score.max() > OUTLIER:
                axis = int(np.argmax(score))
                usual = float(np.median(values[:, axis]))
                text = f"has {what} of {own[axis]:.4g} mm along {'xyz'[axis]}, the median is {usual:.4g} mm"
                yield Finding(WARNING, "geometry", str(case), text)


def _intensity_outliers(cases: Sequence[CaseSummary], channels: Channels) -> Iterator[Finding]:
    by_name = {str(case): case for case in cases}
    for number, name in enumerate(channels.headings):
        for case, (median_score, p99_score) in intensity_scores(cases, number).items():
            channel = by_name[case].channels[number]
            scores = (("median", channel.median, median_score), ("99th percentile", channel.p99, p99_score))
            for measure, value, score in scores:
                if abs(score) > OUTLIER:
                    text = f"has {name} with a {measure} of {value:g}, a robust z-score of {score:+.1f}"
                    yield Finding(WARNING, "intensity", case, text)


def _clipped_ct(cases: Sequence[CaseSummary], channels: Channels) -> Iterator[Finding]:
    for number, name in enumerate(channels.names):
        text = clipping_of([case.ct[number] for case in cases if number in case.ct], name)
        if text is not None:
            yield Finding(WARNING, "CT clipping", "", text)


def _label_findings(cases: Sequence[CaseSummary], labels: Labels) -> Iterator[Finding]:
    labelled = [case for case in cases if case.volumes is not None and case.folder == "imagesTr"]
    for value in labels.foreground:
        if labelled and not any(value in (case.volumes or {}) for case in labelled):
            yield Finding(WARNING, "unused label", "", f"label {value} of dataset.json occurs in no case of labelsTr")
    if empty := empty_labels(cases, labels):
        text = f"{len(empty)} of {len(labelled)} labels in labelsTr are empty; --list_empty lists them"
        yield Finding(WARNING, "empty label", "", text)


def empty_labels(cases: Sequence[CaseSummary], labels: Labels) -> list[str]:
    """Return the names of training cases without any foreground."""
    return [
        case.name
        for case in cases
        if case.folder == "imagesTr" and case.volumes is not None and not set(case.volumes) - {labels.ignore}
    ]
