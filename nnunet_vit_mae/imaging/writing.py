"""Images that are read back before they take their place, for SimpleITK reports no short write (a full disk)."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.files import read_back_otherwise, replacing
from nnunet_vit_mae.imaging.channels import NIFTI
from nnunet_vit_mae.imaging.volumes import geometry_of, read_geometry, read_image, without_warnings_of_itk


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
        if geometry_of(image).difference(geometry_of(written)) or not _same_voxels(image, written):
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
        with replacing(file) as temporary:
            # without a date, so that equal images are equal files
            temporary.write_bytes(gzip.compress(content, mtime=0) if file.name.endswith(".gz") else content)
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
        if not np.array_equal(writer.read_seg(str(temporary))[0][0], segmentation):
            raise read_back_otherwise(temporary)


def without_header(image: sitk.Image) -> sitk.Image:
    """Remove all header entries but the geometry from an image, in place, and return it."""
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return image


def _same_voxels(image: sitk.Image, other: sitk.Image) -> bool:
    voxels, others = sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(other)
    return voxels.dtype == others.dtype and np.array_equal(voxels, others, equal_nan=voxels.dtype.kind == "f")


def _nifti_of_zeros(like: Path) -> bytes:
    image: Any = nibabel.load(like)
    header = image.header.copy()
    header.extensions.clear()  # often the DICOM header of the acquired image
    header.set_data_dtype(np.uint8)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"zeros: this contrast was not acquired"
    return type(image)(np.zeros(header.get_data_shape(), np.uint8), None, header).to_bytes()
