"""Image files with odd headers: what none states is never filled in, and what programs read differently is told."""

import gzip
import json
import re
import shutil
import struct
from contextlib import nullcontext
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import blob, write_case

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.labels import read_mask
from nnunet_vit_mae.imaging.scans import ScanError, read_scan
from nnunet_vit_mae.imaging.stated_geometry import nifti_ambiguities
from nnunet_vit_mae.imaging.volumes import read_geometry, refuse_unusable

AFFINE = np.diag([0.5, 0.6, 2.0, 1.0])
VOXELS = np.random.default_rng(0).integers(-100, 100, (7, 6, 5)).astype(np.int16)  # x y z


def nifti(voxels: np.ndarray = VOXELS, *, qform=(AFFINE, 1), sform=(AFFINE, 1), unit="mm", kind=nibabel.Nifti1Image):
    image = kind(voxels, AFFINE)
    image.set_qform(*qform)
    image.set_sform(*sform)
    image.header.set_xyzt_units(unit)
    return image


def write(image, file: Path, *patches: tuple[int, bytes]) -> Path:
    """Write an image, some bytes of its header replaced."""
    content = bytearray(image.to_bytes())
    for start, new in patches:
        content[start : start + len(new)] = new
    file.write_bytes(gzip.compress(bytes(content)) if file.suffix == ".gz" else bytes(content))
    return file


def in_colour() -> np.ndarray:
    return np.zeros((7, 6, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])


NOTHING = (None, 0)
PIXDIM_Z, CODES, SLOPE = 88, 252, 112  # offsets in the header
NO_CODES = (CODES, b"\0" * 4)


@pytest.mark.parametrize(
    ("image", "patches", "words"),
    [
        (nifti(), [(PIXDIM_Z, struct.pack("<f", 0)), NO_CODES], "states a spacing of 0.5 0.6 0: write the true one"),
        (nifti(), [(PIXDIM_Z, struct.pack("<f", -2)), NO_CODES], "states a spacing of 0.5 0.6 -2"),
        (nifti(), [(PIXDIM_Z, struct.pack("<f", np.nan)), NO_CODES], "states a spacing of 0.5 0.6 nan"),
        (nifti(VOXELS.astype(np.complex64)), [], "holds complex numbers"),
        (nifti(in_colour()), [], "has 3 values in each voxel"),
        (nifti(VOXELS[..., None, None].repeat(2, -1)), [], "2 values in each voxel|more than one image"),
        (nifti(VOXELS[..., None].repeat(2, -1)), [], "more than one image"),
        (nifti(kind=nibabel.Nifti2Image), [], "is NIfTI-2"),
        (nifti(VOXELS[..., 0]), [], "has 2 dimensions instead of three"),
    ],
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
def test_nifti_files_that_are_no_volume_with_a_spacing_say_why(tmp_path, image, patches, words, ending):
    with pytest.raises(ScanError, match=words):
        read_geometry(write(image, tmp_path / f"a{ending.lower()}", *patches).rename(tmp_path / f"A{ending}"))


@pytest.mark.parametrize(
    ("image", "patches"),
    [
        (nifti(), []),
        (nifti(VOXELS.astype(">i2")), []),
        (nifti(VOXELS.astype(np.float64)), []),
        (nifti(VOXELS[..., None]), []),
        (nifti(qform=NOTHING), []),
        (nifti(sform=NOTHING), []),
        (nifti(), [(SLOPE, struct.pack("<ff", 0, 0))]),
        (nifti(), [(SLOPE, struct.pack("<ff", np.nan, np.nan))]),
    ],
)
def test_nifti_files_of_less_common_kinds_are_read(tmp_path, image, patches):
    file = write(image, tmp_path / "ä b.nii.gz", *patches)
    assert not nifti_ambiguities(file)
    got = read_scan(file)
    assert got.GetSpacing() == pytest.approx((0.5, 0.6, 2.0))
    assert np.array_equal(sitk.GetArrayFromImage(got), VOXELS.T)


def test_names_that_do_not_fit_the_content_are_named(tmp_path):
    file = tmp_path / "a.nii.gz"
    file.write_bytes(nifti().to_bytes())
    with pytest.raises(ScanError, match="is not compressed, although its name ends with"):
        read_geometry(file)
    file.write_bytes(gzip.compress(nifti().to_bytes())[:100])
    with pytest.raises(ScanError, match="is cut off"):
        read_geometry(file)


def test_voxels_that_are_damaged_behind_a_good_header_are_not_measured(tmp_path):
    voxels = np.random.default_rng(0).normal(0, 30, (40, 256, 256)).astype(np.int16)
    zipped, cut_off = tmp_path / "a.nii.gz", tmp_path / "a.mha"
    for file in (zipped, cut_off):
        sitk.WriteImage(sitk.GetImageFromArray(voxels), str(file))
        refuse_unusable([file], read_geometry(file))
    content = bytearray(zipped.read_bytes())
    content[len(content) // 2] ^= 0x5A
    zipped.write_bytes(content)
    assert not np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(zipped))), voxels)
    for read in (lambda file: refuse_unusable([file], read_geometry(file)), read_scan, read_mask):
        with pytest.raises((ScanError, UserError), match="is cut off or damaged"):
            read(zipped)
    cut_off.write_bytes(cut_off.read_bytes()[:-20_000])
    with pytest.raises(RuntimeError, match="No such file or directory"):  # which `reader_reason` knows
        refuse_unusable([cut_off], read_geometry(cut_off))


