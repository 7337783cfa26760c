"""Volumes as a DICOM structured report: TID 1500 (DICOM part 16), by highdicom, an optional requirement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import NAMESPACE_OID, uuid5

from highdicom import UID
from highdicom.seg import Segmentation
from highdicom.sr import (
    AlgorithmIdentification,
    DeviceObserverIdentifyingAttributes,
    EnhancedSR,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    ReferencedSegment,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    SourceSeriesForSegmentation,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.sr.codedict import codes

from nnunet_vit_mae.imaging.dicom_segmentation import (
    RESEARCH_USE,
    SERIES_NUMBER,
    Algorithm,
    Segment,
    SourceSeries,
    coded,
    new_instance,
    without_names,
)
from nnunet_vit_mae.units import rounded_mm3

PROCEDURES = {  # by modality (DICOM CID 100)
    "CT": codes.cid100.CTUnspecifiedBodyRegion,
    "MR": codes.cid100.MRIUnspecifiedBodyRegion,
    "PT": codes.cid100.PETUnspecifiedBodyRegion,
}


def report_of(
    source: SourceSeries, segments: Sequence[Segment], segmentation: Segmentation | None, algorithm: Algorithm
) -> EnhancedSR:
    """Return a report with the volume of each label, which refers to its segment; one that was not found has none.

    Args:
        source: The series that was segmented.
        segments: All labels of the model.
        segmentation: Their segmentation from `segmentation_of`.
        algorithm: What made it.

    Raises:
        DicomOutputError: If highdicom does not accept the series.
    """
    with without_names():
        described = segmentation.SegmentSequence if segmentation else []
        numbers = {str(item.TrackingUID): int(item.SegmentNumber) for item in described}
        content = MeasurementReport(
            observation_context=_observer(algorithm),
            procedure_reported=PROCEDURES.get(source.modality, codes.cid100.ImagingProcedure),
            imaging_measurements=[
                _not_found(segment, source, algorithm)
                if segmentation is None or segment.tracking not in numbers
                else _found(segment, source, algorithm, segmentation, numbers)
                for segment in segments
            ],
        )
        thresholds = ", ".join(f"{segment.label} {segment.threshold:.6g}" for segment in segments)
        content[0].ContentSequence.append(  # the template may be extended
            TextContentItem(
                codes.DCM.Comment, f"{RESEARCH_USE}. Thresholds: {thresholds}.", RelationshipTypeValues.CONTAINS
            )
        )
        dataset = EnhancedSR(
            evidence=[*source.headers, *([segmentation] if segmentation else [])],
            content=content[0],
            is_complete=True,
            series_description="Volumes, research use only",
            **new_instance(SERIES_NUMBER + 1, algorithm),
        )
        source.give_identity(dataset)
        return dataset


def _observer(algorithm: Algorithm) -> ObservationContext:
    device = DeviceObserverIdentifyingAttributes(
        UID.from_uuid(str(uuid5(NAMESPACE_OID, algorithm.identity))),  # the same for all reports of a model
        name=algorithm.name,
        manufacturer_name=algorithm.name,
        model_name=algorithm.parameters["trainer"],
        serial_number=algorithm.identity,
    )
    return ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))


def _found(
    segment: Segment,
    source: SourceSeries,
    algorithm: Algorithm,
    segmentation: Segmentation,
    numbers: Mapping[str, int],
) -> VolumetricROIMeasurementsAndQualitativeEvaluations:
    reference = ReferencedSegment(
        segmentation.SOPClassUID,
        segmentation.SOPInstanceUID,
        numbers[segment.tracking],
        source_series=SourceSeriesForSegmentation(source.headers[0].SeriesInstanceUID),
    )
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        referenced_segment=reference, **_measurements(segment, algorithm)
    )


def _not_found(segment: Segment, source: SourceSeries, algorithm: Algorithm) -> MeasurementsAndQualitativeEvaluations:
    images = [SourceImageForMeasurementGroup.from_source_image(header) for header in source.headers]
    return MeasurementsAndQualitativeEvaluations(source_images=images, **_measurements(segment, algorithm))


def _measurements(segment: Segment, algorithm: Algorithm) -> dict:
    """Return the arguments that a label has in every template: what it is, its volume, and how it was measured."""
    parameters = {**algorithm.parameters, "threshold": f"{segment.threshold:.6g}"}
    site = segment.codes.region
    return {
        "tracking_identifier": TrackingIdentifier(segment.tracking, segment.name),
        "finding_category": coded(segment.codes.category),
        "finding_type": coded(segment.codes.type),
        "finding_sites": [FindingSite(coded(site))] if site else None,
        "algorithm_id": AlgorithmIdentification(
            algorithm.name, algorithm.version, [f"{name}={value}" for name, value in parameters.items()]
        ),
        "measurements": [Measurement(codes.SCT.Volume, rounded_mm3(segment.volume_mm3), codes.UCUM.CubicMillimeter)],
    }
