"""From DICOM and BIDS to a raw dataset: canonical contrasts, one grid, and no trace of the patient."""

import csv
import gzip
import json
import os
import time
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import read_voxels
from synthetic_head import grid, moved, scan, tell_two_places

from nnunet_vit_mae.cli.convert import main
from nnunet_vit_mae.datasets.convert import conversion, label_values
from nnunet_vit_mae.datasets.convert.key import name_cases
from nnunet_vit_mae.datasets.convert.studies import Study
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import visible_below
from nnunet_vit_mae.imaging.dicom import SeriesError, find_series, read_series
from nnunet_vit_mae.imaging.scans import ScanError, read_scan
from nnunet_vit_mae.storage.files import locked

NAME, NUMBER, BIRTH = "Musterfrau^Erika", "PID-4711", "19631224"
SCANNER = {"0008|0070": "SIEMENS", "0008|1090": "Sensation 64", "0018|1210": "H31s", "0018|0050": "3.0"}
SMALL = {"size": (40, 44, 26), "spacing": (2.2, 2.1, 3.4)}
COARSE = {"size": (20, 24, 9), "spacing": (4, 3.5, 9)}


def write_series(folder: Path, image: sitk.Image, description: str, uid: str, study="1.2.1", patient=NUMBER, skip=()):
    """One file for each slice, in names that sort otherwise than the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    tags = {"0010|0010": NAME, "0010|0020": patient, "0010|0030": BIRTH, "0008|0020": "20200101", "0008|0060": "CT"}
    tags |= SCANNER | {"0008|103e": description, "0020|000d": study, "0020|000e": uid}
    tags["0020|0037"] = "\\".join(f"{x:.8f}" for x in direction.T[:2].ravel())
    image = sitk.Cast(image, sitk.sitkInt16)
    count = image.GetSize()[2]
    for number in set(range(count)) - set(skip):
        one = image[:, :, number]
        position = "\\".join(f"{x:.6f}" for x in image.TransformIndexToPhysicalPoint((0, 0, number)))
        for key, value in (tags | {"0020|0032": position, "0008|0018": f"{uid}.{number + 1}"}).items():
            one.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{number * 17 % count:03d}_{uid}.dcm"))
        writer.Execute(one)


def write(image: sitk.Image, file: Path, **sidecar) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.SetMetaData("ITK_FileNotes", NAME)
    sitk.WriteImage(image, str(file))
    if sidecar:
        file.with_name(file.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))


def table(file: Path) -> list[dict[str, str]]:
    with file.open() as stream:
        return list(csv.DictReader(stream))


def array_of(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def is_pseudonymous(folder: Path) -> bool:
    """Whether no file name and no byte of any file, compressed or not, identifies the patient."""
    for file in folder.rglob("*"):
        content = b"" if file.is_dir() else file.read_bytes()
        content = gzip.decompress(content) if file.name.endswith(".gz") else content
        if any(word.encode() in content + str(file.name).encode() for word in ("Muster", NUMBER, BIRTH, "sub-")):
            return False
    return True


@pytest.fixture
def folders(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source", tmp_path / "Dataset902_Head"


# ---------- DICOM


@pytest.mark.parametrize("turn", [(0.0, 0.0, 0.0), (0.3, -0.2, 0.1)])
@pytest.mark.parametrize("flip", [(1, 1, 1), (1, -1, -1)])
def test_slices_are_sorted_by_position(tmp_path, turn, flip):
    image = sitk.Cast(scan(moved(shift=(5, 6, 7)), **COARSE, turn=turn, flip=flip)[0], 2)
    write_series(tmp_path / "a", image, "head", "1.2.3")
    got = read_series(find_series(tmp_path)[0][0])
    assert got.GetSize() == image.GetSize()
    assert got.GetSpacing() == pytest.approx(image.GetSpacing(), abs=1e-4)
    there = sitk.Resample(image, got, sitk.Transform(), sitk.sitkNearestNeighbor, -9999)
    assert np.array_equal(sitk.GetArrayFromImage(there), sitk.GetArrayFromImage(got))


def test_a_series_that_is_no_stack_says_why(tmp_path):
    image = scan(moved(), **COARSE)[0]
    write_series(tmp_path / "gap", image, "gap", "1.1", skip=(4,))
    write_series(tmp_path / "mixed", image, "mixed", "1.2")
    write_series(tmp_path / "mixed/more", scan(moved(), turn=(0.5, 0, 0), **COARSE)[0], "mixed", "1.2")
    write_series(tmp_path / "twice", image, "twice", "1.3")
    write_series(tmp_path / "twice/again", image + 1, "twice", "1.3")
    write_series(tmp_path / "one", image, "one", "1.4", skip=range(1, 9))
    write_series(tmp_path / "cut", image, "cut", "1.5")
    file = next((tmp_path / "cut").iterdir())
    file.write_bytes(file.read_bytes()[:-300])
    reasons = {}
    for series in find_series(tmp_path)[0]:
        with pytest.raises(SeriesError) as error:
            read_series(series)
        reasons[series.description] = str(error.value)
    assert "9.00 to 18.00 mm apart" in reasons["gap"]
    assert "mixed orientation" in reasons["mixed"]
    assert "at the same position" in reasons["twice"]
    assert "only one slice" in reasons["one"]
    assert "copy it again" in reasons["cut"]


def test_dicom_to_a_dataset_without_a_name(folders, tmp_path, refused):
    source, output = folders
    write_series(source / "disc" / NAME, scan(moved(), **SMALL)[0], "Head soft H31s", "1.1")
    write_series(
        source / "disc" / NAME, scan(moved(), size=(20, 24, 9), spacing=(4, 4, 9))[0], "Head soft thick", "1.2"
    )
    write_series(source / "second", scan(moved(shift=(9, 0, 0)), **SMALL)[0], "HEAD SOFT", "2.1", study="1.2.2")
    write_series(source / "other", scan(moved(), **SMALL)[0], "head soft", "3.1", "1.2.3", "PID-9", skip=(7, 8))
    (source / "readme.txt").write_text(NAME)
    assert "descriptions in" in refused(main, "-i", str(source), "-o", str(output), "-np", "1")
    key = tmp_path / "key.csv"
    arguments = ["-i", str(source), "-o", str(output), "--contrast", "CT=*soft*", "--key", str(key), "-np", "1"]
    inside = [*arguments[:-4], "--key", str(output / "key.csv")]
    assert "inside the dataset" in refused(main, *inside)
    message = refused(main, *arguments)
    assert "P0002_1 CT: has a gap" in message
    assert "PID" not in message

    assert sorted(file.name for file in (output / "imagesUn").iterdir()) == [
        "P0001_1_0000.nii.gz",
        "P0001_2_0000.nii.gz",
    ]
    assert is_pseudonymous(output)
    first, second = table(output / "scans.csv")
    assert (first["patient"], first["session"], second["session"]) == ("P0001", "1", "2")
    assert (first["manufacturer"], first["model"], first["kernel"]) == ("SIEMENS", "Sensation 64", "H31s")
    assert float(first["slice_thickness_mm"]) == 3
    assert first["CT_spacing_mm"] == "2.2 2.1 3.4"  # of the series with most slices
    assert table(key)[0] == {"case": "P0001_1", "patient": NUMBER, "session": "1.2.1"}
    again = output.with_name("Dataset903_Again")  # the key keeps the numbers
    key.write_text(key.read_text().replace("P0001_", "P0007_"))
    refused(main, *[str(again) if one == str(output) else one for one in arguments])
    assert (again / "imagesUn" / "P0007_2_0000.nii.gz").exists()


def test_damaged_files_are_counted_and_those_without_an_image_are_not(folders, refused):
    source, output = folders
    thick = scan(moved(), **COARSE)[0]
    write_series(source / "lost", thick, "head", "1.2", "1.2.2", "PID-9")
    for file in (source / "lost").iterdir():
        file.write_bytes(file.read_bytes()[:940])
    arguments = ["-i", str(source), "-o", str(output), "--contrast", "CT=head", "-np", "1"]
    assert "None of 9 DICOM files" in refused(main, *arguments)
    write_series(source, thick, "head", "1.1")
    start = (source / "000_1.1.dcm").read_bytes()
    ends = {"empty": b"", "early.dcm": start[:60], "early": start[:300]}
    other = start.replace(b".5.1.4.1.1.2\0", b".5.1.4.1.1.11")[:940]  # a presentation state
    for name, content in (ends | {"other": other, "._001.dcm": b"macOS", "text": b"text"}).items():
        (source / name).write_bytes(content)
    message = refused(main, *arguments)
    assert "unknown study: 12 files cannot be read" in message
    assert not any(word in message for word in (NAME, "PID", "early", "1.2.2"))
    with pytest.raises(ScanError, match="source has 12 DICOM files that cannot be read"):
        read_scan(source)  # as other commands read a folder
    assert [(row["case"], row["image"]) for row in table(output / "problems.csv")] == [("unknown", "study")]
    assert is_pseudonymous(output)


def test_the_largest_series_has_most_slices_not_files(folders, tmp_path, refused):
    source, output = folders
    image = sitk.Cast(scan(moved(), **COARSE)[0], sitk.sitkInt16)
    tags = {"0010|0020": NUMBER, "0020|000d": "1.2.1", "0020|000e": "1.1", "0008|103e": "head", "0008|0060": "MR"}
    for key, value in tags.items():
        image.SetMetaData(key, value)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(source / "frames.dcm"))
    writer.Execute(image)
    write_series(source, image[:, :, :3], "head", "1.2")
    arguments = ["-i", str(source), "--contrast", "T1=head", "-np", "1", "-o"]
    main([*arguments, str(output)])
    got = sitk.ReadImage(str(output / "imagesUn" / "P0001_1_0000.nii.gz"))
    assert np.array_equal(array_of(got), array_of(image))
    assert got.GetSpacing() == pytest.approx(image.GetSpacing())
    (source / "frames.dcm").unlink()
    assert "CT: the series is not a volume, it has 20x24x3" in refused(
        main, *arguments[:2], "--contrast", "CT=head", *arguments[4:], str(tmp_path / "Dataset903_Thin")
    )


def test_slices_with_scales_of_their_own_keep_their_values(tmp_path):
    image = scan(moved(), **COARSE)[0]
    write_series(tmp_path, image, "head", "1.1")
    scales = [1.0] * 3 + [0.25] * 6
    for file in tmp_path.iterdir():
        number = int(sitk.ReadImage(str(file)).GetMetaData("0008|0018").rsplit(".", 1)[1]) - 1
        start, tag, rest = file.read_bytes().partition(b"\x28\x00\x53\x10\x02\x00\x00\x00")
        scale = f"{scales[number]:.2f}".encode()
        file.write_bytes(start + tag[:4] + len(scale).to_bytes(4, "little") + scale + rest[2:])
    expected = array_of(sitk.Cast(image, sitk.sitkInt16)) * np.array(scales)[:, None, None]
    assert np.array_equal(array_of(read_series(find_series(tmp_path)[0][0])), expected)


def test_folders_behind_links_are_read_once_and_one_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    for place in ("elsewhere/inner/a.dcm", "archive/.hidden/b.dcm", "archive/c.dcm"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    archive = tmp_path / "archive"
    for name, target in {"link": tmp_path / "elsewhere", "up": archive, "gone.dcm": tmp_path / "gone"}.items():
        (archive / name).symlink_to(target)
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "elsewhere" / "inner")
    assert len(found := visible_below(archive)) == 3
    assert {file.name for file in found} == {"a.dcm", "c.dcm", "gone.dcm"}
    assert not visible_below(tmp_path / "nowhere")
    scandir = os.scandir

    def refusing(place):
        if Path(place).name == "link":
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"A folder in \S+archive cannot be read \(Permission denied\)"):
        visible_below(archive)


def test_links_to_slices_that_are_gone_are_counted(tmp_path):
    image = scan(moved(), **COARSE)[0]
    write_series(tmp_path / "series", image, "head", "1.1")
    slice_ = next((tmp_path / "series").iterdir())
    slice_.unlink()
    slice_.symlink_to(tmp_path / "gone")
    (series,), lost = find_series(tmp_path / "series")
    assert (len(series.frames), lost) == (image.GetSize()[2] - 1, 1)


def test_a_second_copy_of_a_file_does_no_harm(tmp_path):
    image = scan(moved(), **COARSE)[0]
    write_series(tmp_path / "once", image, "head", "1.1")
    copytree(tmp_path / "once", tmp_path / "again")
    assert read_series(find_series(tmp_path)[0][0]).GetSize() == image.GetSize()


def test_a_dicom_label_that_nothing_fits_is_a_mistake(folders, refused):
    source, output = folders
    write_series(source, scan(moved(), **COARSE)[0], "head", "1.1")
    arguments = ["-i", str(source), "-o", str(output), "--contrast", "CT=head", "--labels", "nolabel*"]
    assert "matches --labels nolabel*" in refused(main, *arguments)
    assert not output.exists()


# ---------- pseudonyms


def _stop(*_):
    raise KeyboardInterrupt


def test_the_key_is_written_before_the_first_image(folders, tmp_path, refused, monkeypatch):
    source, output = folders
    write(grid(), source / "sub-01/anat/sub-01_T1w.nii.gz")
    arguments = ["-i", str(source), "-o", str(output), "-np", "1", "--key"]
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(main, *arguments, str(tmp_path / "file" / "key.csv"))
    key = tmp_path / "key.csv"
    with monkeypatch.context() as context:
        context.setattr("nnunet_vit_mae.datasets.convert.conversion.convert_study", _stop)
        with pytest.raises(SystemExit, match="130"):
            main([*arguments, str(key)])
    assert table(key) == [{"case": "P0001_1", "patient": "sub-01", "session": ""}]
    key.write_text("\ufeffcase;patient;session\nP0005_2;sub-01;\n", encoding="utf-8")  # as a spreadsheet saves it
    main([*arguments, str(key)])
    assert (output / "imagesUn" / "P0005_2_0000.nii.gz").exists()
    key.write_text("case,patient,session\nfoo,sub-01,\n")
    again = [str(output.with_name("Dataset903_Again")) if one == str(output) else one for one in arguments]
    message = refused(main, *again, str(key))
    assert "not the key of an earlier conversion" in message
    assert "sub-01" not in message


def test_many_patients_are_named_at_once_and_after_those_of_the_key(tmp_path):
    key = tmp_path / "key.csv"
    key.write_text("case,patient,session\nP0007_4,sub-0003,ses-9\n")
    studies = [Study(f"sub-{number:04d}", session) for number in range(5000) for session in ("ses-1", "ses-2")]
    started = time.process_time()
    names = name_cases(studies, key)
    assert time.process_time() - started < 4  # a look at all names for each study takes 11 s
    assert [names["sub-0003", session] for session in ("ses-9", "ses-1", "ses-2")] == ["P0007_4", "P0007_5", "P0007_6"]
    assert [names["sub-0000", "ses-1"], names["sub-4999", "ses-2"]] == ["P0008_1", "P5006_2"]


def test_two_conversions_at_once_do_not_write_one_key(folders, tmp_path, refused):
    source, output = folders
    write(grid(), source / "sub-01/anat/sub-01_T1w.nii.gz")
    key = tmp_path / "key.csv"
    with locked(key):
        message = refused(main, "-i", str(source), "-o", str(output), "--key", str(key))
    assert f"Another process is writing to {key}" in message
    assert not key.exists()
    assert not output.exists()


def test_patients_whose_ids_are_alike_are_asked_about(folders, tmp_path, capsys):
    source, output = folders
    for subject in ("sub-01", "sub-02"):
        write(grid(**SMALL), source / f"{subject}/anat/{subject}_T1w.nii.gz")
    key = tmp_path / "key.csv"
    key.write_text("case,patient,session\nP0001_1,SUB-2,\n")
    main(["-i", str(source), "-o", str(output), "-np", "1", "--key", str(key)])
    assert "Are these different patients? P0001, P0003: their IDs differ only" in capsys.readouterr().out


def test_a_conversion_does_not_go_on_with_files_that_were_corrected_meanwhile(folders, refused, monkeypatch):
    source, output = folders
    for subject in ("sub-01", "sub-02"):
        write(grid(**SMALL), source / f"{subject}/anat/{subject}_T1w.nii.gz")
    arguments = ["-i", str(source), "-o", str(output), "-np", "1"]
    with monkeypatch.context() as context:
        context.setattr("nnunet_vit_mae.datasets.convert.conversion._write_conversion_tables", _stop)
        with pytest.raises(SystemExit, match="130"):
            main(arguments)
    write(2 * grid(**SMALL), source / "sub-01/anat/sub-01_T1w.nii.gz")
    assert "is an unfinished conversion of other files" in refused(main, *arguments)


# ---------- BIDS


def test_bids_with_a_missing_contrast_and_other_grids(folders, refused):
    source, output = folders
    sidecar = {"Manufacturer": "Philips", "ManufacturersModelName": "Ingenia", "SliceThickness": 3.4}
    to_other = moved((0.1, -0.08, 0.12), (6, -5, 4))  # the patient moved between the contrasts
    flair, label = scan(moved(), **SMALL)
    t1 = scan(to_other, noise=3, size=(44, 46, 30), spacing=(2, 2, 2.8))[0]
    write(flair, source / "sub-01/anat/sub-01_FLAIR.nii.gz", **sidecar)
    write(t1, source / "sub-01/anat/sub-01_T1w.nii.gz", **sidecar)
    write(label, source / "derivatives/manual/sub-01/anat/sub-01_space-FLAIR_dseg.nii.gz")
    write(label, source / "derivatives/bet/sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    write(scan(moved(), noise=4, **SMALL)[0], source / "sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii.gz")
    broken = source / "sub-03/anat/sub-03_FLAIR.nii.gz"
    write(flair, broken)
    broken.write_bytes(broken.read_bytes()[:5000])
    message = refused(main, "-i", str(source), "-o", str(output), "-np", "1")
    assert "P0003_1 FLAIR: the file is cut off or damaged, copy it again" in message
    assert "sub-" not in message

    description = json.loads((output / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "FLAIR", "1": "T1"}
    assert description["labels"] == {"background": 0, "label_1": 1}
    assert description["numTraining"] == 1
    record = json.loads((output / "contrasts.json").read_text())
    assert record["imagesTr"]["P0001_1"] == {"present": ["FLAIR", "T1"], "filled": [], "blank": []}
    assert record["imagesUn"]["P0002_1"] == {"present": ["FLAIR"], "filled": ["T1"], "blank": []}
    assert not read_voxels(output / "imagesUn" / "P0002_1_0001.nii.gz").any()
    images = [sitk.ReadImage(str(output / "imagesTr" / f"P0001_1_000{n}.nii.gz")) for n in (0, 1)]
    assert images[0].GetSize() == images[1].GetSize() == flair.GetSize()
    middle = tuple(slice(5, -5) for _ in range(3))
    arrays = [sitk.GetArrayFromImage(image)[middle].ravel() for image in images]
    assert np.corrcoef(*arrays)[0, 1] > 0.93  # without registration it is below 0.8
    mask = sitk.ReadImage(str(output / "labelsTr" / "P0001_1.nii.gz"))
    assert np.array_equal(sitk.GetArrayFromImage(mask), sitk.GetArrayFromImage(label))
    row = table(output / "scans.csv")[0]
    assert (row["contrasts"], row["reference"], row["model"]) == ("FLAIR;T1", "FLAIR", "Ingenia")
    assert float(row["T1_mutual_information"]) > 0.3
    assert is_pseudonymous(output)


def test_patterns_reference_and_labels_can_be_chosen(folders, refused):
    source, output = folders
    flair, label = scan(moved(), **SMALL)
    t1 = scan(moved(), noise=3, size=(44, 46, 30), spacing=(2, 2, 2.8))[0]
    for run in (1, 2):
        write(flair, source / f"sub-01/anat/sub-01_run-{run}_FLAIR.nii.gz")
        write(label, source / f"derivatives/sub-01_run-{run}_mask.nii.gz")
    write(t1, source / "sub-01/anat/sub-01_ce-gadolinium_T1w.nii.gz")
    arguments = ["-i", str(source), "-o", str(output), "-np", "1"]
    assert "has 2 labels" in refused(main, *arguments)
    second = output.with_name("Dataset904_Chosen")
    chosen = ["--contrast", "t1w=*T1w*", "--contrast", "flair=*run-2_FLAIR*", "--reference", "T1"]
    arguments[3] = str(second)
    assert "none of the contrasts" in refused(main, *arguments, "--reference", "T2")
    assert "is not NAME=PATTERN" in refused(main, *arguments, "--contrast", "T1")
    assert "has a semicolon in the name" in refused(main, *arguments, "--contrast", "T1;T2=*")
    main([*arguments, *chosen, "--labels", "derivatives/*run-2_mask.nii.gz"])
    assert json.loads((second / "dataset.json").read_text())["channel_names"] == {"0": "T1", "1": "FLAIR"}
    mask = sitk.ReadImage(str(second / "labelsTr" / "P0001_1.nii.gz"))
    assert mask.GetSize() == t1.GetSize()
    centre = np.mean(
        [mask.TransformIndexToPhysicalPoint(i[::-1]) for i in np.argwhere(array_of(mask)).tolist()], axis=0
    )
    assert centre == pytest.approx((0, 8, 0), abs=1)
    assert array_of(mask).sum() * np.prod(mask.GetSpacing()) == pytest.approx(3900, rel=0.3)  # mm3
    description = json.loads((output / "dataset.json").read_text())
    assert description["channel_names"] == {"0": "FLAIR", "1": "T1POST"}


@pytest.mark.parametrize("thickness", [None, 0, [3.0, 3.0], "n/a"])
def test_a_thickness_that_is_no_length_is_left_out(folders, thickness):
    """Before, `mae3d_evaluate` refused the table."""
    source, output = folders
    sidecar = {"Manufacturer": None, "SliceThickness": thickness}
    write(scan(moved(), **COARSE)[0], source / "sub-01/anat/sub-01_T1w.nii.gz", **sidecar)
    main(["-i", str(source), "-o", str(output), "-np", "1"])
    (row,) = table(output / "scans.csv")
    assert {row[name] for name in ("manufacturer", "slice_thickness_mm", "T1_slice_thickness_mm")} == {""}


def test_a_label_and_a_contrast_along_other_axes_are_turned_without_interpolation(folders, monkeypatch):
    """As programs leave them that store their results in an orientation of their own."""
    source, output = folders
    t1, label = scan(moved(), **COARSE)
    flair = scan(moved(), noise=1, **COARSE)[0]
    write(t1, source / "sub-01/anat/sub-01_T1w.nii.gz")
    write(sitk.DICOMOrient(flair, "RAS"), source / "sub-01/anat/sub-01_FLAIR.nii.gz")
    write(sitk.DICOMOrient(label, "ASR"), source / "derivatives/sub-01_dseg.nii.gz")
    monkeypatch.setattr("nnunet_vit_mae.datasets.convert.one_study.register", _stop)
    main(["-i", str(source), "-o", str(output), "-np", "1", "--reference", "T1"])
    files = {"imagesTr/P0001_1_0000": flair, "imagesTr/P0001_1_0001": t1, "labelsTr/P0001_1": label}
    for name, expected in files.items():
        got = sitk.ReadImage(str(output / f"{name}.nii.gz"))
        assert np.array_equal(array_of(got), array_of(expected)), name
        assert got.GetDirection() == pytest.approx(t1.GetDirection())
        assert got.GetOrigin() == pytest.approx(t1.GetOrigin(), abs=1e-3)


def test_a_label_on_another_grid_is_told_what_to_do_with(folders, refused):
    source, output = folders
    write(scan(moved(), **COARSE)[0], source / "sub-01/anat/sub-01_T1w.nii.gz")
    label = scan(moved(), **COARSE)[1]
    label.SetOrigin([mm + 1 for mm in label.GetOrigin()])
    write(label, source / "derivatives/sub-01_dseg.nii.gz")
    message = refused(main, "-i", str(source), "-o", str(output), "-np", "1")
    assert "P0001_1 label: is on the grid of no contrast (T1): resample it to that of one of them" in message


def test_a_label_of_the_second_run_goes_with_its_image(folders):
    """Two runs have one grid, but the patient may have moved between them."""
    source, output = folders
    image, label = scan(moved(), **COARSE)
    for run in (1, 2):
        write(image + run, source / f"sub-01/anat/sub-01_run-{run}_FLAIR.nii.gz")
    write(label, source / "derivatives/sub-01/anat/sub-01_run-2_space-orig_dseg.nii.gz")
    main(["-i", str(source), "-o", str(output), "-np", "1"])
    assert np.array_equal(read_voxels(output / "imagesTr/P0001_1_0000.nii.gz"), array_of(image + 2))
    assert table(output / "unused.csv")[0]["image"] == "anat/run-1_FLAIR"


def labelled_with(source, **values):
    """Write a subject for each value, with a mask of it, and return the mask."""
    image, mask = scan(moved(), **COARSE)
    for subject, value in values.items():
        write(image, source / f"sub-{subject}/anat/sub-{subject}_T1w.nii.gz")
        label = sitk.Cast(mask > 0, sitk.sitkUInt8) * value
        write(label, source / f"derivatives/sub-{subject}/sub-{subject}_dseg.nii.gz")
    return array_of(mask) > 0


def labels_of(output):
    return json.loads((output / "dataset.json").read_text())["labels"]


def test_labels_get_the_numbers_that_are_given_also_after_an_interruption(folders, capsys, refused, monkeypatch):
    """FreeSurfer's numbers of structures; the second one of two labels is written after a kill."""
    source, output = folders
    mask = labelled_with(source, a=53, b=17)
    arguments = ["-i", str(source), "-o", str(output), "-np", "1"]
    message = refused(main, *arguments)
    assert "values 17 53, and nnU-Net requires 1, 2 and so on: call again with --label_values 17 53" in message
    assert not (output / "dataset.json").exists()
    assert "give all of them" in refused(main, *arguments, "--label_values", "17")
    assert "from 1 to 255" in refused(main, *arguments, "--label_values", "17", "53", "256")
    assert "different" in refused(main, *arguments, "--label_values", "17", "53", "17")

    write_label, written = label_values.write_image, []

    def once(label, file):
        if written:
            raise KeyboardInterrupt
        written.append(write_label(label, file))

    monkeypatch.setattr(conversion, "convert_study", None)  # nothing is converted again
    numbered = [*arguments, "--label_values", "10", "17", "53"]
    with monkeypatch.context() as context:
        context.setattr(label_values, "write_image", once)
        with pytest.raises(SystemExit, match="130"):
            main(numbered)
    main(numbered)
    assert labels_of(output) == {"background": 0, "label_10": 1, "label_17": 2, "label_53": 3}
    for case, number in (("P0001_1", 3), ("P0002_1", 2)):
        label = sitk.ReadImage(str(output / "labelsTr" / f"{case}.nii.gz"))
        assert np.array_equal(array_of(label), mask * number)
        assert label.GetPixelID() == sitk.sitkUInt8
    printed = capsys.readouterr().out
    assert "Labels have new values, because nnU-Net requires 1, 2 and so on: 10 is now 1, 17 is now 2, 53" in printed
    assert "(they are called label_10, label_17, label_53)" in printed
    assert not (output / ".converted").exists()


