"""Folders of images as nnU-Net wants them, and its own command to predict them."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.imaging.channels import channels_by_case
from nnunet_vit_mae.installation import trainers_folder
from nnunet_vit_mae.nnunet.plans import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionCase:
    """A case to predict: its images in the order of their channel numbers."""

    name: str
    images: tuple[Path, ...]


def find_prediction_cases(plan: Plan, images: Path) -> list[PredictionCase]:
    """The cases in a folder named as nnU-Net wants it, sorted by name.

    Raises `UserError` when there are none, or when one lacks a channel.
    """
    ending = plan.dataset_json["file_ending"]
    found, misnamed = channels_by_case(images, ending)
    if misnamed:
        raise UserError(f"{misnamed[0]} is not named as nnU-Net wants it (CASE_0000{ending}): rename or remove it.")
    if not found:
        raise UserError(f"There are no images such as CASE_0000{ending} in {images}: check -i.")
    return [_case(plan, name, files) for name, files in found.items()]


def find_reference(plan: Plan, case: str, references: Path) -> Path:
    """The reference segmentation of a case. Raises `UserError` when it is missing."""
    reference = references / f"{case}{plan.dataset_json['file_ending']}"
    if not reference.is_file():
        raise UserError(f"The case {case} has no reference segmentation {reference}: add it, or check the folder.")
    return reference


def predict(command: Sequence[str], files: Sequence[Path], log: Path) -> None:
    """Type `nnUNetv2_predict`, and count the files that it is to write as they come.

    Raises `UserError` when it fails; its output is in `log`.
    """
    logger.info("$ %s", shlex.join(command))
    program = Path(sysconfig.get_path("scripts")) / command[0]
    environment = dict(os.environ)
    own, others = str(trainers_folder()), environment.get("nnUNet_extTrainer", "")
    environment["nnUNet_extTrainer"] = os.pathsep.join(dict.fromkeys([*filter(None, others.split(os.pathsep)), own]))

    def count() -> int:
        return sum(file.is_file() for file in files)

    with log.open("a", encoding="utf-8") as stream, tqdm(total=len(files), unit="case", desc="predicting") as bar:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        process = subprocess.Popen([program, *command[1:]], env=environment, stdout=stream, stderr=stream)
        try:
            while _still_runs(process):
                if new := count() - bar.n:  # a bar in a job's log is a line for each update
                    bar.update(new)
        finally:
            process.terminate()
            process.wait()
        bar.update(count() - bar.n)
    if process.returncode or count() < len(files):
        raise UserError(
            f"{command[0]} gave {count()} of {len(files)} predictions and exit code {process.returncode}: "
            f"the reason is in {log}; mend it and try again."
        )


def _still_runs(process: subprocess.Popen) -> bool:
    """Whether a process has not ended after another second."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    return process.returncode is None


def _case(plan: Plan, name: str, files: Mapping[int, Path]) -> PredictionCase:
    if list(files) != list(range(len(plan.channel_names))):
        given, expected = (
            [f"{number:04d}" for number in numbers] for numbers in (files, range(len(plan.channel_names)))
        )
        raise UserError(
            f"The case {name} has the channels {', '.join(given)}, but {plan.dataset.name} has {', '.join(expected)} "
            f"({', '.join(plan.channel_names)}): write zeros for what was not acquired, as mae3d_fill_contrasts does."
        )
    return PredictionCase(name, tuple(files.values()))
