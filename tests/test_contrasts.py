"""Contrasts that were not acquired: zeros in their place, and a record of them. `test_end_to_end_adaptive` goes on."""

import gzip
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Workspace, read_voxels
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_vit_mae.cli import fill_contrasts as command
from nnunet_vit_mae.datasets.contrasts import filling as module
from nnunet_vit_mae.datasets.contrasts.filling import contrast_table, fill_contrasts
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.volumes import only_zeros, read_geometry
from nnunet_vit_mae.storage.files import locked

NAMES = ["FLAIR", "T1", "T2"]
SIZE = (5, 4, 3)  # x y z
FOLDERS = ("imagesTr", "imagesTs", "imagesUn")


@dataclass(frozen=True)
class RawData:
    """A raw dataset whose dataset.json is there; images are added as a test needs them."""

    raw: Path
    ending: str = ".nii.gz"

    def describe(self, **changes) -> None:
        names = {str(number): name for number, name in enumerate(NAMES)}
        content = {"channel_names": names, "labels": {"background": 0}, "numTraining": 1, "file_ending": self.ending}
        self.raw.mkdir(parents=True, exist_ok=True)
        (self.raw / "dataset.json").write_text(json.dumps(content | changes))

    def file(self, case: str, channel: int, folder: str = "imagesTr") -> Path:
        return self.raw / folder / f"{case}_{channel:04d}{self.ending}"

    def write(self, case: str, channel: int, folder: str = "imagesTr", value: float | None = None, **geometry) -> Path:
        """Noise, or the same value everywhere, in an oblique volume of three unequal sides and spacings."""
        file = self.file(case, channel, folder)
        file.parent.mkdir(exist_ok=True)
        size = geometry.get("size", SIZE)
        noise = np.random.default_rng(zlib.crc32(file.name.encode())).normal(100, 20, size[::-1]).astype(np.float32)
        image = sitk.GetImageFromArray(noise if value is None else np.full_like(noise, value))
        image.SetSpacing(geometry.get("spacing", (0.7, 1.1, 3.3)))
        image.SetOrigin(geometry.get("origin", (-90.1, 126.3, -72.7)))
        image.SetDirection(geometry.get("direction", oblique(0.3)))
        sitk.WriteImage(image, str(file), useCompression=True)
        return file

    @property
    def record(self) -> dict:
        return json.loads((self.raw / "contrasts.json").read_text())

    def fill(self) -> module.FillResult:
        return fill_contrasts(self.raw)

    def states(self) -> dict[Path, tuple[int, bytes]]:
        """Date and bytes of every file."""
        files = [file for file in self.raw.rglob("*") if file.is_file()]
        return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def oblique(angle: float) -> list[float]:
    """Direction cosines of a rotation round two axes."""
    c, s = np.cos(angle), np.sin(angle)
    return (
        (np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])).ravel().tolist()
    )


def entry(present: list[str], filled: list[str] = (), blank: list[str] = ()) -> dict:
    return {"present": list(present), "filled": list(filled), "blank": list(blank)}


@pytest.fixture
def data(tmp_path) -> RawData:
    data = RawData(tmp_path / "raw" / "Dataset902_Contrasts")
    data.describe()
    return data


@pytest.fixture
def typed(data, monkeypatch):
    """Call the command on the dataset in this process."""
    Workspace(data.raw.parent.parent).use_here(monkeypatch)
    return lambda: command.main(["-d", "902"])


# ---------- what is written


patterns = st.dictionaries(
    st.tuples(st.sampled_from(FOLDERS), st.sampled_from(["a", "b_0001", "c.1", "Ä ö"])),
    st.sets(st.integers(0, len(NAMES) - 1), min_size=1),
    min_size=1,
)


