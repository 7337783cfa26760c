"""DICOM as it comes from hospitals: a right volume, or one clause that says why there is none."""

import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import (
    CAPTURE,
    CLASSES,
    ENHANCED_MR,
    ENHANCED_PET,
    MR,
    SEGMENTATION,
    SPACING,
    STEP,
    group,
    header,
    position,
    voxels,
    write_dicom,
    write_frames,
    write_slices,
)
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from nnunet_vit_mae.datasets.convert.dicom_studies import dicom_studies
from nnunet_vit_mae.datasets.convert.studies import ContrastPattern
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.dicom import SeriesError, find_series, read_series
from nnunet_vit_mae.imaging.scans import read_scan

ALL = range(8)
HEAD = [ContrastPattern("CT", "*head*")]


def the_series(folder: Path):
    (series,) = [one for one in find_series(folder)[0] if not one.passed_over]
    return series


def assert_right(image: sitk.Image, expected: np.ndarray | None = None) -> None:
    """The voxels in the order of space, with the geometry that the files state."""
    assert np.array_equal(sitk.GetArrayFromImage(image), voxels() if expected is None else expected)
    assert image.GetSpacing() == pytest.approx((*SPACING[::-1], STEP))
    assert image.GetOrigin() == pytest.approx(position(0))
    assert image.GetDirection() == pytest.approx(np.eye(3).ravel())


def refusal(folder: Path) -> str:
    with pytest.raises(SeriesError) as error:
        read_series(the_series(folder))
    return str(error.value)


# ---------- enhanced objects: every frame has a position


@pytest.mark.parametrize("sop_class", [CLASSES + "2.1", CLASSES + "2.2", ENHANCED_MR, ENHANCED_PET, CLASSES + "128.1"])
@pytest.mark.parametrize("order", [ALL, ALL[::-1], [0, 2, 4, 6, 1, 3, 5, 7]])
def test_frames_are_sorted_by_position(tmp_path, order, sop_class):
    write_frames(tmp_path / "a.dcm", order, sop_class=sop_class)
    assert_right(read_series(the_series(tmp_path)))


def no_spacing(_, shared, __):
    del shared.PixelMeasuresSequence


def no_position(_, __, frames):
    del frames[3].PlanePositionSequence


def other_orientation(_, __, frames):
    frames[3].PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


