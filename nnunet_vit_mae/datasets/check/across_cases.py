"""What only shows between cases: copies, patients on two sides, outliers, other orientations and empty labels."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from nnunet_vit_mae.datasets.check.inspection import ERROR, WARNING, CaseSummary, Finding
from nnunet_vit_mae.datasets.contrasts import Channels
from nnunet_vit_mae.imaging.labels import Labels

OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993)
UNIT = 0.02  # of the usual range from the 1st to the 99th percentile: what differs less than that is alike
FEWEST = 8  # cases without which nothing stands out
BIN = 0.5  # mm of the histogram of slice thickness


def findings_across_cases(
    looks: Sequence[CaseSummary], channels: Channels, labels: Labels, patients: Mapping[str, str]
) -> Iterator[Finding]:
    """Findings about several cases; patients as far as they are known."""
    yield from _copies(looks)
    yield from _names(looks)
    yield from _patients(looks, patients)
    yield from _orientations(looks)
    yield from _outliers(looks, channels)
    yield from _labels(looks, labels)


def robust_z(values: Sequence[float], smallest: float) -> np.ndarray:
    """Distance from the median in units of the median absolute deviation, scaled to a normal distribution.

    `smallest` is the least that a unit is, so that scans that agree closely do not make an outlier of a good one.
    """
    distance = np.asarray(values, float) - np.median(values)
    return distance / max(1.4826 * float(np.median(np.abs(distance))), smallest, 1e-12)


def intensity_scores(looks: Sequence[CaseSummary], number: int) -> dict[str, tuple[float, float]]:
    """Scores of the median and of the 99th percentile of a channel, by case; empty with few cases."""
    having = [look for look in looks if number in look.channels]
    if len(having) < FEWEST:
        return {}
    seen = [look.channels[number] for look in having]
    unit = UNIT * float(np.median([one.p99 - one.p1 for one in seen]))
    medians = robust_z([one.median for one in seen], unit)
    highs = robust_z([one.p99 for one in seen], unit)
    return {str(look): (float(a), float(b)) for look, a, b in zip(having, medians, highs, strict=True)}


def outliers_by_channel(looks: Sequence[CaseSummary], channels: Channels) -> list[set[str]]:
    """Cases that stand out in each channel."""
    return [
        {case for case, scores in intensity_scores(looks, number).items() if max(map(abs, scores)) > OUTLIER}
        for number in range(len(channels.names))
    ]


def thickness_histogram(looks: Sequence[CaseSummary]) -> dict[str, int]:
    """Number of cases by slice thickness (the largest spacing), in bins of half a millimetre."""
    bins = Counter(int(look.thickness / BIN + 1e-6) for look in looks if look.geometry)
    return {f"{number * BIN:g}-{(number + 1) * BIN:g} mm": bins[number] for number in sorted(bins)}


def _copies(looks: Sequence[CaseSummary]) -> Iterator[Finding]:
    by_hash: dict[str, list[CaseSummary]] = defaultdict(list)
    for look in looks:
        for channel in dict.fromkeys(channel.hash for channel in look.channels.values()):
            by_hash[channel].append(look)
    told = set()
    for same in by_hash.values():
        first, *others = sorted(same, key=lambda look: look.folder != "imagesTs")  # a test case, if there is one
        for other in others:
            if (str(first), str(other)) not in told:
                told.add((str(first), str(other)))
                level = ERROR if (first.folder == "imagesTs") != (other.folder == "imagesTs") else WARNING
                yield Finding(level, "duplicate", str(other), f"has an image with the voxels of one of {first}")


def _names(looks: Sequence[CaseSummary]) -> Iterator[Finding]:
    for name, folders in _folders_of({str(look): look.name for look in looks}, looks).items():
        if len(folders) > 1:
            listed = " and in ".join(sorted(folders))
            yield Finding(WARNING, "same name", f"{sorted(folders)[-1]}/{name}", f"has the name of a case in {listed}")


def _patients(looks: Sequence[CaseSummary], patients: Mapping[str, str]) -> Iterator[Finding]:
    of_case = {str(look): patients[look.name] for look in looks if look.name in patients}
    for patient, folders in _folders_of(of_case, looks).items():
        if len(folders) > 1:
            level = ERROR if "imagesTs" in folders else WARNING
            cases = " and ".join(folders[folder] for folder in sorted(folders))
            yield Finding(level, "patient on two sides", folders[sorted(folders)[-1]], f"is {patient}, as {cases} are")


def _folders_of(keys: Mapping[str, str], looks: Sequence[CaseSummary]) -> dict[str, dict[str, str]]:
    """Key -> folder -> the first case there."""
    folders: dict[str, dict[str, str]] = defaultdict(dict)
    for look in looks:
        if str(look) in keys:
            folders[keys[str(look)]].setdefault(look.folder, str(look))
    return folders


def _orientations(looks: Sequence[CaseSummary]) -> Iterator[Finding]:
    orientations = Counter(look.orientation for look in looks if look.geometry)
    most = max(orientations, key=lambda name: orientations[name], default="")
    for look in looks:
        if look.geometry is None:
            continue
        if look.orientation != most:
            text = f"has axes {look.orientation}, most have {most}: nnU-Net does not turn images"
            yield Finding(WARNING, "orientation", str(look), text)
        thick = int(np.argmax(look.geometry.spacing))
        finer = sorted(look.geometry.spacing)[-2]
        if thick != 2 and look.thickness > 2 * finer:
            text = f"has its thick slices across {'xyz'[thick]}, and those of most scans are across z"
            yield Finding(WARNING, "orientation", str(look), text)


def _outliers(looks: Sequence[CaseSummary], channels: Channels) -> Iterator[Finding]:
    by_name = {str(look): look for look in looks}
    for number, name in enumerate(channels.names):
        for case, scores in intensity_scores(looks, number).items():
            channel = by_name[case].channels[number]
            for what, value, score in zip(
                ("median", "99th percentile"), (channel.median, channel.p99), scores, strict=True
            ):
                if abs(score) > OUTLIER:
                    text = f"has {name} with a {what} of {value:g}, {score:+.1f} robust deviations from the other cases"
                    yield Finding(WARNING, "intensity", case, text)


def _labels(looks: Sequence[CaseSummary], labels: Labels) -> Iterator[Finding]:
    labelled = [look for look in looks if look.volumes is not None and look.folder == "imagesTr"]
    for value in labels.foreground:
        if labelled and not any(value in (look.volumes or {}) for look in labelled):
            yield Finding(WARNING, "unused label", "", f"label {value} of dataset.json occurs in no case of labelsTr")
    if empty := empty_labels(looks, labels):
        text = f"{len(empty)} of {len(labelled)} labels in labelsTr are empty; --list_empty names them"
        yield Finding(WARNING, "empty label", "", text)


def empty_labels(looks: Sequence[CaseSummary], labels: Labels) -> list[str]:
    """Training cases without any foreground."""
    return [
        look.name
        for look in looks
        if look.folder == "imagesTr" and look.volumes is not None and not set(look.volumes) - {labels.ignore}
    ]
