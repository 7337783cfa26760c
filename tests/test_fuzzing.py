"""Damaged files of every kind that is read: the result, or a sentence, and never another error, a crash or a hang.

Bytes of a valid file are changed, cut, doubled and removed, or all bytes are random. INPUTS is their number in the slow
test, and the fast one takes a part of it.
"""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
import torch
from dicom_files import write_frames, write_slices
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_weights import make_card

from nnunet_vit_mae.calibration.record import read_calibration
from nnunet_vit_mae.datasets.check.inspection import InspectionTask, inspect_case
from nnunet_vit_mae.datasets.contrasts.record import CONTRAST_RECORD, read_channels, read_contrasts
from nnunet_vit_mae.datasets.convert.bids import bids_studies
from nnunet_vit_mae.datasets.convert.key import read_key
from nnunet_vit_mae.datasets.crop.qc_table import QC_TABLE, QCRow, read_qc_table, write_qc_table
from nnunet_vit_mae.datasets.split.files import SPLIT_RECORD, read_split_record, read_splits
from nnunet_vit_mae.datasets.split.patients import read_patients
from nnunet_vit_mae.datasets.tables import read_case_table, read_names
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign.checkpoints import read_checkpoint, weights_in
from nnunet_vit_mae.imaging.labels import read_labels
from nnunet_vit_mae.imaging.scans import ScanError, read_scan
from nnunet_vit_mae.networks.build import build_encoder
from nnunet_vit_mae.nnunet.prediction import read_probabilities
from nnunet_vit_mae.pretraining.volumes import volume_problem
from nnunet_vit_mae.storage.limits import VARIABLE
from nnunet_vit_mae.storage.pickles import read_properties, read_trained
from nnunet_vit_mae.weights import read_encoder, save_encoder

INPUTS = 4_000
FAST = 1_000
LARGEST = 100_000  # voxels, so that a damaged size takes neither memory nor time
RANDOM_BYTES = 600
WORDS = (b"\0" * 4, b"\xff" * 4, b"9" * 8, b"-1", b"nan", b"null", b"{}")


