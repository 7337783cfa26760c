"""Scans in any common form: NIfTI, NRRD, MHA, or a folder with one DICOM series."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.imaging.channels import NIFTI, case_and_channel, is_hidden, other_formats, without_ending
from nnunet_vit_mae.imaging.dicom import SeriesError, find_series, read_series
from nnunet_vit_mae.imaging.volumes import (
    NOT_FINITE,
    ScanError,
    all_finite,
    read_geometry,
    read_image,
    refuse_damaged,
    without_warnings_of_itk,
)
from nnunet_vit_mae.imaging.writing import without_header

SCAN_ENDINGS = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd")
ENDING = ".nii.gz"  # of all files that are written


@dataclass(frozen=True)
class Scan:
    """The channels of one case by number, each a file or the folder of a DICOM series, and its label."""

    name: str
    channels: dict[int, Path] = field(default_factory=dict)
    label: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The channels and the label, if there is one."""
        return [*self.channels.values(), *([self.label] if self.label else [])]


def find_scans(images: Path, labels: Path | None) -> list[Scan]:
    """Find the scans in a folder, sorted by name.

    Args:
        images: Folder of scans. If one of them is named CASE_0000, the endings _0000, _0001 and so on are channels;
            otherwise they are part of the name.
        labels: Folder of labels, named like their scans.

    Raises:
        UserError: If there are no scans, two files for one channel, labels without a scan, or a backslash in a name.
    """
    scans: dict[str, Scan] = {}
    entries = _entries(images, folders=True)
    has_channels = any(_stem(path).endswith("_0000") for path in entries)  # otherwise, four digits may be a year
    for path in entries:
        name, channel = case_and_channel(_stem(path)) if has_channels else (_stem(path), None)
        if "\\" in name:  # tables of cases may not hold it, because it separates folders on Windows
            raise UserError(f"{path} has a backslash in its name: rename it.")
        number = channel or 0
        channels = scans.setdefault(name, Scan(name)).channels
        if number in channels:
            raise UserError(f"{path} and {channels[number]} are the same channel of one case: remove one of them.")
        channels[number] = path
    if not scans:
        raise UserError(
            f"There are no scans in {images}{other_formats(images)}: put NIfTI, NRRD or MHA files there, or one folder "
            "of DICOM files each."
        )
    label_of = {_stem(path): path for path in _entries(labels, folders=False)} if labels else {}
    if unknown := sorted(set(label_of) - set(scans)):
        raise UserError(f"{label_of[unknown[0]]} belongs to no scan in {images}: name it like its scan.")
    return [Scan(name, dict(sorted(scan.channels.items())), label_of.get(name)) for name, scan in sorted(scans.items())]


def read_scan(path: Path, name: str | None = None) -> sitk.Image:
    """Read a volume with its geometry and without any other header.

    Args:
        path: An image file, or a folder with one DICOM series.
        name: What error messages call the scan if its own name is confidential; they then leave out ITK's reason too,
            which contains the path.

    Raises:
        ScanError: If the scan is damaged, truncated or not a volume.
    """
    called = name or path.name
    try:
        with without_warnings_of_itk():
            if path.is_dir():
                series, lost = find_series(path)
                if lost:
                    raise ScanError(f"{called} has {lost} DICOM files that cannot be read, copy them again")
                images = [one for one in series if not one.passed_over]
                if len(images) != 1:
                    raise ScanError(f"{called} has {len(images)} DICOM series of images, but one is needed")
                image = read_series(images[0])
            else:
                read_geometry(path, called)
                refuse_damaged(path, called)
                image = read_image(path, called)
                if not all_finite(sitk.GetArrayViewFromImage(image), path):
                    raise ScanError(f"{called} {NOT_FINITE}")
    except SeriesError as error:
        raise ScanError(f"{called} {error}") from None
    except ScanError:
        raise
    except Exception as error:  # noqa: BLE001  readers raise many kinds
        reason = " by SimpleITK" if name else f": {reader_reason(error)}"
        raise ScanError(f"{called} cannot be read{reason}") from None
    return checked_volume(image, called)


def checked_volume(image: sitk.Image, name: str) -> sitk.Image:
    """Remove the header of an image and return it; raises `ScanError` if it has fewer than 4 voxels along an axis."""
    if image.GetDimension() != 3 or min(image.GetSize()) < 4:
        raise ScanError(f"{name} is not a volume, it has {'x'.join(map(str, image.GetSize()))} voxels")
    return without_header(image)


def _entries(folder: Path, *, folders: bool) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of the scans.")
    visible = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    return [path for path in visible if (folders and path.is_dir()) or path.name.lower().endswith(SCAN_ENDINGS)]


def _stem(path: Path) -> str:
    """Return the name without the ending of an image; dots in the names of folders stay."""
    return path.name if path.is_dir() else without_ending(path.name, SCAN_ENDINGS)