@pytest.mark.parametrize(("values", "labels"), [((255, 255), {"label_255": 1}), ((1, 2), {"label_1": 1, "label_2": 2})])
def test_masks_of_0_and_255_and_labels_without_a_gap_need_no_numbers(folders, values, labels):
    source, output = folders
    mask = labelled_with(source, a=values[0], b=values[1])
    main(["-i", str(source), "-o", str(output), "-np", "1"])
    assert labels_of(output) == {"background": 0, **labels}
    assert np.array_equal(read_voxels(output / "labelsTr/P0002_1.nii.gz"), mask * max(labels.values()))


def test_mistakes_are_one_sentence(folders, refused):
    source, output = folders
    assert "is not a folder" in refused(main, "-i", str(source / "none"), "-o", str(output))
    assert "no DICOM images" in refused(main, "-i", str(source), "-o", str(output))
    write(grid(), source / "sub-01/anat/sub-01_T1w.nii.gz")
    assert "matches --contrast" in refused(main, "-i", str(source), "-o", str(output), "--contrast", "T2=*T2w*")
    output.mkdir()
    (output / "something").touch()
    assert "already exists" in refused(main, "-i", str(source), "-o", str(output))
    (output.parent / "file").touch()
    inside = output.parent / "file" / output.name
    assert "File exists" in refused(main, "-i", str(source), "-o", str(inside))
    absolute = str(source / "sub-01/anat/*.nii.gz")
    empty = output.with_name("Dataset905_Empty")
    assert "matches --labels" in refused(main, "-i", str(source), "-o", str(empty), "--labels", absolute)


