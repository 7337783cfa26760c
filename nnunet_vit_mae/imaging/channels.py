"""How nnU-Net names image files: `CASE_0000.nii.gz`, where 0000 is the channel; labels are `CASE.nii.gz`."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nnunet_vit_mae.errors import UserError

NIFTI = (".nii.gz", ".nii")
IMAGE_ENDINGS = (*NIFTI, ".nrrd", ".mha", ".gipl")  # formats that nnU-Net reads with their geometry


def case_and_channel(stem: str) -> tuple[str, int | None]:
    """Split a file name without its ending into the case and the channel number, None if it does not end with one.

    >>> case_and_channel("head_12_0001"), case_and_channel("head_12")
    (('head_12', 1), ('head_12', None))
    """
    match = re.fullmatch(r"(.+)_([0-9]{4})", stem, flags=re.DOTALL)
    return (match[1], int(match[2])) if match else (stem, None)


def channel_file_name(case: str, channel: int, ending: str) -> str:
    """Return the file name of one channel of a case; the ending has its dot.

    >>> channel_file_name("head_12", 1, ".nii.gz")
    'head_12_0001.nii.gz'
    """
    return f"{case}_{channel:04d}{ending}"


def without_ending(name: str, endings: Sequence[str]) -> str:
    """Remove one of these endings from a file name, in capitals or not; the longer endings come first.

    >>> without_ending("head.NII.GZ", (".nii.gz", ".nii"))
    'head'
    """
    return re.sub(rf"({'|'.join(map(re.escape, endings))})$", "", name, flags=re.IGNORECASE)


def visible_files(folder: Path) -> list[Path]:
    """List the files of a folder, sorted, except hidden ones such as the ._case.nii.gz that macOS leaves behind.

    A link to a file that is gone is listed too, so that it is not passed over.
    """
    return sorted(file for file in folder.iterdir() if not file.is_dir() and not is_hidden(file.name))


def is_hidden(name: str) -> bool:
    """Return whether people do not see a file or folder; macOS leaves ._case.nii.gz and __MACOSX behind."""
    return name.startswith(".") or name == "__MACOSX"


def other_formats(folder: Path) -> str:
    """Return what files a folder has in place of images, in brackets and after a space, or an empty string."""
    endings = sorted({file.suffix or file.name for file in visible_files(folder)})
    return f" (only files in {' and '.join(endings[:5])})" if endings else ""


def visible_below(folder: Path) -> list[Path]:
    """List the files below a folder, sorted, except hidden ones and those in hidden folders; the folder may be missing.

    Links to folders are followed, to each folder once. A link to a file that is gone is listed too, so that it is not
    passed over. Raises `UserError`, which names no folder below this one, if one of them cannot be read.
    """

    def refuse(error: OSError) -> None:
        reason = f"A folder in {folder} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: change its permissions, or take it out.") from None

    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True) if folder.is_dir() else ():
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else sorted(name for name in folders if not is_hidden(name))
        found += [Path(place, name) for name in names if real not in seen and not is_hidden(name)]
        seen.add(real)
    return sorted(found)


def channels_by_case(folder: Path, ending: str) -> tuple[dict[str, dict[int, Path]], list[Path]]:
    """Return the images of a folder by case and channel number, both sorted, and the files whose name has no number.

    The folder need not exist.
    """
    cases: dict[str, dict[int, Path]] = defaultdict(dict)
    misnamed = []
    for file in cases_in(folder, ending).values():
        case, channel = case_and_channel(file.name.removesuffix(ending))
        if channel is None:
            misnamed.append(file)
        else:
            cases[case][channel] = file
    return {case: cases[case] for case in sorted(cases)}, misnamed


def cases_in(folder: Path, ending: str) -> dict[str, Path]:
    """Return the files of a folder, sorted, by their name without the ending, which is the case if they are labels.

    The folder need not exist.
    """
    files = visible_files(folder) if folder.is_dir() else []
    return {file.name.removesuffix(ending): file for file in files if file.name.endswith(ending)}


def ending_in(folder: Path, flag: str) -> str:
    """Return the file ending of the images in a folder, which the user has named with a flag.

    Raises `UserError` if the folder is missing, has no images, or has images of several formats.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: check {flag}.")
    endings = {ending for file in visible_files(folder) for ending in IMAGE_ENDINGS if file.name.endswith(ending)}
    if len(endings) != 1:
        raise UserError(
            f"{folder} must hold images of one format ({', '.join(IMAGE_ENDINGS)}), but has "
            f"{' and '.join(sorted(endings)) or f'none{other_formats(folder)}'}: check {flag}."
        )
    return endings.pop()
