"""Image files: geometry and voxels, truncated files, and images of zeros."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_END
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.errors import reading
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, NIFTI
from nnunet_vit_mae.imaging.stated_geometry import CUT_OFF, spacing_problem
from nnunet_vit_mae.storage.limits import too_many_voxels

PERPENDICULAR = 0.01  # largest cosine between two axes that is rounding
GIPL, GIPL_HEADER = ".gipl", 256  # bytes
NOT_FINITE = "holds voxels that are NaN or infinite: replace them"


class ScanError(ValueError):
    """An unusable image; the message says why, without a full stop."""


@dataclass(frozen=True)
class Geometry:
    """Size in voxels, spacing and origin in mm, and direction cosines, in the order x y z of SimpleITK."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def directions(self) -> np.ndarray:
        """Return the direction cosines as a matrix (3 3) whose columns are the axes x y z of the voxels."""
        return np.reshape(self.direction, (3, 3))

    @property
    def axes(self) -> str:
        """Return where the axes x y z of the voxels point to, as letters such as LPS: left, posterior, superior."""
        return str(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction))

    def difference(self, other: Geometry) -> str | None:
        """Return in words how another geometry differs, or None if it is equal up to rounding.

        Spacings are compared as nnU-Net does. nnU-Net accepts other origins and directions, but a contrast that lies
        elsewhere is useless for training.
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
    """Read the geometry from the header of an image file.

    Args:
        file: The image file.
        name: What error messages call the file; None uses the file name.

    Returns:
        The geometry, in the order x y z.

    Raises:
        ScanError: If the file is not a volume with one grey value for each voxel, states no spacing, is sheared or
            truncated, or has more voxels than the limit.
        Exception: Whatever a reader raises if the file is not an image; such a message may contain its path.
    """
    name = name or file.name
    if problem := spacing_problem(file):
        raise ScanError(f"{name} {problem}")
    reader = image_header(file, name)
    if reader.GetDimension() > 3:
        raise ScanError(f"{name} holds more than one image, but every channel has a file of its own")
    if reader.GetDimension() < 3:
        raise ScanError(f"{name} has {reader.GetDimension()} dimensions instead of three")
    if reader.GetPixelID() in (sitk.sitkComplexFloat32, sitk.sitkComplexFloat64):
        raise ScanError(f"{name} holds complex numbers, save their magnitude instead")
    if (values := reader.GetNumberOfComponents()) > 1:
        raise ScanError(f"{name} has {values} values in each voxel, such as a colour or a vector, instead of one")
    geometry = geometry_of(reader)
    axes = geometry.directions
    if not np.allclose(axes.T @ axes, np.eye(3), atol=PERPENDICULAR):  # the product of spacings is not the volume then
        raise ScanError(f"{name} has axes that are not perpendicular, as with a tilted gantry: resample it first")
    is_nifti, is_gipl = (file.name.lower().endswith(ending) for ending in (NIFTI, GIPL))
    if (is_nifti and _is_cut_off(file)) or (is_gipl and _is_short(file, reader)):
        raise ScanError(f"{name} {CUT_OFF}")
    return geometry


def read_volume(file: Path) -> tuple[np.ndarray, Geometry]:
    """Read a 3D image.

    Args:
        file: The image file.

    Returns:
        The voxels (z y x) and the geometry.

    Raises:
        Exception: Whatever a reader raises if the file is damaged or is not a 3D image.
    """
    geometry = read_geometry(file)
    refuse_damaged(file)
    array = sitk.GetArrayFromImage(read_image(file))
    return array, geometry


def read_image(file: Path, name: str | None = None) -> sitk.Image:
    """Read an image, unless its header says that it has more voxels than the limit.

    Args:
        file: The image file.
        name: What error messages call the file; None uses the file name.

    Raises:
        ScanError: If it has more voxels than the limit.
        Exception: Whatever a reader raises if the file is not an image; such a message may contain its path.
    """
    image_header(file, name)
    return sitk.ReadImage(str(file))


def image_header(file: Path, name: str | None = None) -> sitk.ImageFileReader:
    """Read the header of an image, with the arguments and errors of `read_image`."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    if problem := too_many_voxels(reader.GetSize()):
        raise ScanError(f"{name or file.name} {problem}")
    return reader


def refuse_damaged(file: Path, name: str | None = None) -> None:
    """Raise `ScanError` for a gzip file with a wrong checksum, from which ITK reads other voxels without an error.

    Args:
        file: An image file, all of which is read if it is one of gzip.
        name: What the error calls the file; None uses the file name.
    """
    if file.name.lower().endswith(".gz") and _unpacked_size(file) is None:
        raise ScanError(f"{name or file.name} {CUT_OFF}")