@pytest.mark.parametrize(("ending", "entry"), [(".mha", "ElementSpacing"), (".nrrd", "space directions")])
def test_a_text_header_without_a_spacing_is_refused(tmp_path, ending, entry):
    """ITK gives such an image a spacing of 1 mm."""
    file = tmp_path / f"a{ending}"
    image = sitk.GetImageFromArray(VOXELS)
    image.SetSpacing((0.5, 0.6, 2.0))
    sitk.WriteImage(image, str(file))
    assert read_geometry(file).spacing == pytest.approx((0.5, 0.6, 2.0))
    content = file.read_bytes()
    line = re.search(rb"(?m)^" + entry.encode() + rb".*\n", content)[0]
    file.write_bytes(content.replace(line, b""))
    assert sitk.ReadImage(str(file)).GetSpacing() == (1, 1, 1)
    with pytest.raises(ScanError, match="states no spacing"):
        read_geometry(file)


def test_a_format_without_a_spacing_is_refused_for_that_reason(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(tmp_path / "a.tif"))
    with pytest.raises(ScanError, match=r"no format whose header states a spacing \(.nii.gz, .nii, .nrrd"):
        read_geometry(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("ending", "reason"), [(".gipl", "is cut off or damaged"), (".mha", "its voxels are cut off, damaged or missing")]
)
def test_other_formats_that_are_cut_off_are_refused_for_that_reason(tmp_path, ending, reason):
    file = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(file))
    assert np.array_equal(read_mask(file), VOXELS)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=reason):
        read_mask(file)


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_sheared_volumes_are_refused(tmp_path, ending):
    """NIfTI has ITK's own refusal; elsewhere, spacings would give a volume that is too large."""
    image, file = sitk.GetImageFromArray(VOXELS), tmp_path / f"a{ending}"
    for tilt, is_refused in ((0.2, True), (0.001, False)):
        image.SetDirection([1, 0, 0, 0, 1, np.sin(tilt), 0, 0, np.cos(tilt)])
        sitk.WriteImage(image, str(file))
        with pytest.raises(ScanError, match="axes that are not perpendicular") if is_refused else nullcontext():
            read_geometry(file)


def test_what_programs_read_differently_is_told(tmp_path):
    turned = AFFINE @ np.diag([-1, -1, 1, 1.0])
    for image, words in (
        (nifti(unit="meter"), "in metres"),
        (nifti(unit="micron"), "in micrometres"),
        (nifti(qform=NOTHING, sform=NOTHING), "neither a qform nor an sform"),
        (nifti(qform=(turned, 1)), "a qform and an sform that differ"),
        (nifti(qform=NOTHING, sform=(AFFINE / 2, 1)), "an sform with another spacing than pixdim"),
    ):
        (told,) = nifti_ambiguities(write(image, tmp_path / "a.nii"))
        assert words in told
    rounded = AFFINE + np.diag([0, 0, 0.0001, 0])
    assert not nifti_ambiguities(write(nifti(sform=(rounded, 2)), tmp_path / "a.nii"))


