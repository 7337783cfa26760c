"""From a dataset's plans to a pre-trained encoder with its card."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import torch

from nnunet_vit_mae.errors import UserError, abbreviated
from nnunet_vit_mae.installation import package_versions
from nnunet_vit_mae.networks.memory import pretraining_memory
from nnunet_vit_mae.networks.precision import has_bf16
from nnunet_vit_mae.nnunet.capacity import VOXEL_BYTES, free_memory_of, memory_of, refuse_step_beyond
from nnunet_vit_mae.nnunet.folds import PreprocessedCase, pretraining_cases
from nnunet_vit_mae.nnunet.plans import Plan, refuse_cascade, settings_for
from nnunet_vit_mae.nnunet.preprocessing import refuse_other_spacing
from nnunet_vit_mae.nnunet.wandb_tracker import check_wandb, wandb_tracker
from nnunet_vit_mae.planning import refuse_useless_masks
from nnunet_vit_mae.pretraining import distributed
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.readers import READY_BATCHES
from nnunet_vit_mae.pretraining.run import PretrainingResult, run
from nnunet_vit_mae.pretraining.saved_state import what_is_kept
from nnunet_vit_mae.pretraining.volumes import ITEM, Cache, DeviceCache, bytes_in_half_precision, volume_problems
from nnunet_vit_mae.processes.memory import refuse_without_shared_memory
from nnunet_vit_mae.settings import Pretraining, Settings
from nnunet_vit_mae.storage.files import locked, short_hash
from nnunet_vit_mae.storage.layout import encoder_file
from nnunet_vit_mae.tracking import wants_tensorboard
from nnunet_vit_mae.units import size_text
from nnunet_vit_mae.weights import Card, hashed_name, is_saved, save_encoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The hardware that a pre-training may use."""

    device: torch.device
    processes: int = 1  # which divide each batch among them
    readers: int | None = None  # of each process
    cache_bytes: int = 0  # of memory for volumes

    @property
    def devices(self) -> list[torch.device]:
        """Return the devices of the processes that this one starts, as far as there are such, or its own."""
        if self.device.type != "cuda" or self.processes == 1:
            return [self.device]
        found = min(self.processes, torch.cuda.device_count())  # too few are refused where the processes start
        return [torch.device("cuda", number) for number in range(found)] or [self.device]

    @property
    def local_processes(self) -> int:
        """Return the number of processes on this machine, under torchrun too."""
        return max(self.processes, distributed.local_process_count())

    @property
    def all_processes(self) -> int:
        """Return the number of processes on all machines."""
        return max(self.processes, distributed.process_count())

    @property
    def readers_of_each(self) -> int:
        """Return the readers of each process: as given, else up to 8 for a GPU, and none on a CPU (the loop reads)."""
        if self.readers is not None:
            return self.readers
        return max(1, min(8, joblib.cpu_count() // self.local_processes)) if self.device.type == "cuda" else 0


def pretrain(
    plan: Plan,
    fold: str = "all",
    *,
    machine: Machine,
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    adaptive: bool = False,
) -> Path:
    """Pre-train an encoder on the training cases of a fold and the unlabelled pool.

    An earlier run in the same place is moved aside, never overwritten.

    Args:
        plan: Plans of a preprocessed dataset; see `load_plan`.
        fold: Number of a fold, or `all`.
        machine: The hardware to use.
        changes: Settings of `pretraining` that replace those of the plans; `lr` is the peak learning rate.
        resume: Continue from the last saved state, if there is one.
        adaptive: Take each contrast on its own, even if the plans do not say so.

    Returns:
        The file of the encoder, for `load_encoder`.

    Raises:
        UserError: For every mistake that the user can correct.

    Example:
        >>> from nnunet_vit_mae import load_plan
        >>> changes = {"epochs": 1, "batch_size": 2, "lr": 1e-3}
        >>> file = pretrain(load_plan("901", "Tiny"), changes=changes, machine=Machine(device=torch.device("cpu")))
        >>> file.relative_to(load_plan("901").dataset.results).as_posix()
        'mae3d_pretrain__Tiny__3d_fullres/fold_all/encoder.safetensors'
    """
    refuse_cascade(plan.configuration)
    check_wandb()
    wants_tensorboard()  # raises what is wrong with the switch before anything is written
    machine = replace(machine, device=distributed.own_device(machine.device))
    settings = _settings(plan, adaptive=adaptive)
    cases = pretraining_cases(plan, fold)
    job = PretrainingJob(
        files=[case.file for case in cases],
        channel_names=plan.channel_names,
        patch_size=plan.patch_size,
        spacing=tuple(map(float, plan.configuration.spacing)),
        network=settings.network,
        protocol=_protocol(settings, changes or {}),
    )
    _refuse_indivisible(job.protocol, machine.all_processes)
    refuse_useless_masks(job.network, job.protocol, job.patch_size)
    _refuse_large_step(job, machine)
    _refuse_damaged(plan, cases)
    refuse_other_spacing(plan.preprocessed_folder, plan.plans, plan.configuration)
    file = encoder_file(plan.dataset.results, plan.plans_name, plan.name, fold)
    on_device = bool(machine.cache_bytes) and machine.device.type == "cuda" and _fits_on_device(job, machine)
    if on_device:
        machine = replace(machine, readers=0)
    if not machine.cache_bytes:
        refuse_without_shared_memory(_ready_batches(machine), _batch_bytes(job, machine, VOXEL_BYTES))
    with _cache(job, machine) if machine.cache_bytes and not on_device else nullcontext() as cache:
        task = partial(
            _make_encoder, replace(job, cache=cache), partial(_card, plan, fold, job, cases), file, resume=resume,
            readers=machine.readers_of_each, on_device=on_device,
        )  # fmt: skip
        try:
            distributed.start(task, machine.device, machine.processes)
        except distributed.LostProcessError as lost:
            raise UserError(f"{lost} {what_is_kept(file.parent)}") from None
    return file


def _settings(plan: Plan, *, adaptive: bool) -> Settings:
    """Return the settings of the network to pre-train. Raises `UserError` for plans whose encoder is trained."""
    settings = plan.settings
    if adaptive or settings.network.adaptive:
        settings = settings_for(plan.configuration, len(plan.channel_names), adaptive=True)
    if settings.encoder.file:
        raise UserError(
            f"The plans {plan.plans_name} start from the encoder {settings.encoder.file}, which is trained "
            "already: go on with nnUNetv2_train, or write plans without --encoder to pre-train one."
        )
    return settings


def _protocol(settings: Settings, changes: Mapping[str, Any]) -> Pretraining:
    others = {name: value for name, value in changes.items() if name != "lr"}
    protocol = settings.updated({"pretraining": others}).pretraining
    return protocol.with_lr(changes["lr"]) if "lr" in changes else protocol


def _refuse_indivisible(protocol: Pretraining, parts: int) -> None:
    """Raise `UserError` for a batch that a number of processes cannot divide among them."""
    if protocol.reads % parts:
        whole = parts * protocol.samples_per_read
        raise UserError(
            f"A batch of {protocol.batch_size} samples cannot be divided among {parts} processes: "
            f"give a --batch_size that is a multiple of {whole}, or start another number of processes."
        )


def _refuse_large_step(job: PretrainingJob, machine: Machine) -> None:
    batch, channels = job.protocol.batch_size // machine.all_processes, len(job.channel_names)
    refuse_step_beyond(
        min(map(memory_of, machine.devices)),
        "the GPU" if machine.device.type == "cuda" else "this machine",
        shape=(batch, channels, *job.patch_size),
        estimate=partial(_step_bytes, job, machine),
        advice="give a smaller --batch_size, or plan with a smaller --size or a larger --token",
    )


def _step_bytes(job: PretrainingJob, machine: Machine) -> int:
    """Return about how much memory a step takes on each device."""
    batch, channels = job.protocol.batch_size // machine.all_processes, len(job.channel_names)
    half = has_bf16(machine.device)
    return pretraining_memory(job.network, job.protocol, job.patch_size, channels, batch, on_gpu=half)


def _fits_on_device(job: PretrainingJob, machine: Machine) -> bool:
    """Return whether the volumes are to be cached on the GPU; if not, say why in the log."""
    needed = bytes_in_half_precision(job.files)
    free = min(map(free_memory_of, machine.devices))
    room = (free - _step_bytes(job, machine)) // 2  # libraries and fragments take some too
    if job.network.adaptive or job.protocol.skip_background:
        reason = "masks depend on the voxels of a crop, which readers look at"
    elif needed > min(room, machine.cache_bytes):
        limit = "the GPU has room for" if room < machine.cache_bytes else "--cache allows"
        reason = f"they take {size_text(needed)}, and {limit} {size_text(max(0, min(room, machine.cache_bytes)))}"
    else:
        return True
    logger.info("The volumes are cached in the memory of this machine and not on the GPU: %s.", reason)
    return False


def _refuse_damaged(plan: Plan, cases: list[PreprocessedCase]) -> None:
    """Raise `UserError` unless all volumes can be read, so that a long run does not end at one of them."""
    problems = volume_problems([case.file for case in cases], len(plan.channel_names))
    if problems:
        bad = abbreviated(f"{file} {problem}" for file, problem in problems.items())
        commands = []
        if any(file.parent != plan.unlabelled_folder for file in problems):
            commands.append(plan.preprocessing_command)
        if any(file.parent == plan.unlabelled_folder for file in problems):
            commands.append(f"mae3d_preprocess {plan.flags_text}")
        raise UserError(f"{bad}: remove what is damaged and run {' and '.join(commands)} again.")


def _cache(job: PretrainingJob, machine: Machine) -> Cache:
    """Make a cache that leaves room in shared memory for the batches that readers have ready."""
    copies = distributed.local_process_count()  # torchrun's processes have no common memory
    spare = _ready_batches(machine) * _batch_bytes(job, machine, ITEM)
    return Cache(job.files, machine.cache_bytes, copies=copies, spare=spare)


def _ready_batches(machine: Machine) -> int:
    return machine.local_processes * machine.readers_of_each * READY_BATCHES


def _batch_bytes(job: PretrainingJob, machine: Machine, voxel_bytes: int) -> int:
    """Return the size of the crops that a process takes for a step."""
    crop = len(job.channel_names) * math.prod(job.patch_size) * voxel_bytes
    return job.protocol.reads * job.protocol.crops_per_volume // machine.all_processes * crop


def _make_encoder(
    job: PretrainingJob,
    card: Callable[[PretrainingResult], Card],
    file: Path,
    device: torch.device,
    *,
    resume: bool,
    readers: int,
    on_device: bool,
) -> None:
    """Run one process of a pre-training; rank 0 holds the folder and writes."""
    with ExitStack() as held:
        distributed.from_rank_0(lambda: held.enter_context(locked(file.parent)))
        if on_device:
            job = replace(job, cache=DeviceCache(job.files, device))
        result = run(job, file.parent, device=device, resume=resume, readers=readers, more_trackers=wandb_tracker)
        # of a run that was complete: with another card it would be another file, which plans that name it refuse
        if distributed.is_rank_0() and not is_saved(result.network.encoder, file):
            save_encoder(result.network.encoder, card(result), file)


def _card(plan: Plan, fold: str, job: PretrainingJob, cases: list[PreprocessedCase], result: PretrainingResult) -> Card:
    return Card(
        size=job.network.size,
        token=list(job.network.token),
        adaptive=job.network.adaptive,
        modality_vectors=job.network.modality_vectors,
        channel_names=list(job.channel_names),
        dataset=plan.dataset.name,
        plans=plan.plans_name,
        configuration=plan.name,
        fold=fold,
        patch_size=list(job.patch_size),
        spacing=list(job.spacing),
        normalization=plan.configuration.normalization_schemes,
        data_fingerprint=_fingerprint(cases),
        cases_seen=[hashed_name(case.name) for case in cases],
        epochs=job.protocol.epochs,
        steps=job.steps,
        loss=result.losses[-1],
        pretraining=job.protocol.to_dict(),
        seed=job.protocol.seed,
        data_licence=plan.licence,
        packages=package_versions(),
        network=job.network.encoder_settings,
        transpose_forward=list(plan.plans.transpose_forward),
    )


def _fingerprint(cases: list[PreprocessedCase]) -> str:
    """Return a hash over names and sizes of the preprocessed files; it changes with cases and preprocessing."""
    listing = "\n".join(f"{case.name} {case.file.stat().st_size}" for case in cases)
    return short_hash(listing, 16)
