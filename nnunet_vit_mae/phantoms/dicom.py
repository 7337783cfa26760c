"""Phantom scans as a folder of DICOM files, as an archive hands them out; the tutorial begins with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from nnunet_vit_mae.phantoms.dataset import PlannedScan, draw_scans, plan_scans
from nnunet_vit_mae.phantoms.scanner import PhantomScan
from nnunet_vit_mae.storage.files import refuse_in_use

EXTENT_MM = (20.0, 26.0, 26.0)  # z y x
PLAQUE_SCALE = 3.0  # large plaques, which a network learns in minutes


def write_phantom_studies(folder: str | Path, *, labelled: int, unlabelled: int = 0, seed: int = 0) -> None:
    """Write studies of synthetic CT, each with a series of images, and a series of labels if it is labelled.

    A third of the unlabelled studies are of labelled patients. Another seed draws other patients.

    Args:
        folder: A new or empty folder; each study gets a folder in it.
        labelled: Number of studies with a label.
        unlabelled: Number of studies without one.
        seed: Random seed.

    Raises:
        UserError: If the folder is in use.
    """
    folder = Path(folder)
    refuse_in_use(folder)
    for place, scan in draw_scans(plan_scans(labelled, unlabelled, 0), seed, EXTENT_MM, PLAQUE_SCALE):
        patient = f"PHANTOM{seed:03d}{place.patient:03d}"
        _write_series(folder, patient, place, scan, scan.image, f"head {scan.kernel}")
        if place.set_name == "labelled":
            _write_series(folder, patient, place, scan, scan.label.astype(np.int16), "calcification label")


def _write_series(
    folder: Path, patient: str, place: PlannedScan, scan: PhantomScan, voxels: np.ndarray, description: str
) -> None:
    """Write the int16 voxels (z y x) of a study's series, one file for each slice."""
    study = f"{patient}_{place.number}"
    step, *pixel = scan.spacing
    series = folder / study / description.replace(" ", "_")
    series.mkdir(parents=True)
    first = [-side * (count - 1) / 2 for side, count in zip(scan.spacing[::-1], voxels.shape[::-1], strict=True)]
    for number, plane in enumerate(voxels):
        dataset = Dataset()
        dataset.SOPClassUID = CTImageStorage
        dataset.SOPInstanceUID = generate_uid(entropy_srcs=[study, description, str(number)])
        dataset.StudyInstanceUID = generate_uid(entropy_srcs=[study])
        dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[study, description])
        dataset.FrameOfReferenceUID = generate_uid(entropy_srcs=[study, "frame"])
        dataset.PatientID = patient
        dataset.StudyDate = f"20200{place.number + 1}01"
        dataset.Modality, dataset.SeriesDescription = "CT", description
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.Manufacturer, dataset.ConvolutionKernel = scan.scanner, scan.kernel
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [*first[:2], first[2] + step * number]
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.PixelSpacing, dataset.SliceThickness = pixel, step
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = plane.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        dataset.PixelData = plane.astype("<i2").tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.save_as(series / f"{number + 1:04d}.dcm", enforce_file_format=True)
