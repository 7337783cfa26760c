"""Unlabelled images (`imagesUn` in the raw data set) through nnU-Net's own preprocessor and the data set's plans."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from nnunet_vit_mae.errors import UserError, reader_reason
from nnunet_vit_mae.files import read_json, remove_unfinished, replacing, write_json
from nnunet_vit_mae.imaging.channels import case_and_channel, channels_by_case
from nnunet_vit_mae.nnunet.folders import find_dataset
from nnunet_vit_mae.nnunet.plans import Plan, load_plan

STAMP = "made_with.json"  # what the files in the folder depend on; when it changes, they are made again


@dataclass(frozen=True)
class Outcome:
    """What became of one case; `problem` is None when its preprocessed file is there."""

    case: str
    problem: str | None = None


def raw_unlabelled_cases(plan: Plan) -> dict[str, list[Path]]:
    """Files of each case in `imagesUn`, in the order of their channel numbers; empty when there is no such folder."""
    found, _ = channels_by_case(plan.dataset.raw / "imagesUn", plan.dataset_json["file_ending"])
    return {case: list(channels.values()) for case, channels in found.items()}


def preprocess_unlabelled(plan: Plan, processes: int) -> tuple[int, Iterator[Outcome]]:
    """Preprocess what is not there yet; gives the number of cases to do, and their outcomes as they are done.

    A case that cannot be read or is not what the plans expect is named with its reason and stops none of the others.
    Raises `UserError` when there are no unlabelled images.
    """
    cases = raw_unlabelled_cases(plan)
    if not cases:
        raise UserError(
            f"There are no images such as CASE_0000{plan.dataset_json['file_ending']} "
            f"in {plan.dataset.raw / 'imagesUn'}: put the unlabelled images there, named as in imagesTr."
        )
    _forget_if_made_differently(plan)
    remove_unfinished(plan.unlabelled_folder)
    to_do = {case: files for case, files in cases.items() if not _is_done(plan, case, files)}
    return len(to_do), _run(plan, to_do, processes)


def preprocessed_pool(plan: Plan) -> tuple[list[Path], list[str]]:
    """Files of the preprocessed unlabelled pool, and the names of images in `imagesUn` that have none (yet).

    The raw images decide: what is no longer among them is left out. Where the raw data set is not at hand, as on some
    compute nodes, all preprocessed files are taken.
    Raises `UserError` when the pool was preprocessed with other plans.
    """
    if not plan.unlabelled_folder.is_dir():
        return [], sorted(raw_unlabelled_cases(plan))
    if not _made_with(plan):
        raise UserError(
            f"The unlabelled images in {plan.unlabelled_folder} were preprocessed with other plans: "
            f"run mae3d_preprocess -d {plan.dataset.id} -c {plan.name} -p {plan.plans.plans_name} again."
        )
    if not (plan.dataset.raw / "imagesUn").is_dir():
        return sorted(file for file in plan.unlabelled_folder.glob("*.b2nd") if not file.name.startswith(".")), []
    cases = raw_unlabelled_cases(plan)
    done = {case for case, files in cases.items() if _is_done(plan, case, files)}
    return [_output_file(plan, case) for case in sorted(done)], sorted(set(cases) - done)


def _run(plan: Plan, cases: dict[str, list[Path]], processes: int) -> Iterator[Outcome]:
    arguments = (plan.dataset.name, plan.plans.plans_name, plan.name)
    # processes that start afresh: nnU-Net's preprocessor has threads, which a fork does not carry over
    with ProcessPoolExecutor(min(processes, max(1, len(cases))), mp_context=get_context("spawn")) as pool:
        futures: dict[Future[str | None], str] = {
            pool.submit(_preprocess_case, *arguments, case, files): case for case, files in cases.items()
        }
        for future in as_completed(futures):
            try:
                yield Outcome(futures[future], future.result())
            except BrokenProcessPool:
                raise UserError(
                    "A preprocessing process was killed, most likely for lack of memory; what was done is kept: "
                    "run the command again with fewer processes (-np)."
                ) from None


def _preprocess_case(dataset: str, plans_name: str, configuration: str, case: str, files: list[Path]) -> str | None:
    """Preprocess one case and save it; gives the reason when that is impossible. Runs in a process of its own."""
    plan = load_plan(find_dataset(dataset), plans_name, configuration)
    expected = [f"{number:04d}" for number in range(len(plan.channel_names))]
    ending = plan.dataset_json["file_ending"]
    found = [f"{case_and_channel(file.name.removesuffix(ending))[1]:04d}" for file in files]
    if found != expected:
        return f"has the channels {', '.join(found)}, but dataset.json has {', '.join(expected)}"
    try:
        # readers, numpy and resampling each have errors of their own, and whatever is wrong with one
        # hospital file, the thousands of others must be done: the reason goes to the user by name
        volume, properties = plan.plans.image_reader_writer_class().read_images([str(file) for file in files])
        if volume.shape[0] != len(expected):
            return f"has {volume.shape[0]} channels in its files, but dataset.json has {len(expected)}"
        if not np.isfinite(volume).all() or any(_nifti_holds_nan(file) for file in files):
            return "holds voxels that are NaN or infinite"
        preprocessor = plan.configuration.preprocessor_class(verbose=False)
        volume, _, _ = preprocessor.run_case_npy(
            volume, None, properties, plan.plans, plan.configuration, plan.dataset_json
        )
        _save(volume, plan, case)
    except Exception as error:  # noqa: BLE001
        return f"cannot be preprocessed: {reader_reason(error)}"
    return None


def _nifti_holds_nan(file: Path) -> bool:
    """Ask the file itself: ITK, which reads for nnU-Net, turns NaN in a NIfTI into zeros without a word."""
    if ".nii" not in file.suffixes:
        return False
    image = nibabel.load(file)
    return image.get_data_dtype().kind == "f" and not np.isfinite(np.asanyarray(image.dataobj)).all()


def _save(volume: np.ndarray, plan: Plan, case: str) -> None:
    """As nnU-Net stores its images, but without a segmentation and its properties."""
    volume = volume.astype(np.float32, copy=False)
    blocks, chunks = comp_blosc2_params(volume.shape, plan.patch_size, volume.itemsize)
    cparams = {"codec": blosc2.Codec.LZ4HC, "filters": [blosc2.Filter.SHUFFLE], "clevel": 5, "nthreads": 1}
    with replacing(_output_file(plan, case)) as temporary:
        blosc2.asarray(
            np.ascontiguousarray(volume),
            urlpath=str(temporary),
            mode="w",
            chunks=chunks,
            blocks=blocks,
            cparams=cparams,
        )


def _output_file(plan: Plan, case: str) -> Path:
    return plan.unlabelled_folder / f"{case}.b2nd"


def _is_done(plan: Plan, case: str, files: list[Path]) -> bool:
    """A file is whole or not there; one that is older than its images is made again."""
    output = _output_file(plan, case)
    return output.is_file() and output.stat().st_mtime >= max(file.stat().st_mtime for file in files)


def _forget_if_made_differently(plan: Plan) -> None:
    """Remove what was made with other plans: spacing, normalisation or intensities may differ from those of today."""
    if not _made_with(plan):
        for file in plan.unlabelled_folder.glob("*.b2nd"):
            file.unlink()
        write_json(_stamp(plan), plan.unlabelled_folder / STAMP)


def _made_with(plan: Plan) -> bool:
    """Whether the pool was preprocessed with these plans."""
    stamp = plan.unlabelled_folder / STAMP
    return stamp.is_file() and read_json(stamp) == _stamp(plan)


def _stamp(plan: Plan) -> dict[str, Any]:
    """All that nnU-Net's preprocessing of an image depends on."""
    keys = ("spacing", "normalization_schemes", "use_mask_for_norm", "preprocessor_name")
    keys += ("resampling_fn_data", "resampling_fn_data_kwargs")
    of_plans = {
        "transpose_forward": plan.plans.transpose_forward,
        "image_reader_writer": plan.plans.plans["image_reader_writer"],
        "intensities": plan.plans.foreground_intensity_properties_per_channel,
    }
    return {key: plan.configuration.configuration[key] for key in keys} | of_plans
