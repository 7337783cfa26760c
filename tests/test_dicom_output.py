"""DICOM segmentations and reports: read back by pydicom and highdicom, and compared with the source series."""

import csv
import json
import shutil
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from dicom_files import SPACING, STEP, voxels, write_frames, write_slices
from highdicom.seg import segread
from highdicom.sr import srread
from highdicom.uid import UID
from pydicom import dcmread
from pydicom.sr.codedict import codes

from nnunet_vit_mae.cli import quantify as command
from nnunet_vit_mae.imaging.dicom import find_series, read_series
from nnunet_vit_mae.imaging.dicom_codes import TISSUE, LabelCodes, read_label_codes
from nnunet_vit_mae.imaging.dicom_report import report_of
from nnunet_vit_mae.imaging.dicom_segmentation import (
    Algorithm,
    DicomOutputError,
    Segment,
    read_source,
    segmentation_of,
    write_dicom_file,
)
from nnunet_vit_mae.nnunet import quantification

TRAINER = "nnUNetTrainerViTScratch"
ALGORITHM = Algorithm("nnunet-vit-mae", "1.2", "0123456789ab", {"trainer": TRAINER, "plans": "P"})
RULES = {"whole": 300, "core": 700}  # grey values above are the label: regions, one in the other
PERSON = {"PatientName": "Müller^Jörg", "PatientBirthDate": "19631224", "PatientSex": "W", "AccessionNumber": "A-1"}
SERIES = {"FrameOfReferenceUID": "1.9.7", "SpecificCharacterSet": "ISO_IR 100", "StudyID": "7", **PERSON}
ROW, COLUMN = np.linalg.qr(np.array([[0.9, 0.1], [0.3, -0.8], [-0.2, 0.4]]))[0].T


def placed(row, column, step, noise=0.0):
    """A change that puts the slices of a series along their normal, as a scanner writes the numbers."""

    def change(dataset, number):
        position = np.array([-10, -20, 100]) + number * step * np.cross(row, column)
        dataset.ImagePositionPatient = [f"{value:.9g}" for value in position]
        orientation = np.array([*row, *column]) + noise * number
        dataset.ImageOrientationPatient = [f"{value:.8g}" for value in orientation]

    return change


def in_two_files(folder):
    write_frames(folder / "a.dcm", [6, 1, 3, 0], **SERIES)
    write_frames(folder / "b.dcm", [2, 7, 4, 5], uid="1.9.1.1.2", **SERIES)


LAYOUTS = {
    "axial": lambda folder: write_slices(folder, **SERIES),
    "oblique": lambda folder: write_slices(folder, placed(ROW, COLUMN, STEP), **SERIES),
    "thick, numbered downwards": lambda folder: write_slices(folder, placed(ROW, COLUMN, -9.0), **SERIES),
    "flipped, rounded": lambda folder: write_slices(folder, placed((-1, 0, 0), (0, 1, 0), STEP, 1e-6), **SERIES),
    "multi-frame": lambda folder: write_frames(folder / "a.dcm", [3, 1, 2, 0, 7, 5, 6, 4], **SERIES),
    "in two files": in_two_files,
}


def segment(label, mask, volume=1.5):
    return Segment(label, LabelCodes(), 0.35, mask, volume, UID())


def written(folder, segments_of, write=LAYOUTS["axial"]):
    """Write a series, a segmentation and a report; `segments_of` gets the voxels as they are read."""
    write(folder / "in")
    (series,), _ = find_series(folder / "in")
    image = read_series(series)
    source, segments = read_source(series), segments_of(sitk.GetArrayFromImage(image))
    dataset = segmentation_of(source, segments, ALGORITHM)
    if dataset is not None:
        write_dicom_file(dataset, folder / "segmentation.dcm")
    write_dicom_file(report_of(source, segments, dataset, ALGORITHM), folder / "report.dcm")
    return image


def key(position):
    return tuple(np.round(np.array(position, float), 2))