# ---------- the commands


def in_metres(file: Path) -> None:
    """As some programs write it: the unit says metres, and the numbers are mm."""
    image = nibabel.load(file)
    image.header.set_xyzt_units("meter")
    content = image.to_bytes()
    file.write_bytes(gzip.compress(content))


def test_check_finds_what_preprocessing_refuses(workspace):
    """A spacing a thousand times too large would take terabytes; hidden files; a name shared by channels."""
    pool = workspace.raw / "imagesUn"
    for number in range(2):
        in_metres(pool / f"pool_0_{number:04d}.nii.gz")
        (pool / f"._pool_1_{number:04d}.nii.gz").write_bytes(b"macOS")
    write(nifti(VOXELS.astype(np.complex64)), pool / "pool_2_0000.nii.gz")
    description = json.loads((workspace.raw / "dataset.json").read_text())
    description["channel_names"] = {"0": "noNorm", "1": "noNorm"}
    (workspace.raw / "dataset.json").write_text(json.dumps(description))
    report = workspace.root / "check"
    said = workspace.call(*f"mae3d_check -d 901 -np 1 -o {report}".split(), code=2).stdout
    assert "imagesUn/pool_0 has a spacing of 1000 mm along x, the median is 1 mm" in said
    assert "imagesUn/pool_0 has an extent of" in said
    assert "says that its spacing is in metres" in said
    assert "pool_2_0000.nii.gz holds complex numbers" in said
    assert "imagesUn has 2 hidden files such as ._pool_1_0000.nii.gz" in said
    cases = json.loads((report / "check.json").read_text())["cases"]
    assert set(cases["imagesTr/train_0"]["intensities"]) == {"noNorm (0000)", "noNorm (0001)"}

    done = workspace.call(*"mae3d_preprocess -d 901 -np 1".split(), code=2)
    assert "1 of 3 unlabelled cases" in done.stdout
    assert re.search(r"pool_0 has a spacing of 1500 x 1000 x 1000 mm .* it has \d+ x \d+ x \d+ voxels", done.stderr)
    assert "pool_2_0000.nii.gz holds complex numbers" in done.stderr
    assert "Traceback" not in done.stderr


def test_hidden_files_are_passed_over_by_every_command(workspace, tmp_path):
    channels, label = blob(3)
    for folder in ("imagesTr", "imagesTs", "imagesUn", "labelsTr", "labelsTs"):
        (workspace.raw / folder / "._junk_0000.nii.gz").write_bytes(b"macOS")
        (workspace.raw / folder / "._junk.nii.gz").write_bytes(b"macOS")
    assert "errors: 0" in workspace.call(*f"mae3d_check -d 901 -np 1 -o {tmp_path / 'check'}".split()).stdout
    assert "3 of 3" in workspace.call(*"mae3d_preprocess -d 901 -np 1".split()).stdout
    workspace.call(*f"mae3d_split -d 901 -o {tmp_path / 'split'} --folds 2".split())
    assert "junk" not in (tmp_path / "split" / "splits_final.json").read_text()
    references = workspace.raw / "labelsTs"
    shutil.copy(workspace.raw / "dataset.json", references)
    workspace.call(*f"mae3d_evaluate -r {references} -p A={references} -o {tmp_path / 'report'} --resamples 20".split())
    assert "junk" not in (tmp_path / "report" / "cases.csv").read_text()
    write_case(tmp_path / "scans", "__MACOSX", channels, label)


def test_a_dataset_of_tif_files_is_refused_for_its_format(workspace, tmp_path):
    description = json.loads((workspace.raw / "dataset.json").read_text())
    (workspace.raw / "dataset.json").write_text(json.dumps(description | {"file_ending": ".tif"}))
    said = workspace.call("mae3d_check", "-d", "901", "-o", str(tmp_path / "check"), code=2).stderr
    assert "file_ending" in said
    assert "is .tif, but must be a format with spacing and origin" in said
    for name in ("a.tif", "a.json"):
        (tmp_path / name).write_bytes(b"")
    said = workspace.call(
        *f"mae3d_evaluate -r {tmp_path} -p A={tmp_path} -o {tmp_path / 'report'}".split(), code=2
    ).stderr
    assert "none (only files in .json and .tif)" in said
