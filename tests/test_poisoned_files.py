"""Files that hold code or claim to be huge: nothing in them is run, and nothing of them is read into memory."""

import ast
import gzip
import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import Poison
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

import nnunet_vit_mae
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign.checkpoints import read_checkpoint
from nnunet_vit_mae.imaging.scans import ScanError, read_scan
from nnunet_vit_mae.imaging.volumes import read_geometry, read_image, read_volume, refuse_large
from nnunet_vit_mae.nnunet.calibrated import write_calibrated
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import load_plan
from nnunet_vit_mae.nnunet.prediction import read_probabilities
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerViTScratch
from nnunet_vit_mae.pretraining.volumes import open_volume
from nnunet_vit_mae.storage.limits import MAX_VOXELS, VARIABLE
from nnunet_vit_mae.storage.pickles import read_properties, read_trained
from nnunet_vit_mae.study.costs import count_parameters
from nnunet_vit_mae.weights import read_encoder


@pytest.fixture
def marker(tmp_path) -> Path:
    return tmp_path / "marker"


def checkpoint(folder: Path, marker: Path) -> Path:
    weights = {"decoder.seg_layers.0.bias": torch.zeros(2)}
    torch.save({"network_weights": weights, "init_args": {"plans": Poison(marker)}}, folder / "checkpoint_final.pth")
    return folder / "checkpoint_final.pth"


def properties(folder: Path, marker: Path) -> Path:
    (folder / "case.pkl").write_bytes(pickle.dumps({"spacing": (1.0, 1.0, 1.0), "class_locations": Poison(marker)}))
    return folder / "case.pkl"


def probabilities(folder: Path, marker: Path) -> Path:
    np.savez(folder / "case.npz", probabilities=np.array([Poison(marker)], dtype=object))
    return folder / "case.npz"


