"""Contrasts that were not acquired: images of zeros in their place, and a record of which contrasts are real.

nnU-Net insists on a file for every channel of every case. Exact zeros stand for an absent contrast: z-score
normalisation and resampling leave them zero, so that whoever reads the preprocessed volume can tell. What is in the
files decides, not their dates: a file of zeros that the record names was filled here, one that it does not name was
given so (blank), and as soon as it holds anything else it is present, however it was copied, touched or compressed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tqdm import tqdm

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.files import read_json, write_json
from nnunet_vit_mae.imaging.channels import (
    IMAGE_ENDINGS,
    case_and_channel,
    channel_file_name,
    visible_files,
    without_ending,
)
from nnunet_vit_mae.imaging.volumes import (
    Geometry,
    only_zeros,
    read_geometry,
    without_warnings_of_itk,
    write_zeros,
)

CONTRAST_RECORD = "contrasts.json"
LABELS_BESIDE = {"imagesTr": "labelsTr", "imagesTs": None, "imagesUn": None}  # without images, test labels do no harm


@dataclass(frozen=True)
class Channels:
    """Names of the contrasts in the order of their channel numbers, and the ending of image files."""

    names: list[str]
    ending: str


@dataclass(frozen=True)
class Contrasts:
    """Names of a case's contrasts, in the order of the channels: acquired, filled by us, and given as all zeros."""

    present: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)


Record = dict[str, dict[str, Contrasts]]  # by folder, then by case, both sorted


@dataclass(frozen=True)
class RawCase:
    """Images of one case by channel number, and files in its folder that look like images but are not named so."""

    folder: Path
    name: str
    files: dict[int, Path] = field(default_factory=dict)
    misnamed: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.folder.name}/{self.name}"


@dataclass(frozen=True)
class Sorted:
    """What a look at a case gave: either its contrasts, and the files to write like a present one, or a problem."""

    case: RawCase
    contrasts: Contrasts | None = None
    to_write: list[Path] = field(default_factory=list)
    like: Path | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Filling:
    """What was done: the record as it is now, files written, filled ones that are real now, and problems by case."""

    channels: Channels
    record: Record
    written: list[Path]
    replaced: list[str]
    problems: dict[str, str]


def fill_contrasts(raw: Path) -> Filling:
    """Write the missing channels of all cases in the raw data set `raw`, and which are present to contrasts.json.

    No image that was given is changed, and a second call writes nothing. The record is written first: should the
    command be killed, the next call still knows which files are its own, and writes those that are missing.
    Raises `UserError` when nothing can be filled; a problem of one case is reported and stops none of the others.
    """
    channels = read_channels(raw)
    former = read_contrasts(raw)
    cases = find_raw_cases(raw, channels)
    if not any(case.files for case in cases):
        raise UserError(
            f"There are no images such as CASE_0000{channels.ending} in {', '.join(LABELS_BESIDE)} of {raw}: "
            "put the images there, named as nnU-Net wants them."
        )
    with without_warnings_of_itk():
        findings = [sort_contrasts(case, channels, former) for case in tqdm(cases, unit="case", desc="looking")]
    _refuse_absent_ct(findings, raw)
    record = _record(findings, former)
    to_fill = [finding for finding in findings if finding.to_write]
    _check_access([finding.case.folder for finding in to_fill] + [raw] * (record != former))
    if record != former:
        content = {name: {case: asdict(of_case) for case, of_case in cases.items()} for name, cases in record.items()}
        write_json(content, raw / CONTRAST_RECORD)
    problems = {str(finding.case): finding.problem for finding in findings if finding.problem}
    written = []
    for finding in tqdm(to_fill, unit="case", desc="filling", disable=not to_fill):
        _fill(finding)
        written += finding.to_write
    return Filling(channels, record, written, list(_replaced(former, record)), problems)


def read_channels(raw: Path) -> Channels:
    """What dataset.json says of the images; raises `UserError` when it says too little or has no channels to fill."""
    file = raw / "dataset.json"
    content = read_json(file)
    names = content.get("channel_names") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f'{file} has no channel_names: add them as in {{"0": "FLAIR", "1": "T1"}}.')
    ordered: list[Any] = [names.get(str(number)) for number in range(len(names))]
    if not all(isinstance(name, str) for name in ordered) or len(set(ordered)) < len(names):
        raise UserError(f'channel_names in {file} must be "0", "1" and so on, each with a name of its own.')
    if "dataset" in content:
        raise UserError(f"{file} lists its files under dataset: only images in imagesTr and so on can be filled.")
    if content.get("file_ending") not in IMAGE_ENDINGS:
        raise UserError(
            f"file_ending in {file} is {content.get('file_ending', 'missing')}, but contrasts are filled only in "
            f"files that SimpleITK reads with spacing and origin: {', '.join(IMAGE_ENDINGS)}."
        )
    return Channels(ordered, content["file_ending"])


def read_contrasts(raw: Path) -> Record:
    """The record of a former call; empty when there was none. Raises `UserError` for anything else in that file."""
    file = raw / CONTRAST_RECORD
    if not file.exists():
        return {}
    content = read_json(file)
    try:
        return {
            folder: {case: Contrasts(**of_case) for case, of_case in cases.items()} for folder, cases in content.items()
        }
    except (AttributeError, TypeError):
        raise UserError(
            f"{file} is not a record of mae3d_fill_contrasts: remove it, and the command writes it anew."
        ) from None


