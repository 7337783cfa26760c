"""Synthetic CT of the skull base around the carotid siphons, written as an nnU-Net v2 raw dataset.

The phantoms replace the clinical scans of the ViTiac paper: patches around the cavernous carotid artery, in which
calcification was labelled by circling a plaque, keeping what reaches 130 HU and removing single voxels. This module
assigns patients to the sets; `anatomy.py` draws them, and `scanner.py` scans and labels them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK as sitk

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.writing import write_image
from nnunet_vit_mae.phantoms.scanner import PhantomScan, make_scan
from nnunet_vit_mae.storage.csv_tables import write_rows
from nnunet_vit_mae.storage.files import write_json

SMALLEST_LABEL_MM3 = 5.0
MOST_REDRAWS = 100
IMAGE_FOLDERS = {"labelled": "imagesTr", "unlabelled": "imagesUn", "test": "imagesTs"}
LABEL_FOLDERS = {"labelled": "labelsTr", "test": "labelsTs"}


@dataclass(frozen=True)
class PlannedScan:
    """A scan of the dataset: number of the patient, number of the scan, and the set it belongs to."""

    patient: int
    number: int
    set_name: str

    @property
    def patient_name(self) -> str:
        """Patient in the table."""
        return f"p{self.patient:03d}"

    @property
    def case(self) -> str:
        """Case in the dataset."""
        return f"phantom_{self.patient_name}_s{self.number}"


def write_phantom_dataset(
    folder: Path,
    *,
    dataset_id: int = 900,
    labelled: int = 16,
    unlabelled: int = 48,
    test: int = 8,
    seed: int = 0,
    extent_mm: tuple[float, float, float] = (32.0, 40.0, 40.0),
    plaque_scale: float = 1.0,
) -> Path:
    """Write an nnU-Net v2 raw dataset of phantoms: images, labels, dataset.json and scans.csv.

    Labelled and test scans are of one patient each and show plaque; unlabelled scans are never of test patients. The
    folder appears once it is complete.

    Args:
        folder: The folder in which the dataset is created.
        dataset_id: Number of the dataset.
        labelled: Number of scans in imagesTr and labelsTr.
        unlabelled: Number of scans in imagesUn.
        test: Number of scans in imagesTs and labelsTs.
        seed: Random seed.
        extent_mm: Size of the region that a scan covers (z y x, mm).
        plaque_scale: Factor of the length, width and thickness of plaques.

    Returns:
        The folder of the dataset, `folder`/Dataset900_CarotidPhantom.

    Raises:
        UserError: If a number is impossible, or if the dataset already exists.
    """
    if not 1 <= dataset_id <= 999:
        raise UserError(f"dataset_id is {dataset_id}, but must be between 1 and 999.")
    if labelled < 1 or unlabelled < 0 or test < 0:
        raise UserError(
            f"A phantom dataset of {labelled} labelled, {unlabelled} unlabelled and {test} test scans is impossible: "
            "give at least 1 labelled scan and no negative number."
        )
    target = Path(folder) / f"Dataset{dataset_id:03d}_CarotidPhantom"
    if target.exists():
        raise UserError(f"The dataset {target} already exists: remove it, or choose another dataset_id or folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".phantom_") as partial:
        growing = Path(partial) / target.name
        rows = []
        for place, scan in draw_scans(plan_scans(labelled, unlabelled, test), seed, extent_mm, plaque_scale):
            _write_scan(growing, place, scan)
            acquisition = (scan.scanner, scan.kernel, scan.slice_thickness)
            rows.append((place.case, place.patient_name, place.set_name, *acquisition))
        _write_description(growing, rows, labelled)
        growing.rename(target)
    return target


def plan_scans(labelled: int, unlabelled: int, test: int) -> list[PlannedScan]:
    """Plan one labelled scan per training patient, one scan per test patient, and the unlabelled scans.

    A third of the unlabelled scans are second scans of training patients; new patients have one to three scans each.
    """
    plan = [PlannedScan(patient, 0, "labelled") for patient in range(labelled)]
    plan += [PlannedScan(labelled + patient, 0, "test") for patient in range(test)]
    seconds = min(labelled, unlabelled // 3)
    plan += [PlannedScan(patient, 1, "unlabelled") for patient in range(seconds)]
    patient = labelled + test
    while unlabelled > seconds:
        scans = min(1 + patient % 3, unlabelled - seconds)
        plan += [PlannedScan(patient, number, "unlabelled") for number in range(scans)]
        unlabelled, patient = unlabelled - scans, patient + 1
    return plan


def draw_scans(
    plan: list[PlannedScan], seed: int, extent_mm: tuple[float, float, float], plaque_scale: float
) -> Iterator[tuple[PlannedScan, PhantomScan]]:
    """Make the planned scans; a patient whose labelled scan shows too little plaque is drawn again."""
    attempts: dict[int, int] = {}  # the attempt at which each patient was accepted
    for place in plan:
        for attempt in range(attempts.get(place.patient, 0), MOST_REDRAWS):
            patient_seed, scan_seed = (seed, place.patient, attempt), (seed, place.patient, place.number, attempt)
            scan = make_scan(patient_seed, scan_seed, extent_mm=extent_mm, plaque_scale=plaque_scale)
            if place.set_name == "unlabelled" or scan.label_volume >= SMALLEST_LABEL_MM3:
                break
        else:
            raise UserError(
                f"None of {MOST_REDRAWS} patients drawn for {place.case} has a label of {SMALLEST_LABEL_MM3} mm3 "
                f"at plaque_scale {plaque_scale}: choose a larger plaque_scale."
            )
        attempts[place.patient] = attempt
        yield place, scan


def _write_scan(folder: Path, place: PlannedScan, scan: PhantomScan) -> None:
    image_file = folder / IMAGE_FOLDERS[place.set_name] / f"{place.case}_0000.nii.gz"
    _write_volume(image_file, scan.image, scan.spacing)
    if place.set_name in LABEL_FOLDERS:
        _write_volume(folder / LABEL_FOLDERS[place.set_name] / f"{place.case}.nii.gz", scan.label, scan.spacing)


def _write_volume(file: Path, volume: np.ndarray, spacing: tuple[float, float, float]) -> None:
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing[::-1])
    image.SetOrigin([-step * (count - 1) / 2 for step, count in zip(spacing[::-1], volume.shape[::-1], strict=True)])
    write_image(image, file)


def _write_description(folder: Path, rows: list[tuple], labelled: int) -> None:
    """Write dataset.json and scans.csv."""
    description = {
        "channel_names": {"0": "CT_zscore"},  # by the name "CT", nnU-Net would clip all but the calcifications away
        "labels": {"background": 0, "calcification": 1},
        "numTraining": labelled,
        "file_ending": ".nii.gz",
    }
    write_json(description, folder / "dataset.json")
    write_rows(("case", "patient", "set", "scanner", "kernel", "slice_thickness_mm"), rows, folder / "scans.csv")
