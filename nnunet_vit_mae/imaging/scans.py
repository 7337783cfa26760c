"""Scans as hospitals and tools leave them: NIfTI, NRRD, MHA, or a folder with one DICOM series."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.files import replacing
from nnunet_vit_mae.imaging.channels import NIFTI, case_and_channel, without_ending
from nnunet_vit_mae.imaging.dicom import SeriesError, find_series, read_series
from nnunet_vit_mae.imaging.volumes import ScanError, read_geometry, without_warnings_of_itk

SCAN_ENDINGS = (*NIFTI, ".nrrd", ".nhdr", ".mha", ".mhd")
ENDING = ".nii.gz"  # of everything that is written


@dataclass(frozen=True)
class Scan:
    """Channels of one case by number, each a file or the folder of a DICOM series, and its label."""

    name: str
    channels: dict[int, Path] = field(default_factory=dict)
    label: Path | None = None


def find_scans(images: Path, labels: Path | None) -> list[Scan]:
    """Cases in `images`, by name; where there is a CASE_0000, _0001 and so on are channels, otherwise part of a name.

    Raises `UserError` for a folder without scans, two files for one channel, and labels that fit no case.
    """
    scans: dict[str, Scan] = {}
    entries = _entries(images, folders=True)
    has_channels = any(_stem(path).endswith("_0000") for path in entries)  # else it may be a year
    for path in entries:
        name, channel = case_and_channel(_stem(path)) if has_channels else (_stem(path), None)
        number = channel or 0
        channels = scans.setdefault(name, Scan(name)).channels
        if number in channels:
            raise UserError(f"{path} and {channels[number]} are the same channel of one case: remove one of them.")
        channels[number] = path
    if not scans:
        raise UserError(
            f"There are no scans in {images}: put NIfTI, NRRD or MHA files there, or a folder of DICOM files each."
        )
    of_case = {_stem(path): path for path in _entries(labels, folders=False)} if labels else {}
    if unknown := sorted(set(of_case) - set(scans)):
        raise UserError(f"{of_case[unknown[0]]} is the label of no scan in {images}: name it like its scan.")
    return [Scan(name, dict(sorted(scan.channels.items())), of_case.get(name)) for name, scan in sorted(scans.items())]


def read_scan(path: Path, name: str | None = None) -> sitk.Image:
    """A volume with its geometry and no other header; raises `ScanError` when it is none, damaged or cut off.

    The error calls it by `name` where its own is secret, and is silent on what ITK says, which has the path in it.
    """
    called = name or path.name
    try:
        with without_warnings_of_itk():
            if path.is_dir():
                series, lost = find_series(path)
                if lost:
                    raise ScanError(f"{called} has {lost} DICOM files that cannot be read, copy them again")
                if len(series) != 1:
                    raise ScanError(f"{called} has {len(series)} DICOM series, but one is needed")
                image = read_series(series[0])
            else:
                read_geometry(path, called)
                image = sitk.ReadImage(str(path))
    except SeriesError as error:
        raise ScanError(f"{called} {error}") from None
    except ScanError:
        raise
    except Exception as error:  # noqa: BLE001  readers raise many kinds
        reason = " by SimpleITK" if name else f": {reader_reason(error)}"
        raise ScanError(f"{called} cannot be read{reason}") from None
    return checked_volume(image, called)


def checked_volume(image: sitk.Image, name: str) -> sitk.Image:
    """The same image without its header; raises `ScanError` when it is too thin to be a volume."""
    if image.GetDimension() != 3 or min(image.GetSize()) < 4:
        raise ScanError(f"{name} is no volume, it has {'x'.join(map(str, image.GetSize()))} voxels")
    return without_header(image)


def without_header(image: sitk.Image) -> sitk.Image:
    """The same image, of which only voxels and geometry are written."""
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return image


def write_image(image: sitk.Image, file: Path) -> None:
    """Write an image that is whole or not there, without any header but its geometry."""
    with replacing(file) as temporary, without_warnings_of_itk():
        sitk.WriteImage(without_header(image), str(temporary), useCompression=True)


def _entries(folder: Path, *, folders: bool) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder that the scans are in.")
    visible = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    return [path for path in visible if (folders and path.is_dir()) or path.name.lower().endswith(SCAN_ENDINGS)]


def _stem(path: Path) -> str:
    """Return the name without the ending of an image; folders keep their dots."""
    return path.name if path.is_dir() else without_ending(path.name, SCAN_ENDINGS)