def two_volumes(sequence, keyword):
    """A change after which the second eight frames have another value of a tag."""

    def change(_, __, frames):
        for number, frame in enumerate(frames):
            setattr(frame, sequence, group(**{keyword: 1 + number // 8}))

    return change


def test_frames_that_are_no_stack_say_why(tmp_path):
    twice = [*ALL, *ALL]
    for name, order, change, words in (
        ("gap", [0, 1, 2, 3, 6, 7], None, "2.00 to 6.00 mm apart"),
        ("phases", twice, None, "several volumes"),
        ("times", twice, two_volumes("FrameContentSequence", "TemporalPositionIndex"), "differ in the time point"),
        ("echoes", twice, two_volumes("MREchoSequence", "EffectiveEchoTime"), "differ in the echo time"),
        ("diffusion", twice, two_volumes("MRDiffusionSequence", "DiffusionBValue"), "differ in the b-value"),
        ("no spacing", ALL, no_spacing, "without a pixel spacing"),
        ("no position", ALL, no_position, "without a position"),
        ("mixed", ALL, other_orientation, "mixed orientation"),
    ):
        write_frames(tmp_path / name / "a.dcm", order, change)
        assert words in refusal(tmp_path / name), name


def test_each_frame_has_its_own_scale(tmp_path):
    """As in PET, where the slope varies from frame to frame; GDCM knows that of the first only."""
    slopes = [2.0, 0.5, 1.0, 3.0, 1.0, 1.0, 4.0, 1.0]

    def change(_, shared, frames):
        del shared.PixelValueTransformationSequence
        for slope, frame in zip(slopes, frames, strict=True):
            frame.PixelValueTransformationSequence = group(RescaleSlope=slope, RescaleIntercept=-slope)

    write_frames(tmp_path / "a.dcm", ALL, change, sop_class=ENHANCED_PET)
    scales = np.array(slopes)[:, None, None]
    assert_right(read_series(the_series(tmp_path)), (voxels() * scales - scales).astype(np.float32))


def test_the_acquisition_of_an_enhanced_file_is_known(tmp_path):
    """Its tags are in the groups of the frames; the table of a dataset, and measures by slice thickness, need them."""

    def change(_, shared, __):
        shared.CTReconstructionSequence = group(ConvolutionKernel="H31s")

    write_frames(tmp_path / "a.dcm", ALL, change)
    series = the_series(tmp_path)
    assert (float(series.tag("SliceThickness")), series.tag("ConvolutionKernel")) == (STEP, "H31s")


def test_private_groups_of_a_frame_do_not_count(tmp_path):
    """Philips repeats public tags in them, with other meanings."""

    def change(_, __, frames):
        for frame in frames:
            own = group(RescaleSlope=7, RescaleIntercept=3, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
            frame.add_new(0x2005140F, "SQ", own)

    write_frames(tmp_path / "a.dcm", ALL, change, sop_class=ENHANCED_MR)
    assert_right(read_series(the_series(tmp_path)))


def test_a_concatenation_is_one_volume_if_no_part_is_missing(tmp_path):
    for part in range(2):
        tags = {"SeriesInstanceUID": "1.9.1.1", "InConcatenationTotalNumber": 2, "InConcatenationNumber": part + 1}
        write_frames(tmp_path / f"{part}.dcm", ALL[4 * part : 4 * part + 4], uid=f"1.9.1.1.{part}", **tags)
    assert_right(read_series(the_series(tmp_path)))
    (tmp_path / "1.dcm").unlink()
    assert "split into 2 files, but 1 are there" in refusal(tmp_path)


# ---------- classic series


def test_slices_that_are_no_stack_say_why(tmp_path):
    def without(keyword):
        return lambda dataset, _: delattr(dataset, keyword)

    def with_value(keyword, value):
        return lambda dataset, number: setattr(dataset, keyword, value(number))

    def in_colour(dataset, _):
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.PixelRepresentation = 7, 0
        dataset.PixelData = bytes(3 * dataset.Rows * dataset.Columns)

    for name, change, words in (
        ("gap", lambda _, number: number != 4, "2.00 to 4.00 mm apart"),
        ("unequal", with_value("ImagePositionPatient", lambda n: position(n + 0.02 * n * n)), "mm apart"),
        ("tilt", with_value("ImagePositionPatient", lambda n: [-10, -20 + n, 100 + STEP * n]), "tilted gantry"),
        ("mixed", with_value("ImageOrientationPatient", lambda n: [1, 0, 0, 0, n % 2, 1 - n % 2]), "mixed orientation"),
        ("zero", with_value("ImageOrientationPatient", lambda _: [0, 0, 0, 0, 0, 0]), "not perpendicular"),
        ("sizes", with_value("PixelSpacing", lambda n: [0.5, 0.5 + n // 4]), "different sizes or pixel spacings"),
        ("no spacing", without("PixelSpacing"), "without a pixel spacing"),
        ("zero spacing", with_value("PixelSpacing", lambda _: [0, 0]), "without a pixel spacing"),
        ("no position", without("ImagePositionPatient"), "without a position"),
        ("frames", with_value("FrameOfReferenceUID", lambda n: f"1.{1 + n // 4}"), "several frames of reference"),
        ("colour", in_colour, "in colour"),
        ("frames", with_value("NumberOfFrames", lambda _: 2), "without a position"),
    ):
        write_slices(tmp_path / name, change)
        assert words in refusal(tmp_path / name), name
    for name, more, words in (
        ("times", {"TemporalPositionIdentifier": 2}, "differ in the time point"),
        ("echoes", {"EchoTime": 90}, "differ in the echo time"),
    ):
        first = dict.fromkeys(more, 1)
        write_slices(tmp_path / name, uid="1.9.1.1", sop_class=MR, **first)
        write_slices(tmp_path / name / "2", uid="1.9.1.1.2", SeriesInstanceUID="1.9.1.1", sop_class=MR, **more)
        assert words in refusal(tmp_path / name), name


def test_a_tilt_of_thin_slices_is_seen_over_all_of_them(tmp_path):
    """From slice to slice it is less than the rounding of positions, over a head it is centimetres."""

    def tilted(degrees):
        sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))

        def change(dataset, number):
            dataset.ImageOrientationPatient = [1, 0, 0, 0, f"{cosine:.6f}", f"{-sine:.6f}"]
            dataset.ImagePositionPatient = [-10, -20, 100 + 0.625 * number]

        return change

    head = np.zeros((201, 4, 4), np.int16)
    write_slices(tmp_path / "tilted", tilted(8), array=head)
    assert "tilted gantry" in refusal(tmp_path / "tilted")
    write_slices(tmp_path / "upright", tilted(0.05), array=head)  # 0.11 mm in all
    assert read_series(the_series(tmp_path / "upright")).GetSize() == (4, 4, 201)


def test_captured_slices_with_a_geometry_are_a_volume(tmp_path):
    """GDCM gives slices of this class a spacing of 1 in some versions."""
    write_slices(tmp_path, sop_class=CAPTURE)
    assert_right(read_series(the_series(tmp_path)))
    write_slices(tmp_path, lambda dataset, _: delattr(dataset, "PixelSpacing"), sop_class=CAPTURE)
    assert "without a pixel spacing" in refusal(tmp_path)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_encodings_are_read(tmp_path, syntax):
    write_slices(tmp_path)
    for file in tmp_path.iterdir():
        write_dicom(dcmread(file), file, syntax)
    assert_right(read_series(the_series(tmp_path)))


def test_compressed_slices_are_read_or_named_by_their_compression(tmp_path):
    write_slices(tmp_path)
    for file in tmp_path.iterdir():
        dataset = dcmread(file)
        dataset.compress(RLELossless, encoding_plugin="pydicom")
        dataset.save_as(file)
    assert_right(read_series(the_series(tmp_path)))
    for compressor in ("JPEG2000", "JPEG"):
        write_slices(tmp_path)
        for file in tmp_path.iterdir():
            writer = sitk.ImageFileWriter()
            writer.SetFileName(str(tmp_path.with_suffix(".dcm")))
            writer.SetCompressor(compressor)  # lossless
            writer.UseCompressionOn()
            writer.Execute(sitk.ReadImage(str(file)))
            compressed, dataset = dcmread(tmp_path.with_suffix(".dcm")), dcmread(file)
            assert compressed.file_meta.TransferSyntaxUID.is_compressed
            dataset.PixelData = compressed.PixelData
            dataset["PixelData"].is_undefined_length = True
            write_dicom(dataset, file, compressed.file_meta.TransferSyntaxUID)
        assert_right(read_series(the_series(tmp_path)))
    for file in tmp_path.iterdir():
        dataset = dcmread(file)
        dataset.PixelData = encapsulate([b"no code stream"])
        write_dicom(dataset, file, JPEG2000Lossless)
    series, lost = find_series(tmp_path)
    message = refusal(tmp_path) if series else str(lost)
    assert "JPEG 2000" in message or message == "8"


MEASURED = """
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from nnunet_vit_mae.imaging.dicom import find_series
before = getrusage(RUSAGE_SELF).ru_maxrss
print(find_series(Path(sys.argv[1]))[1], getrusage(RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a library takes")
def test_a_damaged_length_takes_no_memory(tmp_path):
    """GDCM makes room for what a length asks for before it reads: gigabytes here, for three letters too many."""
    write_frames(tmp_path / "a.dcm", ALL)
    content = (tmp_path / "a.dcm").read_bytes()
    (tmp_path / "a.dcm").write_bytes(content.replace(b"PRIMARY", b"PRIMA\xff\xff\xff\xffY"))
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    damaged, kilobytes = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert damaged == 1
    assert kilobytes < 2**18


def test_an_image_from_two_archives_is_one(tmp_path):
    """One has changed a tag, or compresses; other voxels under the same UID are refused as before."""
    for name in ("pacs", "disc", "packed"):
        write_slices(tmp_path / name, StationName=name)
    for file in (tmp_path / "packed").iterdir():
        dataset = dcmread(file)
        dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        dataset.save_as(file)
    assert_right(read_series(the_series(tmp_path)))
    write_slices(tmp_path / "other", array=voxels(1))
    assert "two slices at the same position" in refusal(tmp_path)


# ---------- what is not an image is never taken for one


def test_objects_without_an_image_are_passed_over_by_their_class(tmp_path):
    write_slices(tmp_path)
    write_frames(
        tmp_path / "seg.dcm", [*ALL, *ALL], sop_class=SEGMENTATION, uid="1.9.1.7.1", SeriesDescription="head thin"
    )
    for number, kind in enumerate(("481.3", "88.11", "11.1", "88.59", "66", "481.2", "4.2", "30"), 20):
        dataset = header(CLASSES + kind, f"1.9.1.{number}.1", SeriesDescription="head")
        write_dicom(dataset, tmp_path / f"object_{number}.dcm")
    write_slices(tmp_path / "scout", uid="1.9.1.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    series, lost = find_series(tmp_path)
    assert lost == 0
    passed_over = {one.files[0].class_name: one.passed_over for one in series if one.passed_over}
    names = ("Segmentation", "RT Structure Set", "Basic Text SR", "Grayscale Softcopy Presentation State", "Raw Data")
    assert all(passed_over[name] == "is not an image" for name in names)
    assert passed_over["CT Image"] == "is a localizer"
    assert len(passed_over) == 10
    assert_right(read_scan(tmp_path))
    found = dicom_studies(tmp_path, HEAD, None)
    (study,) = found.studies
    assert_right(read_series(study.images["CT"].origin))
    assert ("Segmentation", "is not an image") in study.unused
    assert ("CT Image of 8 slices", "is a localizer") in study.unused
    with pytest.raises(UserError, match="the label is a Segmentation, not a series of images"):
        dicom_studies(tmp_path, HEAD, "*thin*")


def test_only_other_objects_are_named(tmp_path):
    write_dicom(header(SEGMENTATION, "1.9.1.7.1"), tmp_path / "seg.dcm")
    with pytest.raises(UserError, match=r"no DICOM images in .* \(Segmentation is not an image\)"):
        dicom_studies(tmp_path, HEAD, None)


def test_an_original_series_is_preferred_and_the_others_are_named(tmp_path):
    more = np.concatenate([voxels(), voxels()])
    write_slices(tmp_path / "mpr", uid="1.9.1.2", array=more, ImageType=["DERIVED", "SECONDARY", "MPR"])
    write_slices(tmp_path / "captured", uid="1.9.1.3", array=more, sop_class=CAPTURE)
    write_slices(tmp_path / "thick", lambda _, number: number % 2 == 0, uid="1.9.1.4", StudyTime="120000")
    write_slices(tmp_path / "first", uid="1.9.1.1", StudyTime="100000")
    write_slices(tmp_path / "second", uid="1.9.1.5", StudyTime="110000", array=voxels(1))
    write_slices(tmp_path / "leg", uid="1.9.1.6", SeriesDescription="leg")
    (study,) = dicom_studies(tmp_path, HEAD, None).studies
    assert_right(read_series(study.images["CT"].origin))
    assert sorted(reason for _, reason in study.unused) == [
        "CT has a series with more slices",
        "CT has an earlier series with as many slices",
        "is derived, and CT has a series that is not",
        "is derived, and CT has a series that is not",
        "matches no --contrast",
    ]


def test_a_series_that_is_a_volume_is_preferred_to_a_larger_one_that_is_none(tmp_path):
    """Such as two scans in one series, which has most slices; originals stay before derived series."""
    for time in (1, 2):
        tags = {"SeriesInstanceUID": "1.9.1.2", "SeriesDescription": "head twice"}
        write_slices(tmp_path / f"{time}", uid=f"1.9.1.2{time}", **tags)
    (study,) = dicom_studies(tmp_path, [ContrastPattern("CT", "head*")], None).studies
    assert len(study.images["CT"].origin.files) == 16  # there is no other
    write_slices(tmp_path / "mpr", uid="1.9.1.3", ImageType=["DERIVED", "SECONDARY", "MPR"])
    (study,) = dicom_studies(tmp_path, [ContrastPattern("CT", "head*")], None).studies
    assert len(study.images["CT"].origin.files) == 16
    write_slices(tmp_path / "plain", lambda _, number: number < 6, uid="1.9.1.4")
    (study,) = dicom_studies(tmp_path, [ContrastPattern("CT", "head*")], None).studies
    assert_right(read_series(study.images["CT"].origin), voxels()[:6])
    (_, reason), (_, other) = study.unused
    assert "CT has a series that is a volume, while this one has two slices at the same position" in reason
    assert other == "is derived, and CT has a series that is not"


def write_diffusion(folder: Path, **traits: list) -> None:
    """A series of volumes that differ in tags, as scanners of several makers store b-values and echoes."""
    for number, values in enumerate(zip(*traits.values(), strict=True)):
        tags = dict(zip(traits, values, strict=True)) | {"SeriesDescription": "ep2d", "SeriesInstanceUID": "1.9.1.2"}
        write_slices(folder / f"{number}", uid=f"1.9.1.2{number}", sop_class=MR, array=voxels(number), **tags)


def test_one_of_the_volumes_of_a_series_is_chosen_by_what_tells_it_from_the_others(tmp_path):
    write_diffusion(tmp_path, DiffusionBValue=[1000.0, 0.0], SequenceName=["*ep_b1000t", "*ep_b0"])
    write_slices(tmp_path / "other", uid="1.9.1.3", SeriesDescription="FLAIR", sop_class=MR)
    with pytest.raises(UserError, match=r"are: FLAIR, ep2d \(b-value 0\), ep2d \(b-value 1000\)"):
        dicom_studies(tmp_path, [], None)
    patterns = [ContrastPattern("DWI", "*b-value 1000*"), ContrastPattern("FLAIR", "flair")]
    (study,) = dicom_studies(tmp_path, patterns, None).studies
    assert_right(read_series(study.images["DWI"].origin))
    assert study.images["DWI"].origin.description == "ep2d (b-value 1000)"
    assert study.unused == (("MR Image of 8 slices", "matches no --contrast"),)
    patterns = [ContrastPattern("DWI", "ep2d"), ContrastPattern("FLAIR", "flair")]
    (study,) = dicom_studies(tmp_path, patterns, None).studies
    words = (
        "is one of 2 volumes in a series, (b-value 0) to (b-value 1000): choose one, for instance with --contrast DWI="
    )
    assert study.problems == {"DWI": f"{words}'*(b-value 1000)'"}
    assert {reason for _, reason in study.unused} == {study.problems["DWI"]}
    with pytest.raises(UserError, match=r"matches --contrast alone \(is one of 2 volumes in a series"):
        dicom_studies(tmp_path, patterns[:1], None)
    with pytest.raises(UserError, match=r"can be read \(the label is one of 2 volumes in a series"):
        dicom_studies(tmp_path, patterns[1:], "ep2d*")


def b_value(value: float):
    """A change that gives all frames a b-value, and each an acquisition of its own."""

    def change(_, __, frames):
        for number, frame in enumerate(frames):
            frame.MRDiffusionSequence = group(DiffusionBValue=value)
            frame.FrameContentSequence = group(FrameAcquisitionNumber=number, TemporalPositionIndex=1 + number)

    return change


def test_volumes_that_two_tags_tell_apart_are_divided_and_others_refused(tmp_path):
    write_diffusion(tmp_path / "two", EchoTime=[10, 10, 90, 90], ImageType=[["ORIGINAL", part] for part in "MPMP"])
    (study,) = dicom_studies(
        tmp_path / "two", [ContrastPattern("T2", "*echo time 90, image type ORIGINAL/M*")], None
    ).studies
    assert_right(read_series(study.images["T2"].origin), voxels(2))
    for value in (0, 1000):  # as newer scanners store them, one enhanced file each
        change, tags = b_value(value), {"SeriesInstanceUID": "1.9.1.2", "SeriesDescription": "ep2d"}
        write_frames(tmp_path / f"frames/{value}.dcm", ALL, change, uid=f"1.9.1.2.{value}", array=voxels(value), **tags)
    (study,) = dicom_studies(tmp_path / "frames", [ContrastPattern("DWI", "*b-value 1000*")], None).studies
    assert_right(read_series(study.images["DWI"].origin), voxels(1000))
    write_diffusion(tmp_path / "none", EchoTime=[10, 10], SequenceName=["a", "a"])
    (study,) = dicom_studies(tmp_path / "none", [ContrastPattern("T2", "ep2d")], None).studies
    with pytest.raises(SeriesError, match="at the same position"):
        read_series(study.images["T2"].origin)


# ---------- people and their names


@pytest.mark.parametrize(
    ("charset", "encoding", "text"),
    [
        ("ISO_IR 100", "latin-1", "Schädel-Müller"),
        ("ISO_IR 192", "utf-8", "Schädel-李"),
        ("GB18030", "gb18030", "头部-李"),
        ("GBK", "gbk", "头部-李"),
        ("ISO_IR 144", "iso8859-5", "Череп-Люк"),
        (["ISO 2022 IR 13", "ISO 2022 IR 87"], "iso2022_jp", "頭部-山田"),
        (None, "latin-1", "Schädel-Müller"),  # no character set is stated
    ],
)
def test_character_sets(tmp_path, charset, encoding, text):
    def change(dataset, _):
        dataset.SpecificCharacterSet = charset or ""
        if not charset:
            del dataset.SpecificCharacterSet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_slices(tmp_path, change, SeriesDescription="x" * 24, PatientID="y" * 24)
    for file in tmp_path.iterdir():
        content = file.read_bytes()
        for letter in (b"x", b"y"):
            content = content.replace(letter * 24, text.encode(encoding).ljust(24))
        file.write_bytes(content)
    (study,) = dicom_studies(tmp_path, [ContrastPattern("CT", text.upper()[:3] + "*")], None).studies
    assert study.patient == text


def test_a_wrong_character_set_does_not_merge_patients(tmp_path):
    """Bytes that the stated character set does not know would all be decoded to the same sign."""
    for letter, uid in ((b"\xe4", "1.9.1.1"), (b"\xfc", "1.9.1.2")):
        write_slices(tmp_path / uid, uid=uid, StudyInstanceUID=f"{uid}.0", PatientID="M~M")
        for file in (tmp_path / uid).iterdir():
            file.write_bytes(file.read_bytes().replace(b"M~M", b"M" + letter + b"M"))
    assert {study.patient for study in dicom_studies(tmp_path, HEAD, None).studies} == {"MäM", "MüM"}


@pytest.mark.parametrize("number", ["ANONYMOUS", "0000", "", "n/a", "Anonymized", "999999", "123456"])
def test_people_who_share_a_placeholder_are_told_apart(tmp_path, number):
    for study in range(3):
        uid = f"1.9.{study + 5}"
        write_slices(tmp_path / uid, uid=f"{uid}.1", StudyInstanceUID=uid, PatientID=number, array=voxels(study))
    found = dicom_studies(tmp_path, HEAD, None)
    assert len({study.patient for study in found.studies}) == 3
    assert "3 studies share a patient ID that stands for nobody" in found.warnings[0]


def test_people_who_share_an_id_differ_in_birth_or_sex(tmp_path):
    people = [("19500101", "F"), ("19600101", "F"), ("19500101", "F"), ("19500101", "M")]
    for study, (birth, sex) in enumerate(people):
        uid = f"1.9.{study + 5}"
        tags = {"PatientBirthDate": birth, "PatientSex": sex, "StudyInstanceUID": uid}
        write_slices(tmp_path / uid, uid=f"{uid}.1", **tags)
    found = dicom_studies(tmp_path, HEAD, None)
    assert [study.session for study in found.studies if "19500101 F" in study.patient] == ["1.9.5", "1.9.7"]
    assert len({study.patient for study in found.studies}) == 3
    assert "3 people share a patient ID" in found.warnings[0]
    assert "P1" not in found.warnings[0]


def test_studies_of_one_person_are_one_patient(tmp_path):
    for study in ("1.9.5", "1.9.6"):
        write_slices(tmp_path / study, uid=f"{study}.1", StudyInstanceUID=study, PatientBirthDate="19500101")
    found = dicom_studies(tmp_path, HEAD, None)
    assert [study.patient for study in found.studies] == ["P1", "P1"]
    assert not found.warnings


def test_one_series_number_of_two_people_is_not_one_stack(tmp_path):
    """Some anonymisers give everybody the same UIDs."""
    write_slices(tmp_path / "a", lambda _, number: number < 4)
    write_slices(tmp_path / "b", lambda _, number: number >= 4, PatientID="P2")
    found = dicom_studies(tmp_path, HEAD, None)
    assert {study.patient for study in found.studies} == {"P1", "P2"}
    assert [len(study.images["CT"].origin.files) for study in found.studies] == [4, 4]
