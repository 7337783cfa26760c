"""Samples per second of one worker: our reader and nnU-Net's augmenting loader in turn, on the same preprocessed files.

Without `-d`, on CT-like volumes that are made and preprocessed by nnU-Net for this. Cold: the files are dropped from
the system's page cache before each turn (Linux only). CPU seconds count work alone; wall seconds also waiting for the
disk and for others on the same core.

    taskset -c 1 python benchmarks/loader.py --patch 96 96 96       # prints a table of docs/scale.md
    taskset -c 1 python benchmarks/loader.py -d 505                 # prints the other one
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from nnunet_vit_mae.pretraining.crops import ConsecutiveBatches
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.readers import read_batches
from nnunet_vit_mae.pretraining.volumes import Cache, DeviceCache
from nnunet_vit_mae.units import MIB

if TYPE_CHECKING:
    from nnunet_vit_mae.nnunet.plans import Plan

SYNTHETIC = "Dataset999_Volumes"
SHAPE = (160, 224, 224)  # of the volumes that are made
ENTRY = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
BATCH = 2
CPU = torch.device("cpu")
TURN_SECONDS = 0.5
CROPS, MASKS = 4, 2
NNUNET, OURS, CACHED = "nnU-Net, its augmentation", "ours", "ours, `--cache`"
SEVERAL = f"ours, {CROPS} crops per volume, {MASKS} masks per crop"


@dataclass
class Time:
    """Seconds of one loader under one condition, summed over its turns."""

    crops: int = 0
    cpu: float = 0.0
    wall: float = 0.0

    def take(self, batches: Iterator[int], most: float) -> None:
        """Take batches for a turn, or so many crops: after a pass over cold files they are no longer cold."""
        cpu, wall, crops = time.process_time(), time.perf_counter(), 0
        while crops < most and time.perf_counter() < wall + TURN_SECONDS:
            crops += next(batches)
        self.crops += crops
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", help="a preprocessed dataset")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans")
    parser.add_argument("--patch", type=int, nargs=3, help="instead of the plans', z y x")
    parser.add_argument("--volumes", type=int, default=8, help="to make without -d")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        os.environ |= {"nnUNet_results": folder}  # for the log of nnU-Net's trainer
        if arguments.dataset is None:
            make_dataset(Path(folder), arguments.volumes)
        os.environ |= {"nnUNet_n_proc_DA": "0"}  # nnU-Net then loads in this process
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Take batches in turn from each loader, cold and warm."""
    from nnunet_vit_mae.nnunet.folders import find_dataset
    from nnunet_vit_mae.nnunet.plans import load_plan

    plan = load_plan(find_dataset(arguments.dataset or SYNTHETIC), arguments.plans, arguments.configuration)
    patch = tuple(arguments.patch or plan.patch_size)
    files = sorted(file for file in plan.preprocessed_folder.iterdir() if file.suffix in (".b2nd", ".pkl"))
    images = [file for file in files if file.suffix == ".b2nd" and not file.stem.endswith("_seg")]
    print(
        f"{plan.dataset.name}, {len(images)} cases, crops of {' x '.join(map(str, patch))}, {arguments.rounds} rounds"
    )
    print(f"{describe(images)}\n")

    conditions: dict[str, Callable] = {"cold": drop_from_page_cache, "warm": read_through}
    with Cache(images, limit=2**34) as cache:
        loaders = {
            NNUNET: nnunet_batches(plan, patch),
            OURS: our_batches(plan, images, patch),
            SEVERAL: our_batches(plan, images, patch, crops=CROPS, masks=MASKS),
            CACHED: our_batches(plan, images, patch, cache),
        }
        times = {(loader, condition): Time() for condition in conditions for loader in loaders}
        del times[CACHED, "cold"]  # it reads no files
        for batches in loaders.values():
            next(batches)
        for _ in range(arguments.rounds):
            for (loader, condition), total in times.items():
                conditions[condition](files)
                each = CROPS * MASKS if loader == SEVERAL else 1
                total.take(loaders[loader], each * len(images) if condition == "cold" else math.inf)

    print(
        "| files | loader | samples / CPU second | ratio | samples / wall second | ratio |\n|---|---|---|---|---|---|"
    )
    for (loader, condition), total in times.items():
        reference = times[NNUNET, condition]
        cpu, wall = (total.crops / seconds for seconds in (total.cpu, total.wall))
        ratios = (cpu * reference.cpu / reference.crops, wall * reference.wall / reference.crops)
        print(f"| {condition} | {loader} | {cpu:.1f} | {ratios[0]:.1f} | {wall:.1f} | {ratios[1]:.1f} |")