def planes_of_series(folder):
    """Plane and instance by position, each from the file itself."""
    planes = {}
    for file in folder.iterdir():
        dataset = dcmread(file)
        for number, plane in enumerate(dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)):
            groups = dataset.get("PerFrameFunctionalGroupsSequence")
            place = groups[number].PlanePositionSequence[0] if groups else dataset
            planes[key(place.ImagePositionPatient)] = (plane, dataset.SOPInstanceUID)
    return planes


def frames_of(dataset):
    """Label, position, functional groups and plane of each frame of a segmentation, without highdicom."""
    labels = {item.SegmentNumber: item.SegmentLabel for item in dataset.SegmentSequence}
    shared = dataset.SharedFunctionalGroupsSequence[0]
    planes = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    for groups, plane in zip(dataset.PerFrameFunctionalGroupsSequence, planes, strict=True):
        identified = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        position = key(groups.PlanePositionSequence[0].ImagePositionPatient)
        yield labels[identified[0].ReferencedSegmentNumber], position, groups, plane


def points(image_or_volume, mask):
    """The voxels of a mask in patient coordinates."""
    if isinstance(image_or_volume, sitk.Image):
        found = [image_or_volume.TransformIndexToPhysicalPoint(index[::-1]) for index in np.argwhere(mask).tolist()]
    else:
        found = image_or_volume.map_indices_to_reference(np.argwhere(mask))
    return sorted(map(key, found))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_plane_lies_on_the_slice_that_it_was_made_on(tmp_path, layout):
    image = written(
        tmp_path, lambda array: [segment(label, array > limit) for label, limit in RULES.items()], LAYOUTS[layout]
    )
    dataset = dcmread(tmp_path / "segmentation.dcm")
    planes, seen = planes_of_series(tmp_path / "in"), []
    for label, position, groups, plane in frames_of(dataset):
        original, instance = planes[position]
        assert np.array_equal(plane == 1, original > RULES[label])
        if layout != "in two files":
            (reference,) = groups.DerivationImageSequence[0].SourceImageSequence
            assert reference.ReferencedSOPInstanceUID == instance
        seen.append((label, position))
    assert sorted(seen) == sorted((label, position) for label in RULES for position in planes)
    (referenced,) = dataset.ReferencedSeriesSequence
    instances = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert instances == {instance for _, instance in planes.values()}
    measures = dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert measures.PixelSpacing == list(SPACING)
    assert measures.SpacingBetweenSlices == pytest.approx(image.GetSpacing()[2])
    for number, limit in enumerate(RULES.values(), start=1):
        volume = segread(tmp_path / "segmentation.dcm").get_volume(segment_numbers=[number], combine_segments=True)
        assert points(volume, volume.array) == points(image, sitk.GetArrayFromImage(image) > limit)


def test_the_pacs_finds_patient_and_study_again(tmp_path):
    """Also a name in Latin-1, a sex that DICOM does not know, a label with a backslash, and absent tags."""
    written(tmp_path, lambda array: [segment("Gefäß\\links", array > 0)])
    original = dcmread(next((tmp_path / "in").iterdir()))
    for file, modality in (("segmentation.dcm", "SEG"), ("report.dcm", "SR")):
        dataset = dcmread(tmp_path / file)
        for keyword in (*PERSON, "PatientID", "StudyInstanceUID", "StudyID", "StudyDate"):
            assert dataset[keyword].value == original[keyword].value, keyword
        assert dataset.Modality == modality
        assert dataset.SeriesInstanceUID != original.SeriesInstanceUID
        assert dataset.ReferringPhysicianName == ""
        assert dataset.ContentQualification == "RESEARCH"
    segmentation = dcmread(tmp_path / "segmentation.dcm")
    (described,) = segmentation.SegmentSequence
    assert segmentation.FrameOfReferenceUID == original.FrameOfReferenceUID
    assert described.SegmentLabel == "Gefäß/links"
    assert described.SegmentDescription == "Threshold 0.35. For research use only, not for clinical decisions."
    algorithm = described.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("nnunet-vit-mae", "1.2")
    assert algorithm.AlgorithmParameters == f"trainer={TRAINER},plans=P,threshold=0.35"