def encoder(folder: Path, marker: Path) -> Path:
    torch.save({"tokenizer.weight": torch.zeros(2), "card": Poison(marker)}, folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


def lazy_array(folder: Path, marker: Path, kind: int, content: dict) -> Path:
    """A file of blosc2 with a recipe for its array, as its own `LazyArray.save` writes one."""
    blosc2.zeros((8,), dtype=np.float32, urlpath=str(folder / "operand.b2nd"), mode="w")
    file = folder / "case.b2nd"
    array = blosc2.empty((8,), dtype=np.float32, urlpath=str(file), mode="w", meta={"LazyArray": kind})
    array.schunk.vlmeta["_LazyArray"] = content | {"operands": {"o0": "operand.b2nd"}}
    return file


def function(folder: Path, marker: Path) -> Path:
    source = f"def f(inputs, output, offset, x=open({str(marker)!r}, 'w').close()):\n    output[:] = 0\n"
    return lazy_array(folder, marker, 1, {"UDF": source, "name": "f"})


def expression(folder: Path, marker: Path) -> Path:
    return lazy_array(folder, marker, 0, {"expression": f"[x for x in [open({str(marker)!r}, 'w')]] + o0", "UDF": None})


def load_case(file: Path) -> None:
    for name in ("case.b2nd", "case_seg.b2nd"):
        if not (file.parent / name).exists():
            shutil.copy(file, file.parent / name)
    nnUNetDatasetBlosc2(str(file.parent), ["case"]).load_case("case")


POISONED: dict[str, tuple[Callable[[Path, Path], Path], Callable[[Path], object]]] = {
    "a checkpoint to calibrate": (checkpoint, lambda file: write_calibrated(file, [0.5])),
    "a checkpoint to count": (checkpoint, count_parameters),
    "a checkpoint": (checkpoint, read_trained),
    "another project's checkpoint": (checkpoint, read_checkpoint),
    "properties": (properties, read_properties),
    "probabilities": (probabilities, lambda file: read_probabilities(file, 2)),
    "an encoder": (encoder, read_encoder),
    "a volume with a function": (function, open_volume),
    "a volume with an expression": (expression, open_volume),
}


@pytest.mark.parametrize("name", POISONED)
def test_nothing_in_a_file_is_run(name, tmp_path, marker):
    make, read = POISONED[name]
    file = make(tmp_path, marker)
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("make", [function, expression])
def test_nnunet_runs_nothing_in_a_volume_either(make, tmp_path, marker):
    with pytest.raises(ValueError, match="deserialize"):
        load_case(make(tmp_path, marker))
    assert not marker.exists()


UNSAFE: dict[str, tuple[Callable[[Path, Path], Path], Callable[[Path], object]]] = {
    "a checkpoint": (checkpoint, lambda file: torch.load(file, weights_only=False)),
    "properties": (properties, lambda file: pickle.loads(file.read_bytes())),
    "probabilities": (probabilities, lambda file: np.load(file, allow_pickle=True)["probabilities"]),
    "a volume with a function": (function, lambda file: blosc2.open(str(file), deserialize="full")),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_the_poison_works_where_it_is_run(name, tmp_path, marker):
    make, read = UNSAFE[name]
    read(make(tmp_path, marker))
    assert marker.exists()


def test_no_source_reads_what_can_run_code():
    """Calls that unpickle have one home each, and say that they do not run code."""
    for file in (Path(nnunet_vit_mae.__file__).parent).rglob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name, said = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in ("pickle.load", "pickle.loads", "load_pickle", "joblib.load", "eval", "exec"), file
            assert name != "torch.load" or said.get("weights_only") == "True", file
            assert name != "np.load" or said.get("allow_pickle") == "False", file
            assert name != "blosc2.open" or "deserialize" not in said, file  # "safe" unless something else is said


def test_a_training_is_not_continued_from_a_poisoned_checkpoint(in_workspace, tmp_path, marker, refused):
    plans = json.loads((in_workspace.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": True}
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text())
    trainer = nnUNetTrainerViTScratch(plans, "3d_fullres", 0, description, torch.device("cpu"))
    file = checkpoint(tmp_path, marker)
    assert "only weights and plain values" in refused(lambda _: trainer.load_checkpoint(str(file)))
    assert not marker.exists()


def test_a_module_that_plans_name_is_not_imported(in_workspace, tmp_path, marker, monkeypatch):
    (tmp_path / "poisoned_module.py").write_text(f"open({str(marker)!r}, 'w')\nclass Network: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = in_workspace.preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "poisoned_module.Network"
    file.write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"poisoned_module\.Network"):
        load_plan(find_dataset("901"), "nnUNetPlans", "3d_fullres")
    assert not marker.exists()


# ---------- what nnU-Net writes is read


def test_what_nnunet_writes_is_read(planned):
    file = next((planned.preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"))
    assert read_properties(file).keys() == pickle.loads(file.read_bytes()).keys()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_numbers_and_arrays_of_numpy_are_read(tmp_path, protocol):
    content = {"array": np.arange(6.0).reshape(2, 3), "scalar": np.float32(0.5), "whole": np.int64(3)}
    content["flag"] = np.bool_(True)
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    torch.save({"network_weights": {}} | content, tmp_path / "checkpoint.pth")  # in protocol 2, whatever else there is
    for read in (read_properties(tmp_path / "case.pkl"), read_trained(tmp_path / "checkpoint.pth")):
        np.testing.assert_array_equal(read["array"], content["array"])
        assert (read["scalar"], read["whole"], read["flag"]) == (0.5, 3, True)


@pytest.mark.parametrize("weights", [None, [], {"a": 1}, {"a": torch.ones(2), 3: torch.ones(2)}])
def test_what_holds_no_weights_is_no_checkpoint(tmp_path, weights):
    torch.save({"network_weights": weights}, tmp_path / "checkpoint.pth")
    with pytest.raises(UserError, match="is not a checkpoint of nnU-Net"):
        read_trained(tmp_path / "checkpoint.pth")


def test_names_of_numpy_1_are_read(tmp_path):
    """As pickled by numpy 1, whose core had another name."""
    content = pickle.dumps({"scalar": np.float64(2.5)}, protocol=2).replace(b"numpy._core.multi", b"numpy.core.multi")
    assert b"numpy.core" in content
    (tmp_path / "case.pkl").write_bytes(content)
    assert read_properties(tmp_path / "case.pkl") == {"scalar": 2.5}


# ---------- images that are huge


def nifti_of_zeros(file: Path, sides: tuple[int, int, int]) -> Path:
    """A header with these sides, and as few bytes as gzip makes of zeros; the voxels end early."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *sides, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 4, 16)  # int16
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into("<f", header, 108, 352)
    header[344:348] = b"n+1\0"
    content = bytes(header) + bytes(2**20)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def nrrd(file: Path, sides: tuple[int, int, int]) -> Path:
    lines = ["NRRD0004", "type: short", "dimension: 3", f"sizes: {' '.join(map(str, sides))}", "encoding: gzip"]
    lines += ["space: left-posterior-superior", "space directions: (1,0,0) (0,1,0) (0,0,1)", "endian: little"]
    file.write_bytes("\n".join([*lines, "", ""]).encode() + gzip.compress(bytes(2**20)))
    return file


def mha(file: Path, sides: tuple[int, int, int]) -> Path:
    lines = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "CompressedData = True"]
    lines += [
        f"DimSize = {' '.join(map(str, sides))}",
        "ElementSpacing = 1 1 1",
        "ElementType = MET_SHORT",
        "ElementDataFile = LOCAL",
        "",
    ]
    file.write_bytes("\n".join(lines).encode() + gzip.compress(bytes(2**20)))
    return file


HUGE = (600, 600, 600)
IMAGES = {"case.nii.gz": nifti_of_zeros, "case.nii": nifti_of_zeros, "case.nrrd": nrrd, "case.mha": mha}


@pytest.mark.parametrize("read", [read_scan, read_image, read_geometry, read_volume])
@pytest.mark.parametrize("name", IMAGES)
def test_a_huge_image_is_refused_by_its_header(name, read, tmp_path):
    with pytest.raises(ScanError, match=rf"{name} has 600 x 600 x 600 voxels, more than the 200,000,000 .*{VARIABLE}"):
        read(IMAGES[name](tmp_path / name, HUGE))


def test_a_huge_image_is_refused_before_nnunet_reads_it(tmp_path):
    with pytest.raises(UserError, match="600 x 600 x 600 voxels"):
        refuse_large([nifti_of_zeros(tmp_path / "case_0000.nii.gz", HUGE)])


def test_the_limit_is_the_users(tmp_path, monkeypatch):
    file = tmp_path / "case.nii.gz"
    sitk.WriteImage(sitk.Image((10, 11, 12), sitk.sitkUInt8), str(file))
    monkeypatch.setenv(VARIABLE, "1320")
    read_scan(file)
    monkeypatch.setenv(VARIABLE, "1319")
    with pytest.raises(ScanError, match="10 x 11 x 12 voxels, more than the 1,319"):
        read_scan(file)


@pytest.mark.parametrize("value", ["", "0", "-5", "many", "1e9"])
def test_a_limit_that_is_no_number_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UserError, match=VARIABLE):
        read_geometry(nifti_of_zeros(tmp_path / "case.nii.gz", (4, 5, 6)))


def test_a_huge_preprocessed_volume_is_refused(tmp_path):
    file = tmp_path / "case.b2nd"
    blosc2.zeros((1, *HUGE), dtype=np.float32, urlpath=str(file), mode="w")
    assert file.stat().st_size < 10_000
    with pytest.raises(UserError, match="600 x 600 x 600 voxels"):
        open_volume(file)


def test_huge_probabilities_are_refused_by_their_header(tmp_path):
    file = tmp_path / "case.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as parts, parts.open("probabilities.npy", "w") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2, *HUGE)}
        np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(UserError, match="600 x 600 x 600 voxels"):
        read_probabilities(file, 2)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    torch.save({"network_weights": {"a": torch.zeros(10**6)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for part in plain.infolist():
            bomb.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 20_000
    with pytest.raises(UserError, match="compressed"):
        read_trained(tmp_path / "bomb.pth")


def test_a_long_header_of_an_encoder_is_refused(tmp_path):
    file = tmp_path / "encoder.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UserError, match=r"encoder\.safetensors"):
        read_encoder(file)


def test_a_huge_image_takes_no_memory(tmp_path):
    """Read in a process whose memory would not hold it."""
    nifti_of_zeros(tmp_path / "case.nii.gz", (3000, 3000, 3000))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from nnunet_vit_mae.imaging.scans import read_scan, ScanError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_scan(Path(sys.argv[1]))\n"
        "except ScanError: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "case.nii.gz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000  # kB
    assert MAX_VOXELS < 3000**3


COMMANDS: dict[str, tuple[str, str]] = {  # the file that is huge, and the command on the folder
    "check": ("raw/imagesTr/train_0_0000.nii.gz", "mae3d_check -d 901 -o {out}"),
    "fill": ("raw/imagesTs/test_0_0000.nii.gz", "mae3d_fill_contrasts -d 901"),
    "preprocess": ("raw/imagesUn/pool_0_0001.nii.gz", "mae3d_preprocess -d 901 -c 3d_fullres -np 1"),
    "refine": ("raw/labelsTr/train_1.nii.gz", "mae3d_refine_labels -i {raw}/imagesTr -l {raw}/labelsTr -o {out}"),
    "evaluate": ("raw/labelsTr/train_1.nii.gz", "mae3d_evaluate -r {raw}/labelsTr -p a={raw}/labelsTr -o {out} -np 1"),
    "convert": ("bids/sub-01/anat/sub-01_T1w.nii.gz", "mae3d_convert -i {root}/bids -o {out}/Dataset902_New -np 1"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_a_huge_image(name, workspace, tmp_path):
    place, command = COMMANDS[name]
    file = workspace.raw / place.removeprefix("raw/") if place.startswith("raw/") else workspace.root / place
    file.parent.mkdir(parents=True, exist_ok=True)
    nifti_of_zeros(file, HUGE)
    places = {"raw": workspace.raw, "root": workspace.root, "out": tmp_path / "out"}
    done = workspace.call(*command.format(**places).split(), code=2)
    assert "600 x 600 x 600 voxels, more than the 200,000,000" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
