"""Images that are read back before they take their place, because SimpleITK reports no short write (a full disk)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.imaging.channels import NIFTI
from nnunet_vit_mae.imaging.volumes import geometry_of, read_geometry, read_image, without_warnings_of_itk
from nnunet_vit_mae.storage.files import read_back_otherwise, replacing, write_file


def write_image(image: sitk.Image, file: Path) -> None:
    """Write a volume without any header entries but its geometry, compressed if possible.

    The file is whole or as it was before: what was written is read back and compared, voxels and geometry.

    Args:
        image: The volume; its header entries are removed.
        file: The file to write; its ending sets the format.

    Raises:
        WriteError: If the file cannot be written.
    """
    with replacing(file) as temporary, without_warnings_of_itk():
        sitk.WriteImage(without_header(image), str(temporary), useCompression=True)
        written = read_image(temporary)
        is_same = geometry_of(image).difference(geometry_of(written)) is None and _same_voxels(image, written)
        if not (is_same and _has_its_end(temporary)):
            raise read_back_otherwise(temporary)


def write_zeros(file: Path, like: Path) -> None:
    """Write an image of zeros (uint8, compressed if possible) with the geometry of another image.

    A NIfTI file gets a copy of the header, because SimpleITK rounds direction cosines whenever it writes one.

    Args:
        file: The file to write; its ending sets the format.
        like: The image whose geometry is copied.

    Raises:
        WriteError: If the file cannot be written.
    """
    if file.name.endswith(NIFTI):
        content = _nifti_of_zeros(like)
        # without a date, so that equal images are equal files
        write_file(gzip.compress(content, mtime=0) if file.name.endswith(".gz") else content, file)
        return
    geometry = read_geometry(like)
    image = sitk.Image(geometry.size, sitk.sitkUInt8)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    write_image(image, file)


def write_segmentation(segmentation: np.ndarray, file: Path, writer: Any, properties: dict[str, Any]) -> None:
    """Write a segmentation (z y x) with one of nnU-Net's writers and read it back.

    Raises:
        WriteError: If the file cannot be written.
    """
    with replacing(file) as temporary:
        writer.write_seg(segmentation, str(temporary), properties)
        is_same = np.array_equal(writer.read_seg(str(temporary))[0][0], segmentation)
        if not (is_same and _has_its_end(temporary)):
            raise read_back_otherwise(temporary)


def without_header(image: sitk.Image) -> sitk.Image:
    """Return an image without any header entries but the geometry: the image itself if it has no others."""
    if not image.GetMetaDataKeys():
        return image
    # not erased one by one: SimpleITK takes no key that is not UTF-8
    plain = sitk.GetImageFromArray(sitk.GetArrayViewFromImage(image))
    plain.CopyInformation(image)
    return plain


def _same_voxels(image: sitk.Image, other: sitk.Image) -> bool:
    voxels, others = sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(other)
    return voxels.dtype == others.dtype and np.array_equal(voxels, others, equal_nan=voxels.dtype.kind == "f")


def _has_its_end(file: Path) -> bool:
    """Return whether the checksum after the compressed voxels is there too; SimpleITK does not read it."""
    try:
        if file.name.endswith(".gz"):
            with gzip.open(file) as stream:
                while stream.read(2**20):
                    pass
        elif file.name.endswith(".nrrd") and b"gzip" in (parts := file.read_bytes().partition(b"\n\n"))[0]:
            gzip.decompress(parts[2])
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False
    return True


def _nifti_of_zeros(like: Path) -> bytes:
    image: Any = nibabel.load(like)
    header = image.header.copy()
    header.extensions.clear()  # often the DICOM header of the acquired image
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"zeros: this contrast was not acquired"
    return type(image)(np.zeros(header.get_data_shape(), np.uint8), None, header).to_bytes()