@settings(max_examples=25, deadline=None)
@given(pattern=patterns, ending=st.sampled_from([".nii.gz", ".nii.gz", ".nii", ".mha", ".nrrd"]))
def test_every_channel_is_there_and_what_was_given_is_untouched(tmp_path_factory, pattern, ending):
    data = RawData(tmp_path_factory.mktemp("raw"), ending)
    data.describe()
    for (folder, case), channels in pattern.items():
        for channel in channels:
            data.write(case, channel, folder, direction=oblique(0.1 * len(case)), origin=(len(case), -3.3, 7.1))
    before = data.states()
    filling = data.fill()

    after = data.states()
    assert {file: after[file] for file in before} == before
    wanted = {data.file(case, channel, folder) for folder, case in pattern for channel in range(len(NAMES))}
    assert set(after) == wanted | {data.raw / "dataset.json", data.raw / "contrasts.json"}
    assert set(filling.written) == wanted - set(before)
    for file in filling.written:
        folder, case = file.parent.name, file.name[: -len("_0000" + ending)]
        given_image = data.file(case, min(pattern[folder, case]), folder)
        assert not read_voxels(file).any()
        assert sitk.ReadImage(str(file)).GetPixelID() == sitk.sitkUInt8
        check_same_geometry(file, given_image, exactly=ending != ".nrrd")  # it stores products, off by 1e-15
    for (folder, case), channels in pattern.items():
        absent = set(range(len(NAMES))) - channels
        assert data.record[folder][case] == entry(*([NAMES[i] for i in sorted(kind)] for kind in (channels, absent)))

    assert data.fill().written == []
    assert data.states() == after


def check_same_geometry(file: Path, like: Path, *, exactly: bool = True) -> None:
    mine, theirs = read_geometry(file), read_geometry(like)
    assert mine.difference(theirs) is None
    assert mine == theirs or not exactly
    if file.name.endswith(".nii.gz"):
        assert np.array_equal(nibabel.load(file).affine, nibabel.load(like).affine)


