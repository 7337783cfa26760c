"""Writes that stop after some bytes, as on a full disk: one sentence, the file before is kept, and nothing is left.

The limit on the size of files (RLIMIT_FSIZE) is the system's own. What goes beyond it fails as it does on a full disk,
and a library in C++ sees a short write.
"""

import ast
import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from matplotlib.figure import Figure
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from synthetic_head import COARSE_GRID, moved, scan, write_template
from test_weights import make_card

import nnunet_vit_mae
from nnunet_vit_mae.datasets.crop import contact_sheet, one_case, qc_table
from nnunet_vit_mae.errors import WriteError
from nnunet_vit_mae.imaging.scans import read_scan
from nnunet_vit_mae.imaging.writing import write_image, write_segmentation, write_zeros
from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.nnunet import calibrated, preprocessing
from nnunet_vit_mae.plots import save_figure
from nnunet_vit_mae.settings import Network
from nnunet_vit_mae.storage.csv_tables import write_frame, write_rows
from nnunet_vit_mae.storage.files import replacing, write_json
from nnunet_vit_mae.weights import save_encoder

IMAGES = ("image.nii.gz", "image.nii", "image.nrrd", "image.mha")
NOISE = np.random.default_rng(0).normal(size=(12, 14, 16)).astype(np.float32)
LABEL = (NOISE > 0).astype(np.uint8)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(autouse=True)
def _sources(tmp_path) -> None:
    """What the writers read, made before the disk is full."""
    for name in IMAGES:
        sitk.WriteImage(sitk.GetImageFromArray(NOISE), str(tmp_path / f"like_{name}"))
    weights = {"decoder.seg_layers.0.bias": torch.zeros(2), "decoder.other.weight": torch.zeros(5000)}
    torch.save({"network_weights": weights, "trainer_name": "nnUNetTrainer"}, tmp_path / "checkpoint_final.pth")


def affine() -> sitk.Transform:
    transform = sitk.AffineTransform(3)
    transform.Translate((1.25, -2.5, 3.0))
    return transform


def write_by_path(file: Path) -> None:
    """As nnU-Net saves a checkpoint: torch opens the file itself."""
    with replacing(file) as temporary:
        torch.save({"network_weights": {"a": torch.zeros(5000)}}, str(temporary))


def write_preprocessed(file: Path) -> None:
    plan = SimpleNamespace(unlabelled_folder=file.parent, patch_size=(8, 8, 8))
    preprocessing._save(NOISE[None], plan, file.name.removesuffix(".b2nd"))


def write_calibrated(file: Path) -> None:
    file.with_name("checkpoint_final.pth").hardlink_to(file.parents[1] / "checkpoint_final.pth")
    try:
        calibrated.write_calibrated(file.with_name("checkpoint_final.pth"), [0.5])
    finally:
        file.with_name("checkpoint_final.pth").unlink()


def segment(reader: type) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        _, properties = reader().read_images([str(file.parents[1] / "like_image.nii.gz")])
        write_segmentation(LABEL, file, reader(), properties)

    return write


def figure() -> Figure:
    figure = Figure()
    figure.subplots().plot(NOISE.ravel()[:300])
    return figure


ENCODER = build_encoder(Network(size="XS", token=(2, 4, 8)), 2)
ROWS = [qc_table.QCRow(f"case_{number}", qc_table.DONE, "imagesTr") for number in range(40)]
WRITERS: dict[str, Callable[[Path], object]] = {
    **{name: lambda file: write_image(sitk.GetImageFromArray(NOISE), file) for name in IMAGES},
    **{f"zeros_{name}": lambda file: write_zeros(file, file.parents[1] / f"like_{file.name[6:]}") for name in IMAGES},
    "segmentation_itk.nii.gz": segment(SimpleITKIO),
    "segmentation_nibabel.nii.gz": segment(NibabelIO),
    "case.b2nd": write_preprocessed,
    "transform.tfm": lambda file: one_case._write_transform(affine(), file),
    "thumbnail.png": lambda file: contact_sheet.write_thumbnail(np.repeat(LABEL[0][..., None], 3, 2) * 255, file),
    "figure.png": lambda file: save_figure(figure(), file),
    "figure.svg": lambda file: save_figure(figure(), file),
    "plans.json": lambda file: write_json({"values": list(range(500))}, file),
    "qc.csv": lambda file: qc_table.write_qc_table(ROWS, file.parent),
    "rows.csv": lambda file: write_rows(["case", "dice"], [[f"case_{i}", i / 7] for i in range(200)], file),
    "frame.csv": lambda file: write_frame(pd.DataFrame({"dice": NOISE.ravel()[:300]}), file),
    "encoder.safetensors": lambda file: save_encoder(ENCODER, make_card(), file),
    "checkpoint_calibrated.pth": write_calibrated,
    "checkpoint_latest.pth": write_by_path,
}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_stops_keeps_the_file_before(name, share, tmp_path):
    file = tmp_path / "folder" / name
    file.parent.mkdir()
    WRITERS[name](file)
    size, before = file.stat().st_size, b"the file before"
    file.write_bytes(before)
    with files_of_at_most(min(int(share * size), size - 1)), pytest.raises(WriteError) as caught:
        WRITERS[name](file)
    assert caught.value.filename == str(file)
    assert caught.value.strerror == os.strerror(caught.value.errno)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]
    WRITERS[name](file)  # with space again
    assert file.stat().st_size > len(before)


