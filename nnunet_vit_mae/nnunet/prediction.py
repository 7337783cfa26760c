"""Images to predict, named as nnU-Net expects, and nnU-Net's own command to predict them."""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nnunet_vit_mae.errors import UserError, reader_reason, reading
from nnunet_vit_mae.imaging.channels import channels_by_case
from nnunet_vit_mae.imaging.volumes import read_geometry, read_image, refuse_large, without_warnings_of_itk
from nnunet_vit_mae.installation import nnunet_environment
from nnunet_vit_mae.nnunet.models import Model, refuse_damaged_weights
from nnunet_vit_mae.nnunet.plans import Plan
from nnunet_vit_mae.processes.guard import guarded
from nnunet_vit_mae.progress import progress_bar
from nnunet_vit_mae.storage.files import inside, link, read_json, write_json
from nnunet_vit_mae.storage.layout import IMAGE_NOTES
from nnunet_vit_mae.storage.limits import too_many_voxels
from nnunet_vit_mae.storage.stored_rows import StoredRows

NO_WORKERS = ("-npp", "0", "-nps", "0")  # nnU-Net then does everything in one process

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictionCase:
    """A case to predict: its name, and its images in the order of their channel numbers."""

    name: str
    images: tuple[Path, ...]


def find_prediction_cases(plan: Plan, images: Path, *, all_usable: bool = True) -> list[PredictionCase]:
    """Return the cases in a folder that is named as nnU-Net expects, sorted by name.

    Raises `UserError` if there are none, if a file has another name, if a case lacks a channel, or, where `all_usable`
    are needed, if an image cannot be read or has more voxels than the limit.
    """
    ending = plan.file_ending
    channels, misnamed = channels_by_case(images, ending)
    if misnamed:
        raise UserError(f"{misnamed[0]} is not named as nnU-Net expects (CASE_0000{ending}): rename or remove it.")
    if not channels:
        raise UserError(f"There are no images such as CASE_0000{ending} in {images}: check -i.")
    cases = [_prediction_case(plan, name, files) for name, files in channels.items()]
    if all_usable:
        refuse_large(image for case in cases for image in case.images)
    return cases


def find_reference(plan: Plan, case: str, references: Path) -> Path:
    """Return the reference segmentation of a case. Raises `UserError` if it is missing."""
    reference = inside(references, f"{case}{plan.file_ending}", source="A list of cases")
    if not reference.is_file():
        raise UserError(f"The case {case} has no reference segmentation {reference}: add it, or check the folder.")
    return reference


def refuse_turned_reference(case: PredictionCase, reference: Path) -> None:
    """Raise `UserError` if a reference has other voxels than its image, for example the same along another axis.

    The origin does not matter, as voxels are compared by their numbers; some tools do not keep it.
    """
    image = case.images[0]
    with reading(f"The case {case.name}"), without_warnings_of_itk():
        expected, found = read_geometry(image), read_geometry(reference)
    if difference := expected.difference(replace(found, origin=expected.origin)):
        raise UserError(
            f"{image} and {reference} differ in {difference}: resample the reference to the image, or correct the "
            "header that is wrong."
        )


def predict_cases(
    model: Model,
    images: Path,
    cases: Sequence[str],
    output: Path,
    *,
    links: Path,
    log: Path,
    device: str,
    probabilities: bool = False,
) -> None:
    """Predict some of the cases in a folder of images, except those that are whole in the output folder already.

    The images are linked into the folder `links`, which is removed afterwards. The output of nnU-Net's command is
    appended to `log`. Raises `UserError` if images are missing, and as `predict_folder` does.
    """
    endings = [model.plan.file_ending, *([".npz"] if probabilities else [])]
    for case in cases:
        _remove_if_cut_off(output / f"{case}{endings[0]}")
    if all((output / f"{case}{ending}").is_file() for case in cases for ending in endings):
        return
    images_of = {case.name: case.images for case in find_prediction_cases(model.plan, images, all_usable=False)}
    if missing := [case for case in cases if case not in images_of]:
        raise UserError(f"There are no images of the case {missing[0]} in {images}: add them.")
    refuse_large(image for case in cases for image in images_of[case])
    shutil.rmtree(links, ignore_errors=True)
    links.mkdir(parents=True)
    try:
        for image in (image for case in cases for image in images_of[case]):
            link(image, links / image.name)
        flags = [*(["--save_probabilities"] if probabilities else []), "--continue_prediction"]
        predict_folder(model, links, cases, output, log=log, device=device, flags=flags)
    finally:
        shutil.rmtree(links)


def _remove_if_cut_off(segmentation: Path) -> None:
    """Remove a segmentation that nnU-Net had not finished writing, the last file of a case, when it was stopped."""
    if segmentation.is_file():
        try:
            read_geometry(segmentation)  # which looks for the end of a NIfTI file
            if ".nii" not in segmentation.suffixes:
                read_image(segmentation)
        except Exception as error:  # noqa: BLE001 (each reader has errors of its own)
            reason = reader_reason(error)
            logger.info("%s is predicted again, because it cannot be read (%s)", segmentation.name, reason)
            segmentation.unlink()


