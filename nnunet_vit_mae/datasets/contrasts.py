"""Contrasts that were not acquired: images of zeros in their place, and a record of which contrasts are real.

nnU-Net requires a file for every channel of every case. Exact zeros stand for an absent contrast: z-score
normalisation and resampling keep them, so that the preprocessed volume shows which contrasts are absent. The voxels of
a file decide, not its date: a file of zeros that the record lists was filled here, and one that it does not list was
given as zeros (blank). A file with any other content is present, however it was copied, touched or compressed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_vit_mae.datasets.acquisition import CASE, CONTRASTS, SCANS_TABLE, read_scans_table
from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.imaging.channels import (
    IMAGE_ENDINGS,
    case_and_channel,
    channel_file_name,
    visible_files,
    without_ending,
)
from nnunet_vit_mae.imaging.ct_clipping import is_ct
from nnunet_vit_mae.imaging.description import DESCRIPTION, read_description
from nnunet_vit_mae.imaging.volumes import (
    Geometry,
    only_zeros,
    read_geometry,
    without_warnings_of_itk,
)
from nnunet_vit_mae.imaging.writing import write_zeros
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_records
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import locked, write_json

CONTRAST_RECORD = "contrasts.json"
LABELS_BESIDE = {"imagesTr": "labelsTr", "imagesTs": None, "imagesUn": None}  # test labels without images are harmless


@dataclass(frozen=True)
class Channels:
    """Names of the contrasts in the order of their channels, and the ending of image files."""

    names: list[str]
    ending: str

    @property
    def headings(self) -> list[str]:
        """Names for a reader, each with its number if several channels share it, as nnU-Net allows.

        Example:
            >>> Channels(["T1", "noNorm", "noNorm"], ".nii.gz").headings
            ['T1', 'noNorm (0001)', 'noNorm (0002)']
        """
        shared = {name for name, count in Counter(self.names).items() if count > 1}
        return [f"{name} ({number:04d})" if name in shared else name for number, name in enumerate(self.names)]


@dataclass(frozen=True)
class Contrasts:
    """Names of a case's contrasts, in the order of the channels: acquired, filled here, and given as all zeros."""

    present: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)


ContrastRecord = dict[str, dict[str, Contrasts]]  # by folder, then by case, both sorted


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


@dataclass(frozen=True)
class FillResult:
    """The new record, files written, filled images that were replaced by real ones, and problems by case.

    `corrected` are the cases whose contrasts were outdated in `scans.csv`.
    """

    channels: Channels
    record: ContrastRecord
    written: list[Path]
    replaced: list[str]
    problems: dict[str, str]
    corrected: list[str] = field(default_factory=list)


def fill_contrasts(raw: Path, *, is_locked: bool = False) -> FillResult:
    """Write the missing channels of all cases in the raw dataset `raw`, and record in contrasts.json what is present.

    Given images are never changed, and a second call writes nothing. The record is written first, so that after a
    killed call the next one still knows which files were filled and writes the missing ones. A problem with one case is
    reported and does not stop the others. In `scans.csv` the column of the contrasts that are present is corrected.

    Args:
        raw: The raw dataset.
        is_locked: Whether the caller holds `locked(raw)` already.

    Raises:
        UserError: If nothing can be filled, `scans.csv` is no table of cases, or another process writes to the dataset.
    """
    channels = read_channels(raw)
    if len(set(channels.names)) < len(channels.names):
        raise UserError(
            f"channel_names in {raw / DESCRIPTION} has one name twice, but contrasts are recorded by name: give each "
            "a name of its own."
        )
    former = read_contrasts(raw)
    cases = find_case_images(raw, channels)
    if not any(case.files for case in cases):
        raise UserError(
            f"There are no images such as CASE_0000{channels.ending} in {', '.join(LABELS_BESIDE)} of {raw}: "
            "put the images there, with the names that nnU-Net expects."
        )
    with without_warnings_of_itk():
        read = with_progress(cases, unit="case", desc="reading")
        sorted_cases = [sort_contrasts(case, channels, former) for case in read]
    _refuse_absent_ct(sorted_cases, raw)
    record = _new_record(sorted_cases, former)
    scans, corrected = _corrected_scans(raw, record, channels.names)
    to_fill = [case for case in sorted_cases if case.to_write]
    _check_access([case.images.folder for case in to_fill])
    problems = {str(case.images): case.problem for case in sorted_cases if case.problem}
    written: list[Path] = []
    if record != former or to_fill or corrected:  # what is complete may be write-protected
        with nullcontext() if is_locked else locked(raw):
            if read_contrasts(raw) != former:
                raise UserError(f"{raw / CONTRAST_RECORD} has changed while images were being read: run this again.")
            if record != former:
                _check_access([raw])
                write_contrasts(record, raw)
            if corrected:
                _check_access([raw])
                write_records(scans, list(scans[0]), raw / SCANS_TABLE)
            for case in with_progress(to_fill, unit="case", desc="filling"):
                files = _fill(case)
                written += files
                if come := [file.name for file in case.to_write if file not in files]:
                    problems[str(case.images)] = f"got {come[0]} while images were being read: run the command again"
    return FillResult(channels, record, written, list(_replaced(former, record)), problems, corrected)