def our_batches(
    plan: Plan,
    images: list[Path],
    patch: tuple[int, ...],
    cache: Cache | DeviceCache | None = None,
    *,
    crops: int = 1,
    masks: int = 1,
    readers: int = 0,
    batch: int = BATCH,
) -> Iterator[int]:
    """Read as `mae3d_pretrain` does, in this process or with `readers`; yields the samples of a batch."""
    several = {"batch_size": batch * crops * masks, "crops_per_volume": crops, "masks_per_crop": masks}
    job = PretrainingJob(
        files=images,
        channel_names=plan.channel_names,
        patch_size=patch,
        spacing=tuple(map(float, plan.configuration.spacing)),
        network=plan.settings.network,
        protocol=replace(plan.settings.pretraining, **several),
        cache=cache,
    )
    steps = ConsecutiveBatches(0, 10**9, job.protocol.reads)
    with closing(read_batches(job.crops(), steps, readers, pin_memory=False)) as batches:
        for one in batches:
            yield len(one.present)


def nnunet_batches(plan: Plan, patch: tuple[int, ...]) -> Iterator[int]:
    """Read with nnU-Net's own training loader, as its trainer builds it, in this process."""
    from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerBaseline

    trainer = trainer_of(nnUNetTrainerBaseline, plan, {"patch_size": list(patch), "batch_size": BATCH}, CPU)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.batch_size = BATCH
        batches, _ = trainer.get_dataloaders()
    for batch in batches:
        yield len(batch["data"])


def trainer_of(kind: type[Any], plan: Plan, changes: Mapping[str, Any], device: torch.device) -> Any:
    """Return a trainer on all cases, with changes of the plans' configuration."""
    plans = json.loads(json.dumps(plan.plans.plans)) | {"continue_training": False}
    plans["configurations"][plan.name] |= changes
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(plans, plan.name, "all", plan.dataset_json, device)


def drop_from_page_cache(files: list[Path]) -> None:
    """Make the next read come from the disk."""
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(files: list[Path]) -> None:
    """Make the next read come from memory."""
    for file in files:
        file.read_bytes()


def describe(images: list[Path]) -> str:
    """Return the size on disk and the compression."""
    import blosc2

    stored = np.array([file.stat().st_size for file in images])
    plain = np.array([blosc2.open(str(file)).nbytes for file in images])
    return f"{stored.mean() / MIB:.2f} MiB per case on disk, {stored.sum() / plain.sum():.0%} of its float32"


def make_dataset(folder: Path, volumes: int, *, processes: int = 1, shape: tuple[int, ...] = SHAPE) -> None:
    """Write CT-like volumes with a label, planned and preprocessed by nnU-Net's own command."""
    import SimpleITK as sitk  # not above: `gpu.py` measures pre-training where neither it nor nnU-Net is installed

    os.environ |= {f"nnUNet_{name}": str(folder / name) for name in ("raw", "preprocessed")}
    raw = folder / "raw" / SYNTHETIC
    for part in ("imagesTr", "labelsTr"):
        (raw / part).mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(volumes):
        tissue, structure = (gaussian_filter(random.normal(size=shape), 6) for _ in range(2))
        image = 300 * tissue / tissue.std() + random.normal(scale=20, size=shape)
        label = structure > np.quantile(structure, 0.97)  # of all intensities, for nnU-Net clips to those within it
        sitk.WriteImage(sitk.GetImageFromArray(image.astype(np.int16)), raw / f"imagesTr/case_{number}_0000.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(label.astype(np.uint8)), raw / f"labelsTr/case_{number}.nii.gz")
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "structure": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": volumes}))
    command = f"-m {ENTRY} -d 999 -c 3d_fullres -np {processes} -npfp {processes}"
    subprocess.run([sys.executable, *command.split()], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
