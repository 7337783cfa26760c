"""Memory of `mae3d_calibrate` and `mae3d_evaluate` for one large case with many labels, by size and number of labels.

The case is a body with balls in it. Its prediction is the same a few voxels aside, and probabilities are doubtful near
the surfaces only, so that they compress better than real ones: memory is that of real cases, time is less. Each
measurement runs in a fresh process, on all that a command does with a case: nnU-Net's own prediction is not part of it.

    python benchmarks/case_memory.py                               # prints the table of docs/evaluation.md
    python benchmarks/case_memory.py --shape 600 512 512 --labels 30     # its last rows
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import SimpleITK as sitk
from measuring import printed_apart, resident
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy import ndimage

from nnunet_vit_mae.evaluation.cases import find_evaluation_set, measure_cases
from nnunet_vit_mae.evaluation.overlays import ExampleCase, read_example
from nnunet_vit_mae.evaluation.results import EvaluationOptions
from nnunet_vit_mae.nnunet.calibration import fit
from nnunet_vit_mae.nnunet.folders import Dataset
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.nnunet.predicted_cases import PredictedCase
from nnunet_vit_mae.units import MIB

SHAPES = [(96, 128, 112), (192, 256, 224)]
LABELS = [5, 30]
SPACING = (0.8, 0.9, 1.5)  # mm, x y z
REACH = 1  # voxel on each side of a surface in which probabilities are doubtful
DOUBT, REST = 0.49, 1e-7  # largest probability of the second class there, and that of all other classes


def main() -> None:
    """Print the table, or (with `--measure`) run one command's work for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("Z", "Y", "X"))
    parser.add_argument("--labels", type=int)
    parser.add_argument("--only", choices=WORK, help="one of the commands")
    parser.add_argument("--folder", type=Path, help="for the case, which is kept there and used again")
    parser.add_argument("--measure", nargs=2, metavar=("COMMAND", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        command, folder = arguments.measure
        print(json.dumps(measured(WORK[command], Path(folder))))
        return
    print("| voxels | labels | command | MiB before | MiB at the peak | bytes per voxel | s |")
    print("|---|---|---|---|---|---|---|")
    for shape in [tuple(arguments.shape)] if arguments.shape else SHAPES:
        for labels in [arguments.labels] if arguments.labels else LABELS:
            for command in [arguments.only] if arguments.only else WORK:
                print(row_of(shape, labels, command, arguments.folder), flush=True)


def row_of(shape: tuple[int, ...], labels: int, command: str, folder: Path | None = None) -> str:
    """Return a row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        write_case(place, shape, labels, probabilities=command == "mae3d_calibrate")
        found = json.loads(printed_apart(__file__, "--measure", command, str(place)))
    each = (found["peak"] - found["before"]) / math.prod(shape)
    sizes = [f"{found[when] / MIB:.0f}" for when in ("before", "peak")]
    sides = " x ".join(map(str, shape))
    return f"| {sides} | {labels} | `{command}` | {' | '.join(sizes)} | {each:.1f} | {found['seconds']:.0f} |"


def measured(work: Callable[[Path], object], folder: Path) -> dict[str, float]:
    """Return bytes before and at the peak, without pages of files, and seconds, of a process that did nothing else."""
    before, started = resident("RssAnon"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    work(folder)
    seconds = time.perf_counter() - started
    return {"before": before, "peak": resident("VmHWM") - resident("RssFile"), "seconds": seconds}


def calibrate(folder: Path) -> None:
    """Fit thresholds to the case."""
    description = json.loads((folder / "dataset.json").read_text())
    plans = PlansManager({"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"})
    plan = Plan(Dataset("case", folder, folder, folder), plans, "3d_fullres", description)
    model: Any = SimpleNamespace(plan=plan)
    fit(model, [PredictedCase("case", "0", folder / "case.npz", folder / "labels" / "case.nii.gz")], "volume")


def evaluate(folder: Path) -> None:
    """Measure the case, and read the slices that a report shows."""
    found = find_evaluation_set(folder / "labels", {"model": folder / "predictions"}, folder / "images")
    measure_cases(found, EvaluationOptions())
    for label in found.labels.values:
        read_example(ExampleCase("model", label, "only case", "case", 1.0), found)


WORK = {"mae3d_evaluate": evaluate, "mae3d_calibrate": calibrate}


# ---------- the case


def write_case(folder: Path, shape: tuple[int, ...], labels: int, *, probabilities: bool) -> None:
    """Write the files of the case that are not there yet."""
    for name in ("labels", "predictions", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    names = {"background": 0} | {f"organ_{value}": value for value in range(1, labels + 1)}
    description = {"labels": names, "file_ending": ".nii.gz", "channel_names": {"0": "CT"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    prediction = balls(shape, labels, shift=1)
    if not (folder / "labels" / "case.nii.gz").exists():
        write_image(balls(shape, labels, shift=0), folder / "labels" / "case.nii.gz")
        write_image(prediction, folder / "predictions" / "case.nii.gz")
        write_image(prediction.astype(np.int16) * 20 - 100, folder / "images" / "case_0000.nii.gz")
    if probabilities and not (folder / "case.npz").exists():
        write_probabilities(prediction, labels, folder / "case.npz")


def balls(shape: tuple[int, ...], labels: int, *, shift: int) -> np.ndarray:
    """Return a body (label 1), which fills most of the volume, with a ball for each of the other labels (z y x)."""
    random, volume = np.random.default_rng(0), np.zeros(shape, np.uint8)
    sides = np.array(shape)
    draw(volume, 1, (sides - 1) / 2 + shift, 0.48 * sides)
    for value in range(2, labels + 1):
        centre = (0.2 + 0.6 * random.random(3)) * sides
        draw(volume, value, centre + shift * random.integers(-1, 2, 3), (0.03 + 0.05 * random.random()) * sides)
    return volume


def draw(volume: np.ndarray, value: int, centre: np.ndarray, radii: np.ndarray) -> None:
    """Draw an ellipsoid into a volume, plane by plane."""
    y, x = (np.arange(side) for side in volume.shape[1:])
    around = ((y - centre[1]) / radii[1])[:, None] ** 2 + ((x - centre[2]) / radii[2])[None] ** 2
    for z, plane in enumerate(volume):
        plane[around + ((z - centre[0]) / radii[0]) ** 2 <= 1] = value


def write_image(array: np.ndarray, file: Path, spacing: tuple[float, ...] = SPACING) -> None:
    """Write a volume (z y x); its spacing is in mm (x y z)."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file), useCompression=True)


def write_probabilities(prediction: np.ndarray, labels: int, file: Path) -> None:
    """Write a softmax as nnU-Net does, but never all of it is in memory."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (labels + 1, *prediction.shape)}
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("probabilities.npy", "w", force_zip64=True) as stream,
    ):
        np.lib.format.write_array_header_1_0(stream, header)
        rivals = rivals_of(prediction)
        for channel in range(labels + 1):
            for z in range(len(prediction)):
                stream.write(plane_of(prediction[z], rivals[z], channel, labels + 1, seed=z).astype("<f4").tobytes())


def rivals_of(prediction: np.ndarray) -> np.ndarray:
    """Return another label that is near each voxel (z y x); its own where there is none."""
    rivals, window = np.empty_like(prediction), 2 * REACH + 1
    for z, own in enumerate(prediction):
        slab = prediction[max(0, z - REACH) : z + REACH + 1]
        most, least = ndimage.maximum_filter(slab.max(0), window), ndimage.minimum_filter(slab.min(0), window)
        rivals[z] = np.where(most == own, least, most)
    return rivals


def plane_of(own: np.ndarray, rival: np.ndarray, channel: int, channels: int, *, seed: int) -> np.ndarray:
    """Return the probabilities (y x) of a channel."""
    plane = np.full(own.shape, REST, np.float32)
    is_own, is_rival = own == channel, rival == channel
    if is_own.any() or is_rival.any():
        doubt = np.random.default_rng(seed).random(own.shape, np.float32) * np.float32(DOUBT)
        doubt[own == rival] = REST
        plane[is_rival] = doubt[is_rival]
        plane[is_own] = (1 - doubt - np.float32((channels - 2) * REST))[is_own]
    return plane


if __name__ == "__main__":
    main()