def contrast_table(result: FillResult) -> str:
    """Return, for each contrast and folder, in how many cases the contrast is present, filled and blank."""
    kinds = ("present", "filled", "blank")
    rows = [f"{'contrast':16}  {'folder':8}" + "".join(f"  {kind:>7}" for kind in kinds)]
    counts = Counter(
        (name, folder, kind)
        for folder, cases in result.record.items()
        for contrasts in cases.values()
        for kind in kinds
        for name in getattr(contrasts, kind)
    )
    for name in result.channels.names:
        for folder in result.record:
            rows.append(f"{name:16}  {folder:8}" + "".join(f"  {counts[name, folder, kind]:7}" for kind in kinds))
    return "\n".join(rows)


def read_channels(raw: Path) -> Channels:
    """Read the channels from dataset.json; raises `UserError` if it does not describe channels that can be filled."""
    file = raw / DESCRIPTION
    description = read_description(file)
    names, ending = description.channels, description.needed("file_ending")
    if "dataset" in description.content:
        raise UserError(f"{file} lists its files under dataset: move the images to imagesTr and remove the list.")
    if ending not in IMAGE_ENDINGS:
        raise UserError(
            f"file_ending in {file} is {ending}, but must be a format with spacing and origin: "
            f"{', '.join(IMAGE_ENDINGS)}."
        )
    return Channels(names, ending)


def read_contrasts(raw: Path) -> ContrastRecord:
    """Read the record of an earlier call, empty if there is none; raises `UserError` if the file is something else."""
    file = raw / CONTRAST_RECORD
    if not file.exists():
        return {}
    return read_entries(ContrastRecord, file, "remove it, and mae3d_fill_contrasts writes a new one")


def write_contrasts(record: ContrastRecord, raw: Path) -> None:
    """Write the record of a dataset."""
    content = {
        folder: {name: asdict(contrasts) for name, contrasts in cases.items()} for folder, cases in record.items()
    }
    write_json(content, raw / CONTRAST_RECORD)


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


def _fill(case: SortedCase) -> list[Path]:
    """Write the images of zeros of a case, but not over an image that has come since; returns the files written."""
    assert case.like is not None
    files = [file for file in case.to_write if _is_free(file)]
    for file in files:
        for leftover in file.parent.glob(f".[0-9]*.{escape(file.name)}"):  # of a call that was killed while writing
            leftover.unlink()
        write_zeros(file, case.like)
    return files


def _is_free(file: Path) -> bool:
    """Return whether a file is not there, or holds zeros only."""
    try:
        return not file.exists() or only_zeros(file, read_geometry(file))
    except Exception:  # noqa: BLE001  readers raise many kinds: the image is being copied, perhaps
        return False


def _refuse_absent_ct(cases: list[SortedCase], raw: Path) -> None:
    """Raise `UserError` if a CT is absent: nnU-Net shifts CT by its mean, so that zeros would not stay zero."""
    for case in cases:
        absent = case.contrasts.filled + case.contrasts.blank if case.contrasts else []
        for name in absent:
            if is_ct(name):
                raise UserError(
                    f"{case.images} lacks {name}, and nnU-Net's normalisation of a channel of that name does not keep "
                    f"zeros: rename the channel in {raw / DESCRIPTION}, for instance to CT_scan, which is "
                    "normalised to z-scores like other contrasts."
                )


def _check_access(folders: list[Path]) -> None:
    for folder in dict.fromkeys(folders):
        try:
            TemporaryFile(dir=folder).close()  # permissions alone do not tell on a network drive
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to ({error.strerror}): get write access, or copy the dataset to a folder "
                "of your own."
            ) from None


def _new_record(cases: list[SortedCase], former: ContrastRecord) -> ContrastRecord:
    """Return the new record; a case with a problem keeps its entry, so that files filled earlier stay known."""
    record: ContrastRecord = defaultdict(dict)
    for case in cases:
        folder, name = case.images.folder.name, case.images.name
        contrasts = case.contrasts or former.get(folder, {}).get(name)
        if contrasts:
            record[folder][name] = contrasts
    return dict(record)


def _corrected_scans(raw: Path, record: ContrastRecord, names: list[str]) -> tuple[list[dict[str, str]], list[str]]:
    """Return the rows of `scans.csv` with the contrasts that are present, and the cases that had others there.

    Cells that hold anything but `names` stay as they are, and so does a case of two folders. Raises `UserError` if the
    table cannot be used.
    """
    if not (raw / SCANS_TABLE).is_file():
        return [], []
    cases = Counter(case for of_folder in record.values() for case in of_folder)
    present = {case: entry.present for of_folder in record.values() for case, entry in of_folder.items()}
    columns = read_scans_table(raw / SCANS_TABLE, list(cases)).columns
    rows = [{name: column[case] for name, column in columns.items()} for case in columns[CASE]]
    corrected = []
    for row in rows:
        if CONTRASTS not in row or cases[row[CASE]] != 1 or not {*row[CONTRASTS].split(";")} <= {*names, ""}:
            continue
        if row[CONTRASTS] != (now := ";".join(present[row[CASE]])):
            row[CONTRASTS] = now
            corrected.append(row[CASE])
    return rows, corrected


def _replaced(former: ContrastRecord, record: ContrastRecord) -> Iterator[str]:
    """Yield the contrasts that were filled and are acquired images now."""
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
    """List all files that could be images, whatever the dataset's file ending."""
    files = visible_files(folder) if folder.is_dir() else []
    return [file for file in files if file.name.lower().endswith(IMAGE_ENDINGS)]