def test_images_and_weights_are_written_in_one_way():
    """SimpleITK reports no short write, so that one module alone writes images; torch gets a stream that does."""
    for file in Path(nnunet_vit_mae.__file__).parent.rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert not name.endswith((".WriteImage", ".write_seg", "nibabel.save")) or file.name == "writing.py", file
            assert name != "torch.save" or ast.unparse(call.args[1]) == "stream", file


@pytest.mark.parametrize("name", IMAGES)
def test_every_image_reads_back_as_it_was(name, tmp_path):
    image = sitk.GetImageFromArray(NOISE)
    image.SetSpacing((0.1, 2.0, 3.3))
    image.SetOrigin((-1000.123, 20.5, 3000.75))
    write_image(image, tmp_path / name)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(read_scan(tmp_path / name)), NOISE)


def test_an_image_with_nan_is_no_short_write(tmp_path):
    holed = NOISE.copy()
    holed[3, 4, 5] = np.nan
    write_image(sitk.GetImageFromArray(holed), tmp_path / "image.nrrd")


# ---------- commands


def on_full_disk(main: Callable[[list[str]], None], arguments: list[str], size: int) -> str:
    """Call a command that may write no file above a size, and insist on exit code 2 and one line; gives that line."""
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(errors), files_of_at_most(size), pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "Traceback" not in errors.getvalue()
    (line,) = [line for line in errors.getvalue().splitlines() if line.startswith("Error: ")]
    return line


def whole_images(folder: Path) -> list[str]:
    """Read all images to the end; gives their names."""
    files = sorted(folder.rglob("*.nii.gz"))
    for file in files:
        read_scan(file)
    return [file.name for file in files]


def test_cropping_on_a_full_disk_leaves_no_stump_and_a_second_call_mends(tmp_path):
    from nnunet_vit_mae.cli.crop_roi import main

    template, region = write_template(tmp_path, **COARSE_GRID)
    (tmp_path / "scans").mkdir()
    for name in ("a", "b"):
        image, _ = scan(moved((0.05, -0.1, 0.1), (2, -3, 4)), **COARSE_GRID)
        sitk.WriteImage(image, str(tmp_path / "scans" / f"{name}.nii.gz"))
    output = tmp_path / "Dataset901_Region"
    arguments = ["-i", tmp_path / "scans", "-o", output, "-t", template, "-r", region, "-np", "1"]
    for size in (0, 1500, 3000):  # stops at the table, at a thumbnail, and at an image
        line = on_full_disk(main, list(map(str, arguments)), size)
        assert "cannot be written (File too large)" in line
        whole_images(output)
        assert not [file for file in output.rglob(".[0-9]*") if file.is_file()]
    main(list(map(str, arguments)))
    assert whole_images(output) == ["a_0000.nii.gz", "b_0000.nii.gz"]


def test_conversion_on_a_full_disk_leaves_no_stump_and_a_second_call_mends(tmp_path):
    from nnunet_vit_mae.cli.convert import main

    for subject in ("01", "02"):
        file = tmp_path / "bids" / f"sub-{subject}" / "anat" / f"sub-{subject}_T1w.nii.gz"
        file.parent.mkdir(parents=True)
        sitk.WriteImage(sitk.GetImageFromArray(NOISE), str(file))
    output = tmp_path / "Dataset902_Converted"
    arguments = ["-i", tmp_path / "bids", "-o", output, "--contrast", "T1=*T1w*", "-np", "1"]
    for size in (0, 2000):
        line = on_full_disk(main, list(map(str, arguments)), size)
        assert "cannot be written (File too large)" in line
        assert whole_images(output) == []
    main(list(map(str, arguments)))
    assert len(whole_images(output)) == 2


def test_preprocessing_on_a_full_disk_leaves_no_stump_and_a_second_call_mends(in_workspace):
    from nnunet_vit_mae.cli.preprocess import main

    arguments = ["-d", "901", "-c", "3d_fullres", "-np", "1"]
    folder = in_workspace.preprocessed / "nnUNetPlans_3d_fullres_unlabelled"
    for size in (0, 4000):
        assert "cannot be written (File too large)" in on_full_disk(main, arguments, size)
        assert not list(folder.glob("*.b2nd"))
    main(arguments)
    assert len(list(folder.glob("*.b2nd"))) == 3