def test_a_header_of_another_program_is_copied_to_the_bit(data):
    """SimpleITK would round the cosines of this qform and write an sform that was not there."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(oblique(0.7), (3, 3)) * (0.7, 1.1, 3.3)
    affine[:3, 3] = (-90.1, 126.3, -72.7)
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(0, 9, SIZE).astype(np.float32), None)
    image.header.set_qform(affine, code=1)
    image.header.set_slope_inter(2.5, 100)  # stored zeros would be read as 100
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"name of a patient"))
    (data.raw / "imagesTr").mkdir()
    nibabel.save(image, data.file("a", 0))
    data.fill()
    for channel in (1, 2):
        filled = nibabel.load(data.file("a", channel))
        assert not np.asarray(filled.dataobj).any()
        assert not read_voxels(data.file("a", channel)).any()
        assert filled.dataobj.slope == 1
        assert filled.header["sform_code"] == 0
        assert not filled.header.extensions
        check_same_geometry(data.file("a", channel), data.file("a", 0))


def test_the_record_is_sorted_and_the_same_whatever_the_order_of_writing(data):
    for case in ("b", "a"):
        data.write(case, 2)
    data.write("a", 0, "imagesUn")
    data.fill()
    first = (data.raw / "contrasts.json").read_text()
    assert list(data.record) == ["imagesTr", "imagesUn"]
    assert list(data.record["imagesTr"]) == ["a", "b"]
    (data.raw / "contrasts.json").unlink()
    for file in data.raw.glob("*/*_0001.nii.gz"):
        file.unlink()
    for file in data.raw.glob("imagesTr/*_0000.nii.gz"):
        file.unlink()
    data.file("a", 2, "imagesUn").unlink()
    data.fill()
    assert (data.raw / "contrasts.json").read_text() == first


def test_zeros_are_small_on_disk(data):
    data.write("a", 0, size=(64, 96, 80))
    data.fill()
    assert data.file("a", 1).stat().st_size < 1000


# ---------- a later call


def test_a_real_image_in_place_of_a_filled_one_is_noticed_whatever_its_date(data, typed, capsys):
    data.write("a", 0)
    typed()
    before = data.file("a", 1).stat()
    data.write("a", 1)
    os.utime(data.file("a", 1), ns=(before.st_atime_ns, before.st_mtime_ns))
    capsys.readouterr()
    typed()
    assert "T1 of imagesTr/a was filled earlier" in capsys.readouterr().out
    assert data.record["imagesTr"]["a"] == entry(["FLAIR", "T1"], ["T2"])
    typed()
    assert "was filled earlier" not in capsys.readouterr().out


def test_the_table_of_scans_lists_the_contrasts_that_are_present(data, typed, capsys):
    """As `mae3d_convert` has written it, before an image was added, and one of zeros."""
    data.write("a", 0)
    data.write("a", 1)
    data.write("b", 0)
    data.write("b", 2, value=0)
    scans = data.raw / "scans.csv"
    scans.write_text('case,contrasts,note\nb,FLAIR;T2,x\na,FLAIR,"1,5"\ngone,T1,\n')
    typed()
    assert f"Corrected the contrasts of b, a in {scans}." in capsys.readouterr().out
    assert scans.read_text().splitlines() == ["case,contrasts,note", "b,FLAIR,x", 'a,FLAIR;T1,"1,5"', "gone,T1,"]
    written = scans.stat().st_mtime_ns
    typed()
    assert "Corrected" not in capsys.readouterr().out
    assert scans.stat().st_mtime_ns == written
    scans.write_text("case,contrasts\na,all of them\n")  # a column of the user's own
    typed()
    assert scans.read_text() == "case,contrasts\na,all of them\n"


def test_filled_files_that_are_gone_are_written_again(data):
    data.write("a", 0)
    filled = data.fill().written
    filled[1].unlink()
    record = (data.raw / "contrasts.json").stat().st_mtime_ns
    assert data.fill().written == filled[1:]
    assert (data.raw / "contrasts.json").stat().st_mtime_ns == record


def test_filled_files_follow_a_present_image_that_was_resampled(data):
    data.write("a", 1)
    data.fill()
    data.write("a", 1, size=(6, 7, 8), spacing=(1.0, 2.0, 3.0))
    assert data.fill().written == [data.file("a", 0), data.file("a", 2)]
    check_same_geometry(data.file("a", 0), data.file("a", 1))


def test_filled_files_copied_or_compressed_anew_are_still_known(data):
    data.write("a", 0)
    data.fill()
    file = data.file("a", 1)
    sitk.WriteImage(sitk.Cast(sitk.ReadImage(str(file)), sitk.sitkFloat64), str(file), useCompression=False)
    assert data.fill().written == []
    assert data.record["imagesTr"]["a"] == entry(["FLAIR"], ["T1", "T2"])


def test_a_call_after_one_that_was_killed_knows_its_own_files(data, monkeypatch):
    data.write("a", 0)
    write = module.write_zeros

    def killed_at_the_second(file: Path, like: Path) -> None:
        if file == data.file("a", 2):
            file.with_name(f".123.{file.name}").write_bytes(b"half")
            raise KeyboardInterrupt
        write(file, like)

    monkeypatch.setattr(module, "write_zeros", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        data.fill()
    monkeypatch.undo()
    assert data.fill().written == [data.file("a", 2)]
    assert data.record["imagesTr"]["a"] == entry(["FLAIR"], ["T1", "T2"])
    assert not list(data.raw.glob("imagesTr/.*"))


def test_images_that_come_during_the_call_are_left_alone(data, typed, refused, monkeypatch):
    data.write("a", 0)
    data.write("b", 0)
    data.fill()
    data.write("b", 0, size=(6, 7, 8))  # so that the zeros beside it are written again
    data.file("a", 1).unlink()
    sort, come = module.sort_contrasts, {}

    def copied_meanwhile(case, *args):
        sorted_case = sort(case, *args)
        if case.name == "b":
            for file in (data.write("a", 1), data.write("b", 2, size=(6, 7, 8))):
                come[file] = file.read_bytes()
        return sorted_case

    monkeypatch.setattr(module, "sort_contrasts", copied_meanwhile)
    message = refused(lambda _: typed())
    assert "imagesTr/a got a_0001.nii.gz while images were being read: run the command again" in message
    assert "imagesTr/b got b_0002.nii.gz" in message
    assert {file: file.read_bytes() for file in come} == come
    monkeypatch.undo()
    assert data.fill().written == []
    assert data.record["imagesTr"] == {"a": entry(["FLAIR", "T1"], ["T2"]), "b": entry(["FLAIR", "T2"], ["T1"])}


def test_of_two_calls_at_once_one_is_refused(data, typed, refused, monkeypatch):
    data.write("a", 0)
    with locked(data.raw):
        assert "Another process is writing to" in refused(lambda _: typed())
    sort = module.sort_contrasts

    def other_call(*args):
        monkeypatch.undo()
        data.fill()
        return sort(*args)

    monkeypatch.setattr(module, "sort_contrasts", other_call)
    with pytest.raises(UserError, match="has changed while images were being read"):
        data.fill()
    assert data.record["imagesTr"]["a"] == entry(["FLAIR"], ["T1", "T2"])
    with locked(data.raw):
        assert data.fill().written == []  # nothing is left to do


# ---------- images of zeros that were given


def test_zeros_that_were_given_are_absent_but_left_alone(data, typed, capsys):
    data.write("a", 0)
    blank = data.write("a", 1, value=0).read_bytes()
    typed()
    assert "Some of the given images are all zeros" in capsys.readouterr().out
    assert data.record["imagesTr"]["a"] == entry(["FLAIR"], ["T2"], ["T1"])
    assert data.file("a", 1).read_bytes() == blank
    data.write("a", 1)
    typed()
    assert "all zeros" not in capsys.readouterr().out
    assert data.record["imagesTr"]["a"] == entry(["FLAIR", "T1"], ["T2"])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd", ".gipl"])
@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(("place", "expected"), [(None, True), ((1, 2, 3), False), ((40, 50, 60), False)])
def test_zeros_are_told_from_a_single_voxel(tmp_path, ending, compressed, place, expected):
    volume = np.zeros((48, 64, 80), np.float64)
    if place:
        volume[place] = 1e-3
    file = tmp_path / f"image{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(volume), str(file), useCompression=compressed)
    assert only_zeros(file, read_geometry(file)) == expected


def test_zeros_compressed_as_badly_as_gzip_can_are_recognised(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((128, 128, 128), np.float64), np.eye(4))
    file = tmp_path / "image.nii.gz"
    for level in (0, 1):
        file.write_bytes(gzip.compress(image.to_bytes(), level))
        assert only_zeros(file, read_geometry(file))


def test_voxels_of_acquired_images_are_not_read(data, monkeypatch):
    data.write("a", 0, size=(64, 65, 66))
    monkeypatch.setattr(sitk, "ReadImage", lambda name: pytest.fail(f"{name} was read"))
    assert data.fill().written == [data.file("a", 1), data.file("a", 2)]


# ---------- problems of single cases


def test_problems_are_named_and_all_other_cases_are_done(data, typed, capsys):
    for case in ("good", "sizes", "spacings", "origins", "directions", "rubbish", "cut", "nine", "suffix", "several"):
        data.write(case, 0)
    data.write("sizes", 1, size=(5, 4, 2))
    data.write("spacings", 1, spacing=(0.7, 1.1, 3.4))
    data.write("origins", 1, origin=(-90.1, 126.3, -72.6))
    data.write("directions", 1, direction=oblique(0.31))
    data.file("rubbish", 1).write_bytes(b"not an image")
    data.write("cut", 1, size=(20, 30, 40), value=5)
    data.file("cut", 1).write_bytes(data.file("cut", 1).read_bytes()[:300])
    data.write("nine", 9)
    sitk.WriteImage(sitk.ReadImage(str(data.file("suffix", 0))), str(data.raw / "imagesTr" / "suffix_0001.nrrd"))
    nibabel.save(nibabel.Nifti1Image(np.ones((5, 4, 3, 2)), np.eye(4)), data.file("several", 1))
    data.write("blank", 2, value=0)
    (data.raw / "labelsTr").mkdir()
    (data.raw / "labelsTr" / "orphan.nii.gz").write_bytes(b"")
    (data.raw / "imagesTr" / "notes.txt").write_text("ignored")
    (data.raw / "imagesTr" / "unnumbered.nii.gz").write_bytes(b"")

    with pytest.raises(SystemExit) as stop:
        typed()
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Not filled")]
    sentences = {line.split()[2]: line for line in lines}
    assert all(line.endswith(".") for line in lines)
    expected = {
        "imagesTr/blank": "only images of zeros",
        "imagesTr/cut": "cut_0001.nii.gz is cut off",
        "imagesTr/directions": "differ in direction",
        "imagesTr/nine": "a channel 0009, but the last one in dataset.json is 0002",
        "imagesTr/origins": "differ in origin (-90.1 126.3 -72.7 and -90.1 126.3 -72.6 mm)",
        "imagesTr/orphan": "has a label, but no image",
        "imagesTr/rubbish": "rubbish_0001.nii.gz",
        "imagesTr/several": "more than one image",
        "imagesTr/sizes": "sizes_0000.nii.gz and sizes_0001.nii.gz",
        "imagesTr/spacings": "differ in spacing",
        "imagesTr/suffix": "suffix_0001.nrrd: it must be named like suffix_0000.nii.gz",
        "imagesTr/unnumbered": "named like unnumbered_0000.nii.gz",
    }
    assert list(sentences) == list(expected)
    for case, part in expected.items():
        assert part in sentences[case]
    assert data.record == {"imagesTr": {"good": entry(["FLAIR"], ["T1", "T2"])}}
    assert {file.name for file in data.raw.glob("*/*_0002.nii.gz")} == {"good_0002.nii.gz", "blank_0002.nii.gz"}


def test_rounding_between_images_of_a_case_is_no_problem(data):
    data.write("a", 0)
    data.write("a", 1, origin=(-90.10001, 126.3, -72.7), direction=oblique(0.3001), spacing=(0.700001, 1.1, 3.3))
    assert data.fill().problems == {}


def test_a_case_with_a_problem_keeps_its_record(data):
    data.write("a", 0)
    data.fill()
    known = data.record
    good = data.file("a", 0).read_bytes()
    data.file("a", 0).write_bytes(b"")
    assert list(data.fill().problems) == ["imagesTr/a"]
    assert data.record == known
    data.file("a", 0).write_bytes(good)
    assert data.fill().problems == {}
    assert data.record == known


def test_gzip_files_in_several_pieces_are_whole(data):
    file = data.write("a", 0)
    content = gzip.decompress(file.read_bytes())
    file.write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]) + gzip.compress(b""))
    assert data.fill().problems == {}


# ---------- mistakes that end the command


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"channel_names": None}, "no channel_names"),
        ({"channel_names": {}}, "the keys"),
        ({"channel_names": {"0": "FLAIR", "2": "T2"}}, '"0", "1" and so on'),
        ({"channel_names": {"0": "T1", "1": "T1"}}, "a name of its own"),
        ({"file_ending": ".png"}, "is .png"),
        ({"file_ending": None}, "file_ending"),
        ({"dataset": {}}, "under dataset"),
        ({"channel_names": {"0": "PET", "1": "CT"}}, "rename the channel"),
    ],
)
def test_a_dataset_that_cannot_be_filled_gets_one_sentence(data, typed, refused, changes, reason):
    data.write("a", 0)
    data.describe(**changes)
    before = data.states()
    message = refused(lambda _: typed())
    assert reason in message
    assert message.count("Error: ") == 1
    assert data.states() == before


def test_missing_files_and_foreign_records_are_named(data, typed, refused):
    assert "imagesTr, imagesTs, imagesUn" in refused(lambda _: typed())
    data.write("a", 0)
    (data.raw / "contrasts.json").write_text('{"imagesTr": ["a"]}')
    assert "imagesTr is ['a'], but it must be an object" in refused(lambda _: typed())
    (data.raw / "dataset.json").unlink()
    assert "dataset.json is missing" in refused(lambda _: typed())


def test_a_write_protected_folder_gets_one_sentence_and_nothing_is_written(data, typed, refused, monkeypatch):
    """The refusal is played, because no permission stops the administrator, who may run the tests."""

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    data.write("a", 0)
    before = data.states()
    monkeypatch.setattr(module, "TemporaryFile", refuse)
    assert "imagesTr cannot be written to (Permission denied)" in refused(lambda _: typed())
    assert data.states() == before


def test_a_full_disk_ends_the_command_with_one_sentence_and_no_half_file(data, typed, refused, monkeypatch):
    write = Path.write_bytes

    def full(file: Path, content: bytes) -> None:
        if "a_0001" not in file.name:
            write(file, content)
            return
        file.open("wb").close()
        raise OSError(28, "No space left on device")

    data.write("a", 0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "a_0001.nii.gz cannot be written" in refused(lambda _: typed())
    assert [file.name for file in (data.raw / "imagesTr").iterdir()] == ["a_0000.nii.gz"]
    assert len(data.fill().written) == 2


# ---------- the table, and nnU-Net


def test_the_table_counts_cases(data):
    data.write("a", 0)
    data.write("b", 0)
    data.write("b", 1)
    data.write("c", 2, "imagesUn")
    data.write("c", 0, "imagesUn", value=0)
    rows = [line.split() for line in contrast_table(data.fill()).splitlines()]
    assert rows == [
        ["contrast", "folder", "present", "filled", "blank"],
        ["FLAIR", "imagesTr", "2", "0", "0"],
        ["FLAIR", "imagesUn", "0", "0", "1"],
        ["T1", "imagesTr", "1", "1", "0"],
        ["T1", "imagesUn", "0", "1", "0"],
        ["T2", "imagesTr", "0", "2", "0"],
        ["T2", "imagesUn", "1", "0", "0"],
    ]