@dataclass(frozen=True)
class Reader:
    """What reads a file, and how a valid one is made; both get the path of the file, in an empty folder."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]


def write_image(file: Path) -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 100, (5, 6, 7)).astype(np.int16))
    image.SetSpacing((0.5, 0.6, 2.0))
    sitk.WriteImage(image, str(file))


def write_compressed(file: Path) -> None:
    write_image(file.with_suffix(""))
    file.write_bytes(gzip.compress(file.with_suffix("").read_bytes()))
    file.with_suffix("").unlink()


def inspect(file: Path) -> object:
    """Every reader of images reads this file: that of scans, and that of mae3d_check, as an image and as a label."""
    summary = inspect_case(InspectionTask("imagesTr", "a", {0: file}, file, frozenset()), frozenset({0, 1}))
    try:
        return read_scan(file)
    except ScanError:  # commands make a sentence of it
        return summary


def scan_in_folder(file: Path) -> object:
    try:
        return read_scan(file.parent)
    except ScanError:
        return None


def slices(file: Path) -> None:
    """A classic series, one slice of which is the file."""
    write_slices(file.parent)
    next(file.parent.glob("*_*.dcm")).rename(file)


def sidecar(file: Path) -> None:
    """BIDS: the file lies beside an image."""
    write_image(file.with_suffix(".nii.gz"))
    write_text({"Manufacturer": "A", "SliceThickness": 2.0})(file)


def write_text(content: object) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    return write


def write_qc(file: Path) -> None:
    row = QCRow("a", "done", "imagesUn", "template", 0.5, coverage=1.0, channels="0", source="a.nii.gz")
    write_qc_table([row, row], file.parent)


def write_probabilities(file: Path) -> None:
    np.savez_compressed(file, probabilities=np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float16))


def write_volume(file: Path) -> None:
    blosc2.asarray(np.ones((1, 5, 6, 7), np.float32), urlpath=str(file), mode="w")


def write_checkpoint(file: Path) -> None:
    torch.save({"state_dict": {"a.weight": torch.ones(2, 3)}, "epoch": 3}, file)


def write_tensors(file: Path) -> None:
    file.write_bytes(save({"a.weight": torch.ones(2, 3)}))


def write_encoder(file: Path) -> None:
    card = make_card(channel_names=["CT"])
    save_encoder(build_encoder(card.settings, 1), card, file)


def write_trained(file: Path) -> None:
    weights = {"a.weight": torch.ones(2, 3)}
    torch.save({"network_weights": weights, "best": np.float64(0.5), "epoch": 3, "init_args": {"fold": 0}}, file)


def write_properties(file: Path) -> None:
    content = {"spacing": np.ones(3), "shape": (np.int64(3), 4, 5), "class_locations": {1: np.zeros((2, 4), np.int64)}}
    file.write_bytes(pickle.dumps(content))


DESCRIPTION = {
    "channel_names": {"0": "T1", "1": "CT"},
    "labels": {"background": 0, "a": 1, "b": [1, 2]},
    "regions_class_order": [1, 2],
    "numTraining": 3,
    "file_ending": ".nii.gz",
}
TABLE = "case,patient,session\nP0001_1,=M1,a\nP0001_2,M1,b\nP0002_1,M2,\n"
PRESENT = {"imagesTr": {"a": {"present": ["T1"], "filled": ["T2"], "blank": []}}}
SPLIT = {"test": ["a"], "left_out": [], "parents": [0]}
CASES = ["P0001_1", "P0001_2", "P0002_1"]
READERS = {
    reader.name: reader
    for reader in (
        Reader("image.nii", write_image, inspect),
        Reader("image.nii.gz", write_compressed, inspect),
        Reader("image.nrrd", write_image, inspect),
        Reader("image.mha", write_image, inspect),
        Reader("image.tif", lambda file: tifffile.imwrite(file, np.ones((5, 6, 7), np.uint8)), inspect),
        Reader("slice.dcm", slices, scan_in_folder),
        Reader("frames.dcm", lambda file: write_frames(file, range(8)), scan_in_folder),
        Reader("sub-1/anat/sub-1_T1w.json", sidecar, lambda file: bids_studies(file.parents[2], [], None)),
        Reader("table.csv", write_text(TABLE), lambda file: read_case_table(file, None, CASES)),
        Reader("key.csv", write_text(TABLE), read_key),
        Reader("names.txt", write_text("P0001_1\n# P0002_1\n"), lambda file: read_names(file, CASES, "--names")),
        Reader(QC_TABLE, write_qc, lambda file: read_qc_table(file.parent)),
        Reader("probabilities.npz", write_probabilities, lambda file: read_probabilities(file, 2)),
        Reader("volume.b2nd", write_volume, lambda file: volume_problem(file, 1)),
        Reader("checkpoint.pth", write_checkpoint, lambda file: weights_in(read_checkpoint(file))),
        Reader("foreign.safetensors", write_tensors, lambda file: weights_in(read_checkpoint(file))),
        Reader("encoder.safetensors", write_encoder, read_encoder),
        Reader("trained.pth", write_trained, read_trained),
        Reader("properties.pkl", write_properties, read_properties),
        Reader("dataset.json", write_text(DESCRIPTION), lambda file: (read_channels(file.parent), read_labels(file))),
        Reader(CONTRAST_RECORD, write_text(PRESENT), lambda file: read_contrasts(file.parent)),
        Reader("splits.json", write_text([{"train": ["a"], "val": ["b"]}]), read_splits),
        Reader(SPLIT_RECORD, write_text(SPLIT), lambda file: read_split_record(file.parent)),
        Reader("patients.json", write_text({"a": "M1", "b": "M2"}), read_patients),
        Reader("calibration.json", write_text({"thresholds": {"a": 0.5}, "cases": ["a"]}), read_calibration),
    )
}


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of a valid file with a few changes, or random ones."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=RANDOM_BYTES))
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        # headers are short, and the first bytes decide most
        start = draw(st.integers(0, min(400, len(content))) | st.integers(0, len(content)))
        length = draw(st.integers(1, 8) | st.integers(1, max(1, len(content))))
        match draw(st.sampled_from(["set", "bit", "cut", "remove", "double"])):
            case "set":
                content[start : start + length] = draw(st.binary(max_size=8) | st.sampled_from(WORDS))
            case "bit" if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[start:]
            case "remove":
                del content[start : start + length]
            case "double":
                content[start:start] = content[start : start + length]
    return bytes(content)


def attack(reader: Reader, folder: Path, inputs: int) -> None:
    """Read a number of damaged files; anything but a result or a `UserError` is a failure."""
    file = folder / reader.name
    file.parent.mkdir(parents=True, exist_ok=True)
    reader.write(file)
    valid = file.read_bytes()
    assert reader.read(file) is not None or reader.name == "volume.b2nd"

    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(valid))
    def read(content: bytes) -> None:
        file.unlink()  # a new file: blosc2 and torch map files into memory
        file.write_bytes(content)
        with suppress(UserError):
            reader.read(file)

    with mock.patch.dict(os.environ, {VARIABLE: str(LARGEST)}):
        read()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_end_in_a_result_or_a_sentence(name, tmp_path):
    attack(READERS[name], tmp_path, FAST // len(READERS))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_end_in_a_result_or_a_sentence(name, tmp_path):
    attack(READERS[name], tmp_path, -(-INPUTS // len(READERS)))


def test_a_header_entry_that_is_not_utf8_is_removed(tmp_path):
    """Found by the test above: a MetaImage file with such a key ended in a TypeError."""
    write_image(tmp_path / "a.mha")
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"TransformMatrix", b"\xe4 = x\nTransformMatrix"))
    image = read_scan(tmp_path / "a.mha")
    assert not image.GetMetaDataKeys()
    assert image.GetSpacing() == (0.5, 0.6, 2.0)


def test_what_is_not_a_sentence_would_be_noticed(tmp_path):
    reader = Reader("a.json", write_text({"a": 1}), lambda file: json.loads(file.read_text())["a"])
    with pytest.raises(ExceptionGroup, match="distinct failures"):
        attack(reader, tmp_path, 100)
