"""Segmentations as DICOM SEG on the series that they were made on, by highdicom, an optional requirement.

Patient and study are those of the series, so that a PACS files the segmentation beside it, and so is the geometry.
Messages contain no name, as in `imaging.dicom`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from highdicom import (
    UID,
    AlgorithmIdentificationSequence,
    PixelMeasuresSequence,
    PlaneOrientationSequence,
    PlanePositionSequence,
)
from highdicom.seg import Segmentation, SegmentDescription
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from nnunet_vit_mae.imaging.dicom import DicomSeries, Stack, stack_frames
from nnunet_vit_mae.imaging.dicom_codes import DicomCode, LabelCodes
from nnunet_vit_mae.imaging.dicom_header import FRAMES, SHARED, read_all_tags, silent_pydicom
from nnunet_vit_mae.storage.files import replacing

RESEARCH_USE = "For research use only, not for clinical decisions"
SERIES_NUMBER = 9901  # far from those of scanners; the report has the next one
LONGEST = 64  # characters of most texts (LO)
# what highdicom copies from the series after it has checked it, and what hospitals do not always write as it should be
IDENTITY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate"),
    *("StudyTime", "ReferringPhysicianName"),
)


class DicomOutputError(ValueError):
    """A series to which no DICOM output can refer; the message says why, names no file and has no full stop."""


@dataclass(frozen=True)
class Algorithm:
    """The model that made a segmentation; `identity` changes with its weights."""

    name: str
    version: str
    identity: str
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class Segment:
    """A label in one case: its mask (z y x, as `read_series` sorts slices), its volume and the model's threshold."""

    label: str
    codes: LabelCodes
    threshold: float
    mask: np.ndarray
    volume_mm3: float
    tracking: UID

    @property
    def name(self) -> str:
        """The label as DICOM takes it."""
        return as_text(self.label)


@dataclass(frozen=True)
class SourceSeries:
    """The headers of a series in the order of its slices, without pixels, its geometry, and whose it is."""

    headers: list[Dataset]
    stack: Stack
    identity: Dataset

    @property
    def modality(self) -> str:
        """Kind of images, such as CT."""
        return self.headers[0].Modality

    def give_identity(self, dataset: Dataset) -> None:
        """Write patient and study of the series into a dataset, as they were, whether valid or not."""
        for element in self.identity:
            dataset.add(element)


def as_text(text: str) -> str:
    r"""Return a text that fits into one value of DICOM.

    Example:
        >>> as_text("left\\right")
        'left/right'
    """
    return text.replace("\\", "/")[:LONGEST]


def coded(code: DicomCode) -> CodedConcept:
    """Return a code as highdicom takes it."""
    return CodedConcept(as_text(code.value), as_text(code.scheme), as_text(code.meaning))