def find_raw_cases(raw: Path, channels: Channels) -> list[RawCase]:
    """Cases of the three image folders by name, and those that have a label only."""
    cases = []
    for folder_name, labels in LABELS_BESIDE.items():
        folder, found = raw / folder_name, {}
        for file in _image_files(folder):
            name, number = _case_and_channel(file.name, channels.ending)
            case = found.setdefault(name, RawCase(folder, name))
            if number is None:
                case.misnamed.append(file)
            else:
                case.files[number] = file
        for file in _image_files(raw / labels) if labels else ():
            if file.name.endswith(channels.ending):
                name = file.name.removesuffix(channels.ending)
                found.setdefault(name, RawCase(folder, name))
        cases += [found[name] for name in sorted(found)]
    return cases


def sort_contrasts(case: RawCase, channels: Channels, former: Record) -> Sorted:
    """Sort the contrasts of a case; only headers are read, and the voxels of files that could be all zeros."""
    if case.misnamed:
        expected = f"{case.name}_0000{channels.ending}"
        return Sorted(case, problem=f"has an image named {case.misnamed[0].name}: it must be named like {expected}")
    if not case.files:
        return Sorted(case, problem="has a label, but no image: add its images or remove the label")
    if beyond := [number for number in sorted(case.files) if number >= len(channels.names)]:
        last = f"{len(channels.names) - 1:04d}"
        return Sorted(case, problem=f"has a channel {beyond[0]:04d}, but the last one in dataset.json is {last}")
    try:
        geometries = {number: read_geometry(file) for number, file in sorted(case.files.items())}
        zeros = {number for number, file in case.files.items() if only_zeros(file, geometries[number])}
    except Exception as error:  # noqa: BLE001  readers raise many kinds, and all other cases must be done
        return Sorted(case, problem=f"has an image that cannot be read: {reader_reason(error)}")
    return _sort(case, channels, former, geometries, zeros)


def _sort(
    case: RawCase, channels: Channels, former: Record, geometries: dict[int, Geometry], zeros: set[int]
) -> Sorted:
    of_case = former.get(case.folder.name, {}).get(case.name, Contrasts())
    ours = {number for number in zeros if channels.names[number] in of_case.filled}
    given = [number for number in geometries if number not in ours]
    present = [number for number in given if number not in zeros]
    if not present:
        return Sorted(case, problem="has no contrast, its images are all zeros: add an image or remove the case")
    like = present[0]
    differences = {number: geometries[like].difference(geometries[number]) for number in geometries}
    for number in given:
        if differences[number]:
            both = f"{case.files[like].name} and {case.files[number].name}"
            differ = f"differ in {differences[number]}"
            return Sorted(case, problem=f"has images that {differ}, {both}: resample one to the other")
    missing = set(range(len(channels.names))) - set(geometries)
    outdated = {number for number in ours if differences[number]}  # filled like an image that has been replaced
    lists = ([channels.names[number] for number in sorted(kind)] for kind in (present, missing | ours, zeros - ours))
    to_write = [
        case.folder / channel_file_name(case.name, number, channels.ending) for number in sorted(missing | outdated)
    ]
    return Sorted(case, Contrasts(*lists), to_write, case.files[like])


def _fill(finding: Sorted) -> None:
    assert finding.like is not None
    for file in finding.to_write:
        for leftover in file.parent.glob(f".[0-9]*.{escape(file.name)}"):  # of a call that was killed while it wrote
            leftover.unlink()
        try:
            write_zeros(file, finding.like)
        except (OSError, RuntimeError) as error:  # RuntimeError is SimpleITK's
            raise UserError(
                f"{file} cannot be written ({reader_reason(error)}): mend that and run the command again; "
                "what it has written so far is whole."
            ) from None


def _refuse_absent_ct(findings: list[Sorted], raw: Path) -> None:
    """Zeros would not stay zeros: nnU-Net subtracts the data set's mean from a channel of that name."""
    for finding in findings:
        absent = finding.contrasts.filled + finding.contrasts.blank if finding.contrasts else []
        for name in absent:
            if name.casefold() == "ct":  # as nnU-Net compares it
                raise UserError(
                    f"{finding.case} lacks {name}, and nnU-Net's normalisation of a channel of that name would turn "
                    f"zeros into other numbers: rename the channel in {raw / 'dataset.json'}, for instance to CT_scan, "
                    "which gets the z-scores of other contrasts."
                )


def _check_access(folders: list[Path]) -> None:
    for folder in dict.fromkeys(folders):
        try:
            TemporaryFile(dir=folder).close()  # the only honest test: permissions say little on a network drive
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to ({error.strerror}): get write access, or copy the data set to where "
                "you have it."
            ) from None


def _record(findings: list[Sorted], former: Record) -> Record:
    """What was found; a case with a problem keeps what was known of it, so that files filled earlier stay known."""
    record: Record = defaultdict(dict)
    for finding in findings:
        folder, name = finding.case.folder.name, finding.case.name
        contrasts = finding.contrasts or former.get(folder, {}).get(name)
        if contrasts:
            record[folder][name] = contrasts
    return dict(record)


def _replaced(former: Record, record: Record) -> Iterator[str]:
    for folder, cases in record.items():
        for case, contrasts in cases.items():
            filled = former.get(folder, {}).get(case, Contrasts()).filled
            yield from (f"{name} of {folder}/{case}" for name in contrasts.present if name in filled)


def _case_and_channel(file_name: str, ending: str) -> tuple[str, int | None]:
    """Return the case and the channel number, None where nnU-Net would not take the file for a channel."""
    name, channel = case_and_channel(file_name.removesuffix(ending))
    if file_name.endswith(ending) and channel is not None:
        return name, channel
    return case_and_channel(without_ending(file_name, IMAGE_ENDINGS))[0], None


def _image_files(folder: Path) -> list[Path]:
    """List whatever could be an image, in nnU-Net's ending or another one."""
    files = visible_files(folder) if folder.is_dir() else []
    return [file for file in files if file.name.lower().endswith(IMAGE_ENDINGS)]
