"""Small DICOM files as scanners, archives and other programs write them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian

CLASSES = "1.2.840.10008.5.1.4.1.1."
CT, MR, PET, CAPTURE = (CLASSES + number for number in ("2", "4", "128", "7"))
ENHANCED_CT, ENHANCED_MR, ENHANCED_PET, SEGMENTATION = (CLASSES + number for number in ("2.1", "4.1", "130", "66.4"))
SHAPE = (8, 12, 14)  # z y x
SPACING = (0.5, 0.6)  # of rows and of columns: y x
STEP = 2.0
AXIAL = (1, 0, 0, 0, 1, 0)
Change = Callable[[Dataset, int], Any]


def voxels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, SHAPE).astype(np.int16)


def position(number: float) -> list[float]:
    return [-10, -20, 100 + STEP * number]


def write_dicom(dataset: Dataset, file: Path, syntax: str = ExplicitVRLittleEndian) -> None:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)


def header(sop_class: str, uid: str, **tags: Any) -> Dataset:
    dataset = Dataset()
    content = {
        "SpecificCharacterSet": "ISO_IR 192",
        "SOPClassUID": sop_class,
        "SOPInstanceUID": uid,
        "PatientID": "P1",
        "StudyInstanceUID": "1.9.1",
        "SeriesInstanceUID": uid.rsplit(".", 1)[0],
        "SeriesDescription": "head",
        "SeriesNumber": "1",
        "StudyDate": "20200101",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    }
    for keyword, value in (content | tags).items():
        setattr(dataset, keyword, value)
    return dataset


def set_pixels(dataset: Dataset, array: np.ndarray) -> None:
    dataset.Rows, dataset.Columns = array.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * array.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(array.dtype.kind == "i")
    dataset.PixelData = array.tobytes()
    dataset["PixelData"].VR = "OW"
    if array.ndim == 3:
        dataset.NumberOfFrames = len(array)


def write_slices(
    folder: Path, change: Change | None = None, *, sop_class: str = CT, uid: str = "1.9.1.1", array=None, **tags: Any
) -> None:
    """A classic series, one file for each slice; `change` gets dataset and number of each, False drops the slice."""
    array = voxels() if array is None else array
    for number, plane in enumerate(array):
        dataset = header(sop_class, f"{uid}.{number + 1}", **tags)
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = position(number), list(AXIAL)
        dataset.PixelSpacing, dataset.SliceThickness = list(SPACING), STEP
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        set_pixels(dataset, plane)
        if change is None or change(dataset, number) is not False:
            write_dicom(dataset, folder / f"{number * 5 % len(array)}_{uid}.dcm")


def group(**tags: Any) -> Items:
    """A functional group: a sequence of one item."""
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return Items([item])


def write_frames(
    file: Path,
    order: Sequence[int],
    change: Callable[[Dataset, Dataset, list[Dataset]], Any] | None = None,
    *,
    sop_class: str = ENHANCED_CT,
    uid: str = "1.9.1.1.1",
    array=None,
    **tags: Any,
) -> None:
    """An enhanced file of the slices `order`; `change` gets the dataset, its shared groups and those of each frame."""
    array = voxels() if array is None else array
    dataset, shared = header(sop_class, uid, **tags), Dataset()
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=list(AXIAL))
    shared.PixelMeasuresSequence = group(PixelSpacing=list(SPACING), SliceThickness=STEP)
    shared.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=0, RescaleType="HU")
    frames = []
    for number in order:
        frames.append(Dataset())
        frames[-1].PlanePositionSequence = group(ImagePositionPatient=position(number))
    set_pixels(dataset, array[list(order)])
    if change:
        change(dataset, shared, frames)
    dataset.SharedFunctionalGroupsSequence = Items([shared])
    dataset.PerFrameFunctionalGroupsSequence = Items(frames)
    write_dicom(dataset, file)
