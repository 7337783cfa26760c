"""What the header of an image file says itself of spacing and orientation, where readers would fill in or choose.

ITK gives a file without a spacing one of 1 mm, and a NIfTI file may state two orientations and a unit that only some
programs read.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, NIFTI, without_ending

GZIP = b"\x1f\x8b"  # at the start of a gzip file
HEADER = 2**16  # bytes, of which a NIFTI-2 header takes 540
NIFTI_2 = 540  # size of its header, its first entry
UNITS = {1: "metres", 3: "micrometres"}  # codes of NIfTI; 2 is mm, 0 unknown
SAME_SPACING = 0.01  # relative difference that is rounding
NO_SPACING = "states no spacing: write the true one into its header"
CUT_OFF = "is cut off or damaged, copy it again"


class UnreadableHeaderError(ValueError):
    """A header that cannot be read; the message says why, names no file and has no full stop."""


def spacing_problem(file: Path) -> str | None:
    """Return why the spacing that a reader gives is not that of the header, None if it is.

    Args:
        file: An image file; the header of the formats that are not read here always states a spacing.
    """
    try:
        return _problem(file, file.name.lower())
    except UnreadableHeaderError as error:
        return str(error)


def _problem(file: Path, name: str) -> str | None:
    if name.endswith(NIFTI):
        header = read_nifti_header(file)
        if isinstance(header, nibabel.Nifti2Header):
            return "is NIfTI-2, which SimpleITK does not read: save it as NIfTI-1"
        spacing = np.asarray(header["pixdim"][1:4], float)
        if np.isfinite(spacing).all() and (spacing > 0).all():
            return None
        return f"states a spacing of {' '.join(f'{value:g}' for value in spacing)}: write the true one into its header"
    if name.endswith((".nrrd", ".nhdr")):
        start = re.split(rb"\r?\n\r?\n", _start(file))[0]
        return None if re.search(rb"^(space directions|spacings):.*\d", start, re.MULTILINE) else NO_SPACING
    if name.endswith((".mha", ".mhd")):
        start = _start(file).split(b"ElementDataFile")[0]
        return None if re.search(rb"^(ElementSpacing|ElementSize)\s*=.*\d", start, re.MULTILINE) else NO_SPACING
    if name.endswith(IMAGE_ENDINGS):
        return None
    return f"has no format whose header states a spacing ({', '.join(IMAGE_ENDINGS)}): convert it to one of them"


def nifti_ambiguities(file: Path) -> list[str]:
    """Return in what programs may read a NIfTI file differently, one clause each; other files have no such choice."""
    if not file.name.lower().endswith(NIFTI):
        return []
    header = read_nifti_header(file)
    found = []
    if unit := UNITS.get(int(header["xyzt_units"]) & 7):
        found.append(f"says that its spacing is in {unit}, which SimpleITK converts to mm and nibabel does not")
    with_codes = header["qform_code"] > 0, header["sform_code"] > 0
    if not any(with_codes):
        found.append("has neither a qform nor an sform, so that its position and orientation are unknown")
    elif all(with_codes) and not _agree(header):
        found.append("has a qform and an sform that differ, so that programs place it differently")
    elif with_codes[1] and not np.allclose(_sform_spacing(header), header["pixdim"][1:4], rtol=SAME_SPACING):
        found.append("has an sform with another spacing than pixdim, so that programs measure other volumes")
    return found


def ambiguities_among(files: Iterable[Path]) -> list[str]:
    """Return in what programs may read some of these files differently, one clause each, without their names."""
    counts: Counter[str] = Counter()
    for file in files:
        with suppress(OSError, UnreadableHeaderError):  # whoever reads its voxels says so
            counts.update(nifti_ambiguities(file))
    return [f"{count} x NIfTI that {clause}" for clause, count in counts.items()]


def read_nifti_header(file: Path) -> Any:
    """Read the header of a NIfTI file as it is stored, without nibabel's corrections.

    Raises:
        UnreadableHeaderError: If the file is too short to hold one, or is not compressed as its name says.
    """
    start = _start(file)
    for order in ("little", "big"):
        if len(start) >= NIFTI_2 and int.from_bytes(start[:4], order) == NIFTI_2:
            return nibabel.Nifti2Header(start[:NIFTI_2], check=False)
    if len(start) < nibabel.Nifti1Header.sizeof_hdr:
        raise UnreadableHeaderError(CUT_OFF)
    return nibabel.Nifti1Header(start[: nibabel.Nifti1Header.sizeof_hdr], check=False)


def _sform_spacing(header: Any) -> np.ndarray:
    return np.linalg.norm(header.get_sform()[:3, :3], axis=0)


def _agree(header: Any) -> bool:
    try:
        placed = [header.get_qform(), header.get_sform()]
    except (ValueError, HeaderDataError):  # not a rotation
        return False
    corners = np.array([[*index, 1] for index in np.ndindex(2, 2, 2)]) * [*header["dim"][1:4], 1]
    distances = [np.linalg.norm(corner) for corner in (corners @ (placed[0] - placed[1]).T)[:, :3]]
    return max(distances) < 0.5 * min(header["pixdim"][1:4])


def _start(file: Path) -> bytes:
    is_compressed = without_ending(file.name, (".gz",)) != file.name
    try:
        with (gzip.open if is_compressed else open)(file, "rb") as stream:
            return stream.read(HEADER)
    except (EOFError, zlib.error, gzip.BadGzipFile):  # the last one for a wrong checksum, too
        with file.open("rb") as stream:
            is_gzip = stream.read(len(GZIP)) == GZIP
        what = CUT_OFF if is_gzip else "is not compressed, although its name ends with .gz"
        raise UnreadableHeaderError(what) from None
