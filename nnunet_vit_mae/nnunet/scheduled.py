"""nnU-Net's trainer with a schedule and a seed from the plans: what all our trainers share."""

from __future__ import annotations

import os
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_vit_mae.datasets.split.files import SPLITS, read_fold
from nnunet_vit_mae.datasets.split.patients import separation_warning
from nnunet_vit_mae.errors import UserError, abbreviated, exit_on_user_error
from nnunet_vit_mae.imaging.description import DESCRIPTION, describe
from nnunet_vit_mae.nnunet.augmentation import repeatable
from nnunet_vit_mae.nnunet.checked_plans import check_plans
from nnunet_vit_mae.nnunet.checkpoints import optimiser_groups
from nnunet_vit_mae.nnunet.folds import refuse_no_fold
from nnunet_vit_mae.nnunet.mirroring import mirroring_of
from nnunet_vit_mae.nnunet.plans import schedule_of
from nnunet_vit_mae.nnunet.preprocessing import refuse_other_spacing
from nnunet_vit_mae.nnunet.stopping import StoppableTrainer
from nnunet_vit_mae.nnunet.tracked import TrackedTrainer
from nnunet_vit_mae.nnunet.wandb_tracker import check_wandb
from nnunet_vit_mae.storage.entries import read_entries
from nnunet_vit_mae.storage.files import write_json
from nnunet_vit_mae.storage.pickles import read_trained

CUDA = torch.device("cuda")
TRAINED_ON = "trained_on.json"  # in a fold's folder: the cases that its checkpoints have been trained on
VALIDATION_SHARE = 5  # nnU-Net's own 250 training iterations come with 50 of validation