def volumes_in_report(file):
    """Volume, whether a segment is referred to, and finding, by label."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content = srread(file).content
    groups = content.get_volumetric_roi_measurement_groups() + content.get_image_measurement_groups()
    found = {}
    for group in groups:
        (measurement,) = group.get_measurements(name=codes.SCT.Volume)
        assert measurement.unit == codes.UCUM.CubicMillimeter
        number = getattr(group, "referenced_segment", None)
        segment_number = number[0].referenced_segment_numbers[0] if number else None
        found[group.tracking_identifier] = (measurement.value, segment_number, group.finding_type)
    return found


def test_a_report_gives_the_volume_of_each_label_and_refers_to_its_segment(tmp_path):
    calcified = LabelCodes(category=TISSUE, type=TISSUE, region=TISSUE)
    written(
        tmp_path,
        lambda array: [
            segment("nothing", array > 5000, 0.0),
            Segment("blob", calcified, 0.5, array > 0, 12.34567, UID()),
        ],
    )
    found = volumes_in_report(tmp_path / "report.dcm")
    assert {label: row[:2] for label, row in found.items()} == {"blob": (12.346, 1), "nothing": (0.0, None)}
    segmentation, report = dcmread(tmp_path / "segmentation.dcm"), dcmread(tmp_path / "report.dcm")
    assert [item.SegmentLabel for item in segmentation.SegmentSequence] == ["blob"]
    note = "For research use only, not for clinical decisions. Thresholds: nothing 0.35, blob 0.5."
    assert report.ContentSequence[-1].TextValue == note
    referenced = [
        item.ReferencedSOPInstanceUID
        for series in report.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    ]
    instances = {dcmread(file).SOPInstanceUID for file in (tmp_path / "in").iterdir()}
    assert set(referenced) == instances | {segmentation.SOPInstanceUID}


def test_nothing_found_is_a_report_with_zero_and_no_segmentation(tmp_path):
    written(tmp_path, lambda array: [segment("blob", array > 5000, 0.0)])
    assert not (tmp_path / "segmentation.dcm").exists()
    assert volumes_in_report(tmp_path / "report.dcm")["blob"][:2] == (0.0, None)


def test_a_series_without_a_frame_of_reference_gets_no_segmentation(tmp_path):
    with pytest.raises(DicomOutputError, match="states no frame of reference"):
        written(tmp_path, list, lambda folder: write_slices(folder, PatientName="Secret^Name"))


def test_what_highdicom_does_not_accept_is_said_without_the_patient(tmp_path):
    retired = "1.2.840.10008.5.1.4.1.1.6"  # ultrasound of 1993
    with pytest.raises(DicomOutputError, match=r"^has a header that highdicom does not accept \(KeyError\)$"):
        written(
            tmp_path,
            lambda array: [segment("blob", array > 0)],
            lambda folder: write_slices(folder, sop_class=retired, **SERIES),
        )


def test_codes_of_some_labels_are_enough(tmp_path):
    artery = {"value": "69105007", "scheme": "SCT", "meaning": "Carotid artery"}
    (tmp_path / "codes.json").write_text(json.dumps({"blob": {"region": artery}}))
    found = read_label_codes(tmp_path / "codes.json", ["blob", "other"])
    assert (found["blob"].type, found["blob"].region.meaning) == (TISSUE, "Carotid artery")
    assert found["other"] == LabelCodes()


# ---------- the command


@pytest.fixture
def model(in_workspace):
    """A model that is never run: `predicted` takes the place of nnU-Net."""
    folder = in_workspace.results / f"{TRAINER}__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    shutil.copy(in_workspace.preprocessed / "nnUNetPlans.json", folder / "plans.json")
    shutil.copy(in_workspace.preprocessed / "dataset.json", folder)
    torch.save({"network_weights": {"a": torch.zeros(2)}}, folder / "fold_0" / "checkpoint_final.pth")
    return folder


@pytest.fixture
def predicted(monkeypatch):
    """Predict what is bright in the second channel; gives the names of the cases that were predicted."""
    cases = []

    def predict(model, images, names, output, **_):
        for name in names:
            image = sitk.ReadImage(str(images / f"{name}_0001.nii.gz"))
            sitk.WriteImage(sitk.Cast(image > RULES["whole"], sitk.sitkUInt8), str(output / f"{name}.nii.gz"))
        cases.extend(names)

    monkeypatch.setattr(quantification, "predict_cases", predict)
    return cases


def write_study(folder, number, *, contrasts=("T1", "FLAIR"), **tags):
    for channel, contrast in enumerate(contrasts):
        own = {"PatientID": f"P{number}", "StudyInstanceUID": f"1.9.{number}", "SeriesDescription": f"{contrast} tra"}
        write_slices(
            folder / f"{number}",
            placed(ROW, COLUMN, -STEP),
            uid=f"1.9.{number}.{channel}",
            array=voxels(10 * number + channel),
            **{**SERIES, **own, **tags},
        )


def table_rows(file):
    with file.open() as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def test_studies_in_and_segmentations_and_reports_out(model, predicted, refused, tmp_path):
    """One study is whole, one lacks a contrast, one states no frame of reference: the others go on."""
    studies, table = tmp_path / "studies", tmp_path / "volumes.csv"
    write_study(studies, 1)
    write_study(studies, 2, contrasts=["T1"])
    write_study(studies, 3, FrameOfReferenceUID="")
    killed = tmp_path / ".volumes_images" / "imagesUn" / "patient_0000.nii.gz"  # of a call that was
    killed.parent.mkdir(parents=True)
    killed.touch()
    flags = f"-d 901 -tr {TRAINER} -device cpu -i {studies} -o {table} --dicom --contrast T1=t1* --contrast FLAIR=*air*"
    message = refused(command.main, *flags.split())
    rows, output = table_rows(table), tmp_path / "volumes_dicom"
    with (output / "studies.csv").open() as stream:
        case_of = {row["patient"]: row["case"] for row in csv.DictReader(stream)}
    assert set(rows) == set(case_of.values())
    assert f"({case_of['P3']} states no frame of reference" in message
    assert rows[case_of["P2"]]["warnings"] == "there is no series of FLAIR"
    assert {file.parent.name for file in output.glob("*/*.dcm")} == {case_of["P1"]}
    assert predicted == sorted([case_of["P1"], case_of["P3"]])

    case = output / case_of["P1"]
    dataset = dcmread(case / "segmentation.dcm")
    first = next(iter((studies / "1").glob("*_1.9.1.0.dcm")))
    assert dataset.ReferencedSeriesSequence[0].SeriesInstanceUID == dcmread(first).SeriesInstanceUID
    bright = {
        key(dcmread(file).ImagePositionPatient): dcmread(file).pixel_array
        for file in (studies / "1").glob("*_1.9.1.1.dcm")
    }
    frames = list(frames_of(dataset))
    assert len(frames) == len(bright)
    for label, position, _, plane in frames:
        assert label == "blob"
        assert np.array_equal(plane == 1, bright[position] > RULES["whole"])
    volume = float(rows[case_of["P1"]]["volume_mm3"])
    assert volume == pytest.approx(dataset.pixel_array.sum() * np.prod(SPACING) * STEP, rel=1e-5)
    assert volumes_in_report(case / "report.dcm")["blob"][:2] == (pytest.approx(volume), 1)
    assert not [folder for folder in tmp_path.glob(".*images*") if folder.is_dir()]

    before = {file: file.stat().st_mtime_ns for file in case.iterdir()}
    refused(command.main, *flags.split(), "-num_parts", "1")
    assert {file: file.stat().st_mtime_ns for file in case.iterdir()} == before
    (tmp_path / "codes.json").write_text(json.dumps({"blob": {"region": vars(TISSUE)}}))
    message = refused(command.main, *flags.split(), "--codes", str(tmp_path / "codes.json"))
    assert "DICOM files of another model or with other codes" in message


def test_without_highdicom_one_sentence_says_how_to_install_it(monkeypatch, refused):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    message = refused(command.main, *"-d 901 -i studies -o volumes.csv --dicom".split())
    assert message == 'Error: --dicom needs highdicom: pip install "nnunet-vit-mae[dicom]".\n'