def all_finite(voxels: np.ndarray, file: Path) -> bool:
    """Return whether an image holds neither NaN nor infinite voxels.

    Args:
        voxels: The image as SimpleITK or one of nnU-Net's readers gives it.
        file: Its file, which is read again if it is NIfTI: ITK silently turns NaN there into zeros.
    """
    if voxels.dtype.kind == "f" and file.name.lower().endswith(NIFTI):
        image: Any = nibabel.load(file)
        if image.get_data_dtype().kind == "f":
            voxels = np.asanyarray(image.dataobj)
    return voxels.dtype.kind != "f" or bool(np.isfinite(voxels).all())


def refuse_large(files: Iterable[Path]) -> None:
    """Raise `UserError` for an image with more voxels than the limit, before one of nnU-Net's readers reads it."""
    for file in files:
        if file.name.endswith(IMAGE_ENDINGS):
            with reading(file), without_warnings_of_itk():
                image_header(file)


def refuse_unusable(files: Sequence[Path], geometry: Geometry) -> None:
    """Read the images of a case, and see that there is something to measure in them.

    Args:
        files: The images of one case, one for each channel.
        geometry: That of the first one.

    Raises:
        ScanError: If an image is damaged, or holds NaN or infinite voxels, or if all of them hold only zeros.
        Exception: Whatever a reader raises if the voxels cannot be read; such a message may contain a path.
    """
    if all(only_zeros(file, geometry) for file in files):
        raise ScanError("all its images are zeros")
    for file in files:
        refuse_damaged(file)
        image = read_image(file)
        if not all_finite(sitk.GetArrayViewFromImage(image), file):
            raise ScanError(f"{file.name} {NOT_FINITE}")


def geometry_of(image: sitk.Image | sitk.ImageFileReader) -> Geometry:
    """Return the geometry of an image in memory, or of one whose header has been read."""
    return Geometry(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())


def only_zeros(file: Path, geometry: Geometry) -> bool:
    """Return whether all voxels of an image file are zero, mostly without reading them.

    Compressed zeros take at most a two-hundredth of their size, i.e. 1/25 byte per voxel of 8 bytes. A larger file is
    only read if the bytes in its middle are zeros, as in an uncompressed image of zeros.

    Args:
        file: The image file.
        geometry: Its geometry, from `read_geometry`.
    """
    size = file.stat().st_size
    if size > 2**16 + math.prod(geometry.size) // 25:
        with file.open("rb") as stream:
            stream.seek(size // 2)
            if any(stream.read(2**14)):
                return False
    image = read_image(file)  # keep a reference: the view below does not
    return not sitk.GetArrayViewFromImage(image).any()


def _is_cut_off(file: Path) -> bool:
    """Return whether a NIfTI file is truncated; SimpleITK would silently read zeros.

    A gzip file ends with its uncompressed size modulo 2^32, so that intact files need not be read.
    """
    image: Any = nibabel.load(file)
    expected = image.dataobj.offset + math.prod(image.shape) * image.get_data_dtype().itemsize
    if not file.name.lower().endswith(".gz"):
        return file.stat().st_size < expected
    with file.open("rb") as stream:
        stream.seek(-4, SEEK_END)
        if int.from_bytes(stream.read(4), "little") == expected % 2**32:
            return False
    size = _unpacked_size(file)  # some tools write several gzip members, or trailing bytes
    return size is None or size < expected


def _unpacked_size(file: Path) -> int | None:
    """Return the bytes in a gzip file, all of which are read; None if it is damaged."""
    try:
        with gzip.open(file) as stream:
            return sum(len(piece) for piece in iter(lambda: stream.read(2**20), b""))
    except (EOFError, OSError, zlib.error):
        return None


def _is_short(file: Path, reader: sitk.ImageFileReader) -> bool:
    """Return whether a GIPL file is truncated, in whose place SimpleITK would silently read what was in memory."""
    voxel = sitk.Image([1, 1, 1], reader.GetPixelID()).GetSizeOfPixelComponent()
    return file.stat().st_size < GIPL_HEADER + math.prod(reader.GetSize()) * voxel


@contextmanager
def without_warnings_of_itk() -> Iterator[None]:
    """Silence ITK's warnings in the block; it warns of rounded header fields, which are common, for every file."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
