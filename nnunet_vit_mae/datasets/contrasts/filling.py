"""Write images of zeros for contrasts that were not acquired.

nnU-Net requires a file for every channel of every case. Exact zeros stand for an absent contrast: z-score
normalisation and resampling keep them, so that the preprocessed volume shows which contrasts are absent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from tempfile import TemporaryFile

from nnunet_vit_mae.datasets.acquisition import CASE, CONTRASTS, SCANS_TABLE, read_scans_table
from nnunet_vit_mae.datasets.contrasts.cases import LABELS_BESIDE, SortedCase, find_case_images, sort_contrasts
from nnunet_vit_mae.datasets.contrasts.record import (
    CONTRAST_RECORD,
    Channels,
    ContrastRecord,
    Contrasts,
    read_channels,
    read_contrasts,
    write_contrasts,
)
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.ct_clipping import is_ct
from nnunet_vit_mae.imaging.description import DESCRIPTION
from nnunet_vit_mae.imaging.volumes import only_zeros, read_geometry, without_warnings_of_itk
from nnunet_vit_mae.imaging.writing import write_zeros
from nnunet_vit_mae.progress import with_progress
from nnunet_vit_mae.storage.csv_tables import write_records
from nnunet_vit_mae.storage.files import locked


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
    _check_access([*(case.images.folder for case in to_fill), *([raw] if record != former or corrected else [])])
    problems = {str(case.images): case.problem for case in sorted_cases if case.problem}
    written: list[Path] = []
    if record != former or to_fill or corrected:  # what is complete may be write-protected
        with nullcontext() if is_locked else locked(raw):
            if read_contrasts(raw) != former:
                raise UserError(f"{raw / CONTRAST_RECORD} has changed while images were being read: run this again.")
            if record != former:
                write_contrasts(record, raw)
            if corrected:
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
    rows = list(read_scans_table(raw / SCANS_TABLE, list(cases)).rows.values())
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