@contextmanager
def without_names() -> Iterator[None]:
    """Turn what highdicom and pydicom raise in the block, which may quote the patient's name, into an error without."""
    with silent_pydicom():
        try:
            yield
        except (DicomOutputError, OSError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 (they raise many kinds)
            raise DicomOutputError(f"has a header that highdicom does not accept ({type(error).__name__})") from None


def read_source(series: DicomSeries) -> SourceSeries:
    """Read the headers of a series that `read_series` accepts.

    Raises:
        DicomOutputError: If the series states no frame of reference, or a header is damaged.
    """
    with without_names():
        stack = stack_frames(series.frames)
        headers = [read_all_tags(file) for file in dict.fromkeys(frame.file for frame in stack.frames)]
        if not headers[0].get("FrameOfReferenceUID"):
            raise DicomOutputError("states no frame of reference, to which a segmentation refers")
        headers[0].decode()  # before the character set becomes UTF-8
        identity = Dataset()
        for keyword in IDENTITY:
            if keyword in headers[0]:
                identity[keyword] = headers[0].pop(keyword)
            setattr(headers[0], keyword, "")
        _complete(headers, stack)
        return SourceSeries(headers, stack, identity)


def segmentation_of(source: SourceSeries, segments: Sequence[Segment], algorithm: Algorithm) -> Segmentation | None:
    """Return a binary segmentation with a segment for each label that was found; None if none was.

    A label without a voxel is left out, because no frame would show it.

    Raises:
        DicomOutputError: If highdicom does not accept the series.
    """
    found = [segment for segment in segments if segment.mask.any()]
    if not found:
        return None
    with without_names():
        is_multi_frame = FRAMES in source.headers[0]
        dataset = Segmentation(
            source_images=source.headers[:1] if is_multi_frame else source.headers,
            further_source_images=source.headers[1:] if is_multi_frame else [],
            pixel_array=np.stack([segment.mask for segment in found], axis=-1).astype(np.uint8),
            plane_positions=[PlanePositionSequence("PATIENT", frame.position or ()) for frame in source.stack.frames],
            segmentation_type="BINARY",
            segment_descriptions=[_description(*numbered, algorithm) for numbered in enumerate(found, start=1)],
            content_label="SEGMENTATION",
            content_description=RESEARCH_USE,
            series_description="Segmentation, research use only",
            **new_instance(SERIES_NUMBER, algorithm),
        )
        source.give_identity(dataset)
        return dataset


def new_instance(series_number: int, algorithm: Algorithm) -> dict[str, Any]:
    """Return the arguments with which highdicom makes an instance of a new series."""
    return {
        "series_instance_uid": UID(),
        "series_number": series_number,
        "sop_instance_uid": UID(),
        "instance_number": 1,
        "manufacturer": as_text(algorithm.name),
        "manufacturer_model_name": as_text(algorithm.parameters["trainer"]),
        "software_versions": as_text(algorithm.version),
        "device_serial_number": algorithm.identity,
        "content_qualification": "RESEARCH",
        "specific_character_set": "ISO_IR 192",
    }


def write_dicom_file(dataset: Dataset, file: Path) -> None:
    """Write a dataset to a file that is whole or as it was before.

    Raises:
        DicomOutputError: If a value cannot be written.
        WriteError: If the system refuses to write.
    """
    with replacing(file) as temporary, without_names():
        dataset.save_as(temporary, enforce_file_format=True)


def _description(number: int, segment: Segment, algorithm: Algorithm) -> SegmentDescription:
    description = SegmentDescription(
        segment_number=number,
        segment_label=segment.name,
        segmented_property_category=coded(segment.codes.category),
        segmented_property_type=coded(segment.codes.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=as_text(algorithm.name),
            family=codes.cid7162.ArtificialIntelligence,
            version=as_text(algorithm.version),
            parameters={**algorithm.parameters, "threshold": f"{segment.threshold:.6g}"},
        ),
        tracking_uid=segment.tracking,
        tracking_id=segment.name,
        anatomic_regions=[coded(segment.codes.region)] if segment.codes.region else None,
    )
    description.SegmentDescription = f"Threshold {segment.threshold:.6g}. {RESEARCH_USE}."
    return description


def _complete(headers: Sequence[Dataset], stack: Stack) -> None:
    """Make headers those that highdicom accepts: with orientations equal to the digit, and a slice thickness."""
    first, (between_columns, between_rows, between_slices) = headers[0], stack.spacing
    for header in headers:
        if FRAMES not in header:
            header["ImageOrientationPatient"] = first["ImageOrientationPatient"]
    if FRAMES not in first:
        first.SliceThickness = first.get("SliceThickness") or f"{between_slices:.10g}"
        first.SpacingBetweenSlices = f"{between_slices:.10g}"  # as measured: scanners mean other things by it
        return
    shared = first[SHARED].value[0] if first.get(SHARED) else Dataset()
    shared.PlaneOrientationSequence = PlaneOrientationSequence("PATIENT", stack.direction.T[:2].ravel().tolist())
    shared.PixelMeasuresSequence = PixelMeasuresSequence(
        (between_rows, between_columns), slice_thickness=between_slices, spacing_between_slices=between_slices
    )
    setattr(first, SHARED, [shared])