def remove_outdated(plan: Plan, cases: Iterable[PredictionCase], output: Path) -> None:
    """Remove the segmentations of other images than today's, and note which images the next ones are made from.

    A scan may have been replaced, also by an older file, or have the name of a scan in another folder. Without a note,
    of an earlier version, a segmentation that is not older than its images is kept.
    """
    for case in cases:
        segmentation, note = output / f"{case.name}{plan.file_ending}", output / IMAGE_NOTES / case.name
        images = [[str(image), *_size_and_time(image)] for image in case.images]
        if note.is_file() and read_json(note) == images:
            continue
        if segmentation.is_file() and (note.is_file() or max(t for *_, t in images) > segmentation.stat().st_mtime_ns):
            logger.info("%s was removed, as it may be of images that have changed", segmentation.name)
            segmentation.unlink()
        write_json(images, note)


def _size_and_time(image: Path) -> tuple[int, int]:
    """Return bytes, and time in ns, of an image; zeros for a link to a file that is gone."""
    state = image.stat() if image.exists() else None
    return (state.st_size, state.st_mtime_ns) if state else (0, 0)


def predict_folder(
    model: Model, images: Path, cases: Iterable[str], output: Path, *, log: Path, device: str, flags: Sequence[str] = ()
) -> None:
    """Predict the cases in a folder of images with `nnUNetv2_predict`, and show its progress.

    One case gets no worker processes: there is nothing beside it to work on, and each takes seconds to start.

    The output of the command is appended to `log`. Raises `UserError` if it fails, or if a checkpoint is damaged or
    holds NaN, or code, which nnU-Net would run.
    """
    refuse_damaged_weights(model)
    ending = model.plan.file_ending
    expected = [output / f"{case}{ending}" for case in cases]
    workers = NO_WORKERS if len(expected) == 1 else ()
    _run([*model.command(images, output, device), *flags, *workers], expected, log)


def read_probabilities(file: Path, outputs: int) -> np.ndarray:
    """Read the probabilities of a case that nnU-Net has saved (outputs z y x); otherwise as `open_probabilities`."""
    with _reading_probabilities(file):
        return _stored(file, outputs).read()


def open_probabilities(file: Path, outputs: int) -> StoredRows:
    """Open the probabilities of a case that nnU-Net has saved, to read them in parts.

    Args:
        file: The `.npz` file.
        outputs: The outputs of the model.

    Returns:
        The probabilities (outputs z y x).

    Raises:
        UserError: If the file is damaged, or has another number of outputs or more voxels than the limit.
    """
    with _reading_probabilities(file):
        stored = _stored(file, outputs)
        stored.check()
        return stored


def _stored(file: Path, outputs: int) -> StoredRows:
    stored = StoredRows(file, "probabilities")
    if len(stored.shape) != 4 or stored.shape[0] != outputs:
        raise ValueError(f"it has the shape {stored.shape}, but the model has {outputs} outputs")
    if problem := too_many_voxels(stored.shape[1:]):
        raise ValueError(f"it {problem}")
    return stored


@contextmanager
def _reading_probabilities(file: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (damaged files raise many kinds)
        raise UserError(f"{file} cannot be read ({reader_reason(error)}): remove it and try again.") from None


def _run(command: Sequence[str], expected: Sequence[Path], log: Path) -> None:
    """Run nnU-Net's command, and count the expected files as they are written."""
    logger.info("$ %s", shlex.join(command))
    program = Path(sysconfig.get_path("scripts")) / command[0]

    def count() -> int:
        return sum(file.is_file() for file in expected)

    with log.open("a", encoding="utf-8") as stream, progress_bar(len(expected), unit="case", desc="predicting") as bar:
        stream.write(f"$ {shlex.join(command)}\n")
        stream.flush()
        places = {"stdout": stream, "stderr": stream}
        with guarded([program, *command[1:]], seconds=5.0, env=nnunet_environment(), **places) as process:
            while _is_running(process):
                bar.update(count() - bar.n)
        bar.update(count() - bar.n)
    if process.returncode or count() < len(expected):
        raise UserError(
            f"{command[0]} wrote {count()} of {len(expected)} predictions and ended with exit code "
            f"{process.returncode}: see {log} for the reason, fix it and try again."
        )


def _is_running(process: subprocess.Popen) -> bool:
    """Wait for a second at most, and return whether the process is still running."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    return process.returncode is None


def _prediction_case(plan: Plan, name: str, files: Mapping[int, Path]) -> PredictionCase:
    expected = range(len(plan.channel_names))
    if list(files) != list(expected):
        raise UserError(
            f"The case {name} has the channels {_numbers(files)}, but {plan.dataset.name} has {_numbers(expected)} "
            f"({', '.join(plan.channel_names)}): write zeros for contrasts that were not acquired, as "
            "mae3d_fill_contrasts does."
        )
    return PredictionCase(name, tuple(files.values()))


def _numbers(channels: Iterable[int]) -> str:
    return ", ".join(f"{channel:04d}" for channel in channels)
