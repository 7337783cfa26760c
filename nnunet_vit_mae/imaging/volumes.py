"""Image files of a data set as far as their headers go: geometry, completeness, and images of zeros."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.files import replacing
from nnunet_vit_mae.imaging.channels import NIFTI


class ScanError(ValueError):
    """An image that cannot be used; the message says why, without a full stop."""


@dataclass(frozen=True)
class Geometry:
    """Size in voxels, spacing and origin in mm, and direction cosines, all x y z as in SimpleITK."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    def difference(self, other: Geometry) -> str | None:
        """What differs, in words; rounding does not count.

        nnU-Net's own tolerance holds for the spacing. It stops at no other origin or direction, but a contrast that
        lies elsewhere teaches nonsense.
        """
        if self.size != other.size:
            return f"size ({_numbers(self.size)} and {_numbers(other.size)} voxels)"
        if not np.allclose(self.spacing, other.spacing):
            return f"spacing ({_numbers(self.spacing)} and {_numbers(other.spacing)} mm)"
        if not np.allclose(self.origin, other.origin, atol=1e-3):
            return f"origin ({_numbers(self.origin)} and {_numbers(other.origin)} mm)"
        if not np.allclose(self.direction, other.direction, atol=1e-3):
            return f"direction ({_numbers(self.direction)} and {_numbers(other.direction)})"
        return None


def read_geometry(file: Path, name: str | None = None) -> Geometry:
    """From the header alone; raises an error of some kind when the file is no image, several, or cut off.

    A `ScanError` calls the file by `name`, else by its own; errors of any other kind may hold its path.
    """
    name = name or file.name
    reader = _header(file)
    if reader.GetDimension() > 3 or reader.GetNumberOfComponents() > 1:
        raise ScanError(f"{name} holds more than one image, but every channel has a file of its own")
    if file.name.lower().endswith(NIFTI) and _is_cut_off(file):
        raise ScanError(f"{name} is cut off or damaged, copy it again")
    return Geometry(reader.GetSize(), reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def only_zeros(file: Path, geometry: Geometry) -> bool:
    """Whether all voxels are zero. The voxels of an acquired image are hardly ever read, so that thousands go fast.

    Zeros that are not compressed are zeros in the middle of the file too, and compressed ones take a two-hundredth of
    their bytes or less: at 8 bytes a voxel, a 25th of a byte for each voxel.
    """
    size = file.stat().st_size
    if size > 2**16 + math.prod(geometry.size) // 25:
        with file.open("rb") as stream:
            stream.seek(size // 2)
            if any(stream.read(2**14)):
                return False
    image = sitk.ReadImage(str(file))  # by name, as the view does not keep it alive
    return not sitk.GetArrayViewFromImage(image).any()


def _is_cut_off(file: Path) -> bool:
    """Whether a NIfTI ends too early, as after a broken copy: SimpleITK reads zeros there without a word.

    A gzip file ends with the number of its bytes (modulo 2^32), so that intact ones need not be read.
    """
    image: Any = nibabel.load(file)
    expected = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if not file.name.lower().endswith(".gz"):
        return file.stat().st_size < expected
    with file.open("rb") as stream:
        stream.seek(-4, SEEK_END)
        if int.from_bytes(stream.read(4), "little") == expected % 2**32:
            return False
    try:  # some tools write several pieces, or more than is needed
        with gzip.open(file) as stream:
            return sum(len(piece) for piece in iter(lambda: stream.read(2**20), b"")) < expected
    except (EOFError, OSError, zlib.error):
        return True


def write_zeros(file: Path, like: Path) -> None:
    """Write zeros of one byte each, compressed where the format can, with the geometry of the image `like`.

    A NIfTI gets the header of `like`: SimpleITK rounds direction cosines anew whenever it writes one.
    """
    with replacing(file) as temporary:
        if file.name.endswith(NIFTI):
            content = _nifti_of_zeros(like)
            # without a date, so that the same zeros are the same bytes
            temporary.write_bytes(gzip.compress(content, mtime=0) if file.name.endswith(".gz") else content)
        else:
            reader = _header(like)
            image = sitk.Image(reader.GetSize(), sitk.sitkUInt8)
            image.SetSpacing(reader.GetSpacing())
            image.SetOrigin(reader.GetOrigin())
            image.SetDirection(reader.GetDirection())
            sitk.WriteImage(image, str(temporary), useCompression=True)


def _nifti_of_zeros(like: Path) -> bytes:
    image: Any = nibabel.load(like)
    header = image.header.copy()
    header.extensions.clear()  # often the DICOM header of the acquired image
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"zeros: this contrast was not acquired"
    return type(image)(np.zeros(header.get_data_shape(), np.uint8), None, header).to_bytes()


@contextmanager
def without_warnings_of_itk() -> Iterator[None]:
    """ITK warns of rounded header fields, which are common, once for every file that it opens."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _header(file: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    return reader


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
