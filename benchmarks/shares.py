"""Where the time of a whole command goes, in all of its processes: the network, and everything around it.

Needs py-spy (`pip install py-spy`), which looks at every process twenty times a second. It leaves out threads that
sleep, as far as it can tell, so the sum is that of all processes, and more than the clock shows where they work beside
one another.

    python benchmarks/shares.py -- mae3d_quantify -i scans -o volumes.csv -d 501
    python benchmarks/shares.py --make ct      # writes a dataset of large CT scans, and trains a network in two steps
    eval "$(python benchmarks/shares.py --variables ct)"
    python benchmarks/shares.py -- mae3d_quantify -i ct/raw/Dataset600_CT/imagesTs -o ct/volumes.csv -d 600 -p Small \
        -tr nnUNetTrainerViTScratch -device cpu
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from case_memory import balls, write_image

RATE = 20  # samples per second of each process
KINDS = {  # by functions on the stack; the first kind that is found counts
    "imports": ("_find_and_load ", "_fixup_main_from_path "),
    "network": ("Module._call_impl ", "_engine_run_backward ", "Optimizer.profile_hook_step."),
    "resampling and writing of predictions": ("export_prediction_from_logits ", "resample_and_save "),
    "preprocessing of images": ("run_case_npy ",),
    "reading of images": ("read_images ", "read_geometry ", "read_mask "),
    "passing arrays between processes": ("_recv ", "_send ", "_handle_tasks ", "_feed "),
    "waiting": ("Condition.wait ", "Event.wait ", "_PollLikeSelector.select ", "Popen._wait ", "socket.accept "),
}
SIDES, SPACING = (80, 512, 512), (0.8, 0.8, 2.0)  # of training cases: voxels z y x, mm x y z
LARGE, FINE = (300, 512, 512), (0.7, 0.7, 1.25)  # of the scan to predict
NETWORK = "--size XS --token 16 --decoder upscale --batch_size 2 --mirroring none"  # one that predicts in a minute
MODEL = "600 3d_fullres 0 -p Small -tr nnUNetTrainerViTScratch -device cpu"


def main() -> None:
    """Make the dataset, print its variables, or profile a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="FOLDER")
    parser.add_argument("--variables", type=Path, metavar="FOLDER")
    parser.add_argument("command", nargs="*")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make.resolve())
    elif arguments.variables:
        for name, value in variables(arguments.variables.resolve()).items():
            print(f"export {name}={shlex.quote(value)}")
    else:
        print_table(profile(arguments.command))


def profile(command: list[str]) -> list[str]:
    """Run a command and return its samples: stacks, outermost function first, and how often each was seen."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "samples.txt"
        spy = ["py-spy", "record", "--subprocesses", "--format", "raw", "--rate", str(RATE), "-o", str(file)]
        subprocess.run([*spy, "--", *command], check=True, stdout=sys.stderr)
        return file.read_text().splitlines()


def print_table(samples: Iterable[str]) -> None:
    """Print the seconds of each kind of work."""
    seconds = seconds_by_kind(samples)
    print("| work | s | share |\n|---|---|---|")
    for kind, value in seconds.most_common():
        print(f"| {kind} | {value:.1f} | {value / seconds.total():.2f} |")
    print(f"| sum | {seconds.total():.1f} | 1.00 |")


def seconds_by_kind(samples: Iterable[str]) -> Counter[str]:
    """Return how long each kind of work took, in all processes together."""
    seconds: Counter[str] = Counter()
    for sample in samples:
        stack, count = sample.rsplit(" ", 1)
        seconds[kind_of(stack)] += int(count) / RATE  # pyright: ignore[reportArgumentType]
    return seconds


def kind_of(stack: str) -> str:
    """Return the kind of work that a stack does.

    >>> kind_of("process 1;<module> (mae3d_plan:8);_find_and_load (<frozen importlib._bootstrap>:1360)")
    'imports'
    """
    return next((kind for kind, names in KINDS.items() if any(name in stack for name in names)), "all else")


# ---------- large CT scans, and a network


def variables(folder: Path) -> dict[str, str]:
    """Return nnU-Net's variables for a folder."""
    return {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed", "results")}


def make(folder: Path) -> None:
    """Write five cases with labels and a large one without, and train a small ViT in two steps."""
    raw = folder / "raw" / "Dataset600_CT"
    for number in range(5):
        write_case(raw, "Tr", f"case_{number}", SIDES, SPACING, seed=number)
    write_case(raw, "Ts", "large", LARGE, FINE, seed=5)
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "nodule": 2}}
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": 5, "file_ending": ".nii.gz"}))
    for command in (
        "nnUNetv2_plan_and_preprocess -d 600 -c 3d_fullres -np 1",
        f"mae3d_plan -d 600 -o Small {NETWORK} --epochs 1 --iterations 2",
        f"nnUNetv2_train {MODEL}",
    ):
        subprocess.run(command.split(), check=True, env=os.environ | variables(folder))


def write_case(
    raw: Path, part: str, name: str, sides: tuple[int, ...], spacing: tuple[float, ...], *, seed: int
) -> None:
    """Write an image with noise and, of a training case, its labels."""
    labels = balls(sides, 2, shift=seed)
    noise = np.random.default_rng(seed).normal(0, 20, sides)
    files = {f"images{part}/{name}_0000.nii.gz": (labels * 80.0 - 40 + noise).astype(np.int16)}
    if part == "Tr":
        files[f"labels{part}/{name}.nii.gz"] = labels
    for file, array in files.items():
        (raw / file).parent.mkdir(parents=True, exist_ok=True)
        write_image(array, raw / file, spacing)


if __name__ == "__main__":
    main()
