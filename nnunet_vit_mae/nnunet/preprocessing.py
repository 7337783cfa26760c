"""Preprocessing of unlabelled images (`imagesUn` in the raw dataset) with nnU-Net's preprocessor and plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_vit_mae.errors import UserError, WriteError, reader_reason
from nnunet_vit_mae.imaging.channels import IMAGE_ENDINGS, case_and_channel, channels_by_case
from nnunet_vit_mae.imaging.volumes import all_finite, read_geometry, refuse_damaged, without_warnings_of_itk
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import Plan, load_plan, resampling_spacings
from nnunet_vit_mae.pretraining.volumes import open_volume
from nnunet_vit_mae.processes.workers import run_each
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import read_json, remove_unfinished, write_file, write_json
from nnunet_vit_mae.storage.layout import IMAGE_NOTES
from nnunet_vit_mae.storage.limits import too_many_voxels
from nnunet_vit_mae.storage.pickles import read_properties

STAMP = "made_with.json"  # what the files in the folder depend on; if it changes, they are made again
KILLED = "was being preprocessed when its process was killed, most likely because memory ran out: try a smaller -np"
BEFORE = "shape_after_cropping_and_before_resampling"  # nnU-Net's name among the properties of an image
FEW_CASES = 5
RESAMPLING = ("resample_data_or_seg_to_shape", "resample_torch_fornnunet")  # nnU-Net's, to the spacing of the plans
DATE_TOLERANCE = 2 * 10**9  # nanoseconds; some file systems round dates to 2 s

RawCase = tuple[str, list[Path]]  # a name, and the files in the order of their channel numbers
FileStates = list[tuple[str, int, int]]  # name, size, date in ns


@dataclass(frozen=True)
class Outcome:
    """What became of one case; `problem` is None if its preprocessed file was written."""

    case: str
    problem: str | None = None


def raw_unlabelled_cases(plan: Plan) -> dict[str, list[Path]]:
    """Return the files of each case in `imagesUn` in the order of their channel numbers; the folder may be missing."""
    cases, _ = channels_by_case(plan.dataset.unlabelled_images, plan.file_ending)
    return {case: list(channels.values()) for case, channels in cases.items()}


def preprocess_unlabelled(plan: Plan, processes: int) -> tuple[int, Iterator[Outcome]]:
    """Preprocess the cases that are not preprocessed yet, in several processes.

    A case that cannot be read, does not match the plans, or whose process is killed has an outcome with the reason and
    does not stop the others. What others were writing to the folder is removed: hold `locked(plan.unlabelled_folder)`
    until the last outcome.

    Returns:
        The number of cases to preprocess, and their outcomes as they are done.

    Raises:
        UserError: If there are no unlabelled images.
    """
    cases = raw_unlabelled_cases(plan)
    if not cases:
        raise UserError(
            f"There are no images such as CASE_0000{plan.file_ending} "
            f"in {plan.dataset.unlabelled_images}: put the unlabelled images there, named as in imagesTr."
        )
    _remove_if_made_with_other_plans(plan)
    remove_unfinished(plan.unlabelled_folder)
    to_do = {case: files for case, files in cases.items() if not _is_done(plan, case, files)}
    preprocess = partial(_preprocess_case, plan.dataset.name, plan.plans_name, plan.name)
    results = run_each(preprocess, to_do.items(), processes)
    return len(to_do), (outcome or Outcome(case, KILLED) for (case, _), outcome in results)


def preprocessed_pool(plan: Plan) -> tuple[list[Path], list[str]]:
    """Return the files of the preprocessed unlabelled pool, and the cases in `imagesUn` that are not preprocessed yet.

    A preprocessed file whose raw images were removed is left out. If the raw dataset is not available, as on some
    compute nodes, all preprocessed files are used. Raises `UserError` if the pool was preprocessed with other plans.
    """
    if not plan.unlabelled_folder.is_dir():
        return [], sorted(raw_unlabelled_cases(plan))
    if not _pool_is_current(plan):
        raise UserError(
            f"The unlabelled images in {plan.unlabelled_folder} were preprocessed with other plans: "
            f"run mae3d_preprocess {plan.flags_text} again."
        )
    if not plan.dataset.unlabelled_images.is_dir():
        return sorted(file for file in plan.unlabelled_folder.glob("*.b2nd") if not file.name.startswith(".")), []
    cases = raw_unlabelled_cases(plan)
    done = {case for case, files in cases.items() if _is_done(plan, case, files)}
    return [_output_file(plan, case) for case in sorted(done)], sorted(set(cases) - done)


def _preprocess_case(dataset: str, plans_name: str, configuration: str, raw_case: RawCase) -> Outcome:
    """Preprocess one case and save it, usually in a process of its own."""
    case, files = raw_case
    plan = load_plan(find_dataset(dataset), plans_name, configuration)
    try:
        # readers, numpy and resampling raise errors of their own, and one bad file must not stop thousands of others
        problem = _find_channel_problem(plan, files) or _preprocess_files(plan, case, files)
    except WriteError:  # a full disk is nothing about this case, and stops the others too
        raise
    except Exception as error:  # noqa: BLE001
        problem = f"cannot be preprocessed: {reader_reason(error)}"
    return Outcome(case, problem)


def _find_channel_problem(plan: Plan, files: list[Path]) -> str | None:
    """Compare the channel numbers in the names of the files with the channels in dataset.json."""
    ending = plan.file_ending
    numbers = [f"{case_and_channel(file.name.removesuffix(ending))[1]:04d}" for file in files]
    expected = [f"{number:04d}" for number in range(len(plan.channel_names))]
    if numbers != expected:
        return f"has the channels {', '.join(numbers)}, but dataset.json has {', '.join(expected)}"
    return None


def _preprocess_files(plan: Plan, case: str, files: list[Path]) -> str | None:
    """Preprocess the files of a case and save the result; returns what is wrong with the images, if anything."""
    states = _states(files)  # before they are read
    with without_warnings_of_itk():
        for file in files:
            if file.name.endswith(IMAGE_ENDINGS):  # others have a geometry in a format of nnU-Net
                read_geometry(file)
                refuse_damaged(file)
    volume, properties = plan.plans.image_reader_writer_class().read_images([str(file) for file in files])
    if volume.shape[0] != len(plan.channel_names):
        return f"has {volume.shape[0]} channels in its files, but dataset.json has {len(plan.channel_names)}"
    if sum(side > 1 for side in volume.shape[1:]) < 2:
        return f"has {' x '.join(map(str, volume.shape[1:]))} voxels (z y x), which are neither a volume nor a slice"
    if problem := resampled_problem(plan, volume.shape[1:], properties["spacing"]):
        return problem
    if not all(all_finite(channel, file) for channel, file in zip(volume, files, strict=True)):
        return "holds voxels that are NaN or infinite"
    preprocessor = plan.configuration.preprocessor_class(verbose=False)
    volume, _, _ = preprocessor.run_case_npy(
        volume, None, properties, plan.plans, plan.configuration, plan.dataset_json
    )
    # a call that is killed here leaves a note without a file, and never one beside the file of another image
    _output_file(plan, case).unlink(missing_ok=True)
    write_json(states, _note_file(plan, case))
    _save(volume, plan, case)
    return None


def resampled_problem(plan: Plan, shape: Sequence[int], spacing: Sequence[float]) -> str | None:
    """Return why a case is too large at the spacing of the plans, None if it is not; shape and spacing are z y x."""
    sides = [shape[axis] for axis in plan.plans.transpose_forward]
    before, after = resampling_spacings(plan.plans, plan.configuration, spacing)
    resampled = [round(voxels * mm / new) for voxels, mm, new in zip(sides, before, after, strict=True)]
    if problem := too_many_voxels(resampled):
        own = " x ".join(f"{mm:.4g}" for mm in spacing)
        return f"has a spacing of {own} mm (z y x), so that at the spacing of the plans it {problem}"
    return None


def refuse_other_spacing(folder: Path, plans: PlansManager, configuration: ConfigurationManager) -> None:
    """Raise `UserError` if nnU-Net has preprocessed labelled images for another spacing than that of the plans.

    Plans of `mae3d_plan` share the folder of images with those that they were made from, and these may have been
    planned anew since. A few cases are looked at.
    """
    resampling = configuration.configuration["resampling_fn_data"]
    if configuration.preprocessor_name != "DefaultPreprocessor" or resampling not in RESAMPLING:
        return  # which may keep the images as they are
    for file in sorted(folder.glob("[!.]*.pkl"))[:FEW_CASES]:
        properties = read_properties(file)
        if not {"spacing", BEFORE} <= properties.keys():
            continue
        own, target = resampling_spacings(plans, configuration, properties["spacing"])
        expected = tuple(map(int, compute_new_shape(properties[BEFORE], own, target)))
        found = open_volume(file.with_suffix(".b2nd")).shape[1:]
        if found != expected:
            shapes = (" x ".join(map(str, shape)) for shape in (found, expected))
            raise UserError(
                "{}: {} has {} voxels, but {} at the spacing of the plans {}. The dataset was planned and preprocessed "
                "anew since they were written: write them again with mae3d_plan, or preprocess with them (nnUNetv2_"
                "preprocess -plans_name {}).".format(folder, file.stem, *shapes, plans.plans_name, plans.plans_name)
            )


def _save(volume: np.ndarray, plan: Plan, case: str) -> None:
    """Save a volume as nnU-Net saves its images, but without a segmentation and properties."""
    volume = volume.astype(np.float32, copy=False)
    blocks, chunks = comp_blosc2_params(volume.shape, plan.patch_size, volume.itemsize)
    cparams = {"codec": blosc2.Codec.LZ4HC, "filters": [blosc2.Filter.SHUFFLE], "clevel": 5, "nthreads": 1}
    compressed = blosc2.asarray(np.ascontiguousarray(volume), chunks=chunks, blocks=blocks, cparams=cparams)
    write_file(compressed.to_cframe(), _output_file(plan, case))  # by Python, which reports a full disk


def _output_file(plan: Plan, case: str) -> Path:
    return plan.unlabelled_folder / f"{case}.b2nd"


def _note_file(plan: Plan, case: str) -> Path:
    return plan.unlabelled_folder / IMAGE_NOTES / f"{case}.json"


def _states(files: list[Path]) -> FileStates:
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _is_done(plan: Plan, case: str, files: list[Path]) -> bool:
    """Return whether a case has a preprocessed file that was made from its images."""
    output, note = _output_file(plan, case), _note_file(plan, case)
    if not all(file.is_file() for file in files) or _find_channel_problem(plan, files):
        return False  # a link to nothing, or a channel that was removed: to be reported
    states = _states(files)
    if not output.is_file() or output.stat().st_mtime_ns < max(date for *_, date in states):
        return False
    return not note.is_file() or not _replaced(read_entries(FileStates, note, "remove it"), states)  # earlier versions


def _replaced(before: FileStates, now: FileStates) -> bool:
    """Return whether images took the place of others: such a file can be older, but a mere copy is not."""
    return len(before) != len(now) or any(
        (name, size) != (new_name, new_size) or new_date < date - DATE_TOLERANCE
        for (name, size, date), (new_name, new_size, new_date) in zip(before, now, strict=True)
    )


def _remove_if_made_with_other_plans(plan: Plan) -> None:
    """Remove files that were made with other plans: spacing, normalisation or intensities may differ."""
    if not _pool_is_current(plan):
        for file in plan.unlabelled_folder.glob("*.b2nd"):
            file.unlink()
        write_json(_stamp(plan), plan.unlabelled_folder / STAMP)


def _pool_is_current(plan: Plan) -> bool:
    """Return whether the pool was preprocessed with these plans."""
    stamp = plan.unlabelled_folder / STAMP
    return stamp.is_file() and read_json(stamp) == _stamp(plan)


def _stamp(plan: Plan) -> dict[str, Any]:
    """Everything that nnU-Net's preprocessing of an image depends on."""
    keys = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name")
    keys += ("resampling_fn_data", "resampling_fn_data_kwargs")
    plan_values = {
        "transpose_forward": plan.plans.transpose_forward,
        "image_reader_writer": plan.plans.plans["image_reader_writer"],
        "intensities": plan.plans.foreground_intensity_properties_per_channel,
    }
    return {key: plan.configuration.configuration[key] for key in keys} | plan_values