class ScheduledTrainer(TrackedTrainer, StoppableTrainer):
    """nnU-Net's trainer with the length of its schedule, the axes to mirror and a seed from the plans.

    Runs with the same seed are equal to the digit on a CPU where nnU-Net augments in one process
    (`nnUNet_n_proc_DA=0`), interrupted or not. On a GPU, kernels add in an order of their own.
    """

    _trained_on: Collection[str] = ()  # until it is noted

    # nnU-Net reads the names of these parameters by introspection: any other signature is a KeyError there
    @exit_on_user_error
    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        planned = check_plans(
            plans, configuration, describe(dataset_json, DESCRIPTION), source="The file of the plans (-p)"
        )
        if nnUNet_preprocessed.is_set():
            folder = Path(str(nnUNet_preprocessed), plans["dataset_name"])
            _refuse_bad_fold(folder, planned.data_identifier, fold)
            manager = PlansManager(plans)
            refuse_other_spacing(folder / planned.data_identifier, manager, manager.get_configuration(configuration))
        check_wandb()
        super().__init__(plans, configuration, fold, dataset_json, device)
        schedule = schedule_of(self.configuration_manager)
        self.seed, self.mirroring = schedule.seed, schedule.mirroring
        self.num_epochs = schedule.epochs
        self.num_iterations_per_epoch = schedule.iterations
        self.num_val_iterations_per_epoch = max(1, self.num_iterations_per_epoch // VALIDATION_SHARE)

    @exit_on_user_error
    def initialize(self) -> None:
        """Seed all random numbers if the plans say so, then build the network and the rest as nnU-Net does.

        On a CPU the trainer uses as many threads as `OMP_NUM_THREADS` says.
        """
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        if self.device.type == "cpu" and threads.isdecimal():
            torch.set_num_threads(int(threads))  # nnUNetv2_train -device cpu has set one for each core
        self._seed_random_numbers()
        super().initialize()

    def _set_batch_size_and_oversample(self) -> None:
        # nnU-Net makes sure of foreground in the last third of a batch, rounded: never in a batch of one
        super()._set_batch_size_and_oversample()
        if self.batch_size == 1:
            self.probabilistic_oversampling = True

    def on_train_epoch_start(self) -> None:
        """Begin an epoch as nnU-Net does.

        Each epoch has random numbers of its own, so that a run that goes on after an interruption (`--c`) draws what
        one that was never interrupted draws.
        """
        self._seed_random_numbers(self.current_epoch + 1)
        super().on_train_epoch_start()

    def _seed_random_numbers(self, *place: int) -> None:
        """Seed all generators, if the plans have a seed, by it, the place in the run, and the process."""
        if self.seed < 0:
            return
        # each GPU draws other samples; DDP takes the weights from the first
        drawn = np.random.SeedSequence((self.seed, self.local_rank, *place)).generate_state(3)
        random.seed(int(drawn[0]))
        np.random.seed(drawn[1])  # noqa: NPY002 (nnU-Net draws from numpy's global generator)
        torch.manual_seed(int(drawn[2]))

    @exit_on_user_error
    def load_checkpoint(self, filename: str) -> None:
        """Load a checkpoint as nnU-Net does, which would run code in it: one with more than weights is refused."""
        file = Path(filename)
        optimiser_groups(read_trained(file), file)  # raises an error without them
        super().load_checkpoint(filename)

    def save_checkpoint(self, filename: str) -> None:
        """Save a checkpoint, and note which cases it has been trained on."""
        if self.local_rank == 0 and self._trained_on and not self.disable_checkpointing:
            write_json(sorted(self._trained_on), Path(filename).with_name(TRAINED_ON))
            self._trained_on = ()
        super().save_checkpoint(filename)

    @exit_on_user_error
    def do_split(self) -> tuple:
        """Return nnU-Net's split, unless the checkpoint in use was trained on cases to validate on.

        That happens when the splits are changed and the training goes on (`--c`, `--val`).
        """
        training, validation = super().do_split()
        if self.fold != "all" and (seen := sorted({*self._trained_on_before()} & {*validation})):
            raise UserError(
                f"{self.checkpoint_in_use} was trained on {len(seen)} of the cases that fold {self.fold} is validated "
                f"on ({abbreviated(seen)}), because {SPLITS} has been changed since: put that split back, or train "
                "without --c."
            )
        return training, validation

    def _trained_on_before(self) -> list[str]:
        """Return the cases that the checkpoint in use was trained on, as far as that is noted."""
        note = Path(self.output_folder, TRAINED_ON)
        if self.checkpoint_in_use is None or not note.is_file():  # a new training, or one of an earlier version
            return []
        return read_entries(list[str], note, "remove it")

    @exit_on_user_error
    def get_tr_and_val_datasets(self) -> tuple:
        """Return nnU-Net's datasets, and log a warning when cases of one patient are in both."""
        training, validation = super().get_tr_and_val_datasets()
        folder = Path(self.preprocessed_dataset_folder_base)
        self._trained_on = {*training.identifiers, *self._trained_on_before()}
        if self.fold != "all" and (warning := separation_warning(folder, training.identifiers, validation.identifiers)):
            self.print_to_log_file(f"WARNING: {warning}")
        return training, validation

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        """Return nnU-Net's ranges of augmentation, and the axes to mirror, in training as in prediction."""
        *ranges, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        mirroring = mirroring_of(self.mirroring, self.dataset_json["labels"])
        self.print_to_log_file(str(mirroring))
        axes = mirroring.of_patch(len(self.configuration_manager.patch_size))
        self.inference_allowed_mirroring_axes = axes
        return (*ranges, axes)

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> ComposeTransforms:
        """Return nnU-Net's augmentation; with a seed, one that repeats."""
        transform = cast(ComposeTransforms, nnUNetTrainer.get_training_transforms(*args, **kwargs))
        return repeatable(transform) if self.seed >= 0 else transform


def _refuse_bad_fold(folder: Path, data_identifier: str, fold: int | str) -> None:
    """Raise `UserError` as pre-training does for a fold that cannot be trained on.

    nnU-Net takes whatever `splits_final.json` holds, and splits at random where it has no such fold.
    """
    if fold == "all" or not (folder / data_identifier).is_dir():
        return
    cases = nnUNetDatasetBlosc2.get_identifiers(str(folder / data_identifier))
    if (folder / SPLITS).is_file():
        read_fold(folder / SPLITS, str(fold), cases)
    else:
        refuse_no_fold(str(fold), len(cases))
