"""The images of each case, sorted into contrasts that are present, filled here, and given as zeros (blank).

The voxels of a file decide, not its date: a file of zeros that the record lists was filled here, and one that it does
not list was given as zeros. A file with any other content is present, however it was copied, touched or compressed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nnunet_vit_mae.datasets.contrasts.record import Channels, ContrastRecord, Contrasts
from nnunet_vit_mae.errors import reader_reason
from nnunet_vit_mae.imaging.channels import (
    IMAGE_ENDINGS,
    case_and_channel,
    channel_file_name,
    visible_files,
    without_ending,
)
from nnunet_vit_mae.imaging.volumes import Geometry, only_zeros, read_geometry

LABELS_BESIDE = {"imagesTr": "labelsTr", "imagesTs": None, "imagesUn": None}  # test labels without images are harmless


@dataclass(frozen=True)
class CaseImages:
    """Images of one case by channel number, and image files of the case that nnU-Net would not find by their name."""

    folder: Path
    name: str
    files: dict[int, Path] = field(default_factory=dict)
    misnamed: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.folder.name}/{self.name}"


@dataclass(frozen=True)
class SortedCase:
    """The contrasts of a case and the files to write with the geometry of `like`, or the problem with the case."""

    images: CaseImages
    contrasts: Contrasts | None = None
    to_write: list[Path] = field(default_factory=list)
    like: Path | None = None
    problem: str | None = None


def find_case_images(raw: Path, channels: Channels) -> list[CaseImages]:
    """Find the cases of the three image folders, sorted by name, including those that only have a label."""
    cases = []
    for folder_name, labels in LABELS_BESIDE.items():
        folder, by_name = raw / folder_name, {}
        for file in _image_files(folder):
            name, number = _case_and_channel(file.name, channels.ending)
            case = by_name.setdefault(name, CaseImages(folder, name))
            if number is None:
                case.misnamed.append(file)
            else:
                case.files[number] = file
        for file in _image_files(raw / labels) if labels else ():
            if file.name.endswith(channels.ending):
                name = file.name.removesuffix(channels.ending)
                by_name.setdefault(name, CaseImages(folder, name))
        cases += [by_name[name] for name in sorted(by_name)]
    return cases


def sort_contrasts(case: CaseImages, channels: Channels, former: ContrastRecord) -> SortedCase:
    """Sort the contrasts of a case; besides headers, only the voxels of files that could be all zeros are read."""
    if case.misnamed:
        expected = f"{case.name}_0000{channels.ending}"
        return SortedCase(case, problem=f"has an image named {case.misnamed[0].name}: it must be named like {expected}")
    if not case.files:
        return SortedCase(case, problem="has a label, but no image: add its images or remove the label")
    if beyond := [number for number in sorted(case.files) if number >= len(channels.names)]:
        last = f"{len(channels.names) - 1:04d}"
        return SortedCase(case, problem=f"has a channel {beyond[0]:04d}, but the last one in dataset.json is {last}")
    try:
        geometries = {number: read_geometry(file) for number, file in sorted(case.files.items())}
        zeros = {number for number, file in case.files.items() if only_zeros(file, geometries[number])}
    except Exception as error:  # noqa: BLE001  readers raise many kinds, and the other cases are filled too
        return SortedCase(case, problem=f"has an image that cannot be read: {reader_reason(error)}")
    return _sort_readable(case, channels, former, geometries, zeros)


def _sort_readable(
    case: CaseImages, channels: Channels, former: ContrastRecord, geometries: dict[int, Geometry], zeros: set[int]
) -> SortedCase:
    recorded = former.get(case.folder.name, {}).get(case.name, Contrasts())
    filled = {number for number in zeros if channels.names[number] in recorded.filled}
    given = [number for number in geometries if number not in filled]
    present = [number for number in given if number not in zeros]
    if not present:
        return SortedCase(case, problem="has only images of zeros: add an acquired image or remove the case")
    like = present[0]
    differences = {number: geometries[like].difference(geometries[number]) for number in geometries}
    for number in given:
        if differences[number]:
            both = f"{case.files[like].name} and {case.files[number].name}"
            differ = f"differ in {differences[number]}"
            return SortedCase(case, problem=f"has images that {differ}, {both}: resample one to the other")
    missing = set(range(len(channels.names))) - set(geometries)
    outdated = {number for number in filled if differences[number]}  # filled like an image that has been replaced
    kinds = (present, missing | filled, zeros - filled)
    contrasts = Contrasts(*([channels.names[number] for number in sorted(kind)] for kind in kinds))
    to_write = [
        case.folder / channel_file_name(case.name, number, channels.ending) for number in sorted(missing | outdated)
    ]
    return SortedCase(case, contrasts, to_write, case.files[like])


def _case_and_channel(file_name: str, ending: str) -> tuple[str, int | None]:
    """Return the case and the channel number, None where nnU-Net would not take the file for a channel."""
    name, channel = case_and_channel(file_name.removesuffix(ending))
    if file_name.endswith(ending) and channel is not None:
        return name, channel
    return case_and_channel(without_ending(file_name, IMAGE_ENDINGS))[0], None


def _image_files(folder: Path) -> list[Path]:
    """List all files that could be images, whatever the dataset's file ending."""
    files = visible_files(folder) if folder.is_dir() else []
    return [file for file in files if file.name.lower().endswith(IMAGE_ENDINGS)]