def test_bids_headers_that_programs_read_differently_are_told(folders, capsys):
    source, output = folders
    file = source / "sub-01/anat/sub-01_T1w.nii.gz"
    write(scan(moved(), **COARSE)[0], file)
    tell_two_places(file)
    main(["-i", str(source), "-o", str(output), "-np", "1"])
    printed = capsys.readouterr().out
    assert "Warning: 1 x NIfTI that has a qform and an sform that differ" in printed
    assert "sub-01" not in printed


def test_bids_names_that_are_less_common(folders, refused):
    source, output = folders
    image = scan(moved(), **COARSE)[0]
    write(image, source / "sub-01/ses-1/anat/sub-01_FLAIR.nii.gz")
    write(image + 1, source / "sub-01/ses-2/anat/sub-01_FLAIR.nii.gz")
    for suffix in ("defacemask", "dseg", "mask", "label-GM_probseg"):
        write(image, source / f"sub-01/ses-1/anat/sub-01_{suffix}.nii.gz")
    second = source / "sub-02/anat/sub-02_FLAIR.nii.gz"
    write(image, second)
    second.rename(second.with_name("sub-02_FLAIR.NII.GZ"))
    (source / "sub-02/anat/sub-02_T2w.nii.gz").write_bytes(b"text")
    message = refused(main, "-i", str(source), "-o", str(output), "-np", "1")
    assert "P0002_1 T2: the file is not compressed, although its name ends with .gz" in message
    assert "all T2: is in no case, so that this channel is all zeros" in message
    assert json.loads((output / "dataset.json").read_text())["channel_names"] == {"0": "FLAIR", "1": "T2"}
    means = [array_of(sitk.ReadImage(str(file))).mean() for file in sorted((output / "imagesUn").glob("*_0000.nii.gz"))]
    assert means == pytest.approx([array_of(image).mean() + more for more in (0, 1, 0)])


def test_every_folder_of_bids_is_read_and_what_is_not_used_is_named(folders, capsys, monkeypatch):
    source, output = folders
    flair, label = scan(moved(), **COARSE)
    for subject in ("sub-01", "sub-02"):
        start = f"{source}/{subject}/ses-0001"
        for suffix in ("dwi", "adc", "sbref"):
            write(flair, Path(f"{start}/dwi/{subject}_ses-0001_{suffix}.nii.gz"))
        write(flair, Path(f"{start}/anat/{subject}_ses-0001_run-1_FLAIR.nii.gz"))
        write(flair, Path(f"{start}/anat/{subject}_ses-0001_run-2_FLAIR.nii.gz"))
        write(flair, Path(f"{start}/fmap/{subject}_ses-0001_phasediff.nii.gz"))
        several = sitk.JoinSeries([flair, flair])
        write(several, Path(f"{start}/func/{subject}_ses-0001_task-rest_bold.nii.gz"))
        write(sitk.Compose([flair] * 3), Path(f"{start}/func/{subject}_ses-0001_warp.nii.gz"))  # vectors
        write(label, source / f"derivatives/{subject}/ses-0001/{subject}_ses-0001_lesion-msk.nii.gz")
        for hidden in ("dwi/._", ".git/"):
            (source / subject / "ses-0001" / f"{hidden}{subject}_ses-0001_dwi.nii.gz").parent.mkdir(exist_ok=True)
            Path(f"{start}/{hidden}{subject}_ses-0001_dwi.nii.gz").write_bytes(b"macOS")
    monkeypatch.setenv("nnUNet_raw", str(source.parent / "raw"))
    main(["-i", str(source), "-o", str(output), "-np", "1"])
    names = json.loads((output / "dataset.json").read_text())["channel_names"]
    assert sorted(names.values()) == ["ADC", "FLAIR", "TRACE"]
    assert len(list((output / "labelsTr").iterdir())) == 2
    assert [(row["image"], row["reason"]) for row in table(output / "unused.csv") if row["case"] == "P0002_1"] == [
        ("anat/run-2_FLAIR", "FLAIR is another image of the session"),
        ("dwi/sbref", "sbref is not a contrast"),
        ("fmap/phasediff", "is a field map"),
        ("func/task-rest_bold", "holds 2 volumes"),
        ("func/warp", "holds 3 volumes"),
    ]
    printed = capsys.readouterr().out
    assert "Not used: 2 x func/task-rest_bold: holds 2 volumes." in printed
    assert f"Name the labels in {output / 'dataset.json'} before you plan" in printed
    assert "Nothing records which case belongs to which patient, because --key was not given." in printed
    place = source.parent / "raw" / output.name
    assert printed.endswith(f"nnU-Net will not find {output}, which is not in nnUNet_raw: move it to {place}.\n")
    assert is_pseudonymous(output)


def test_a_lacking_ct_is_told_with_all_other_problems(folders, refused):
    source, output = folders
    image = scan(moved(), **COARSE)[0]
    for subject in ("sub-01", "sub-02", "sub-03"):
        write(image, source / subject / "anat" / f"{subject}_T1w.nii.gz")
        write(image, source / subject / "ct" / f"{subject}_ct.nii.gz")
    (source / "sub-02/ct/sub-02_ct.nii.gz").write_bytes(b"text")
    message = refused(main, "-i", str(source), "-o", str(output), "-np", "1")
    assert "P0002_1 CT: the file is not compressed" in message
    assert "lacks CT" in message
    assert "then run mae3d_fill_contrasts" in message
    assert len(list((output / "imagesUn").iterdir())) == 5
