"""The trainers: nnU-Net's own loss, augmentation, sampling, validation and prediction around a ViT.

The plans choose the network and the schedule; the classes differ in behaviour only. nnU-Net rebuilds a network at
prediction from the plans and the trainer's name, so `build_network_architecture` depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.datasets.split.files import parent_fold
from nnunet_vit_mae.errors import UserError, exit_on_user_error
from nnunet_vit_mae.hub import local_file
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.segmenter import Segmenter, prior_logits, start_from
from nnunet_vit_mae.nnunet.absence import keeping_absence
from nnunet_vit_mae.nnunet.augmentation import BatchAugmentation
from nnunet_vit_mae.nnunet.checkpoints import refuse_network_of_other_folds, refuse_other_network
from nnunet_vit_mae.nnunet.plans import channel_names, destination, refuse_cascade, settings_for
from nnunet_vit_mae.nnunet.scheduled import CUDA, ScheduledTrainer
from nnunet_vit_mae.optimisation import WarmupCosine, parameter_groups
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import BLOCK, EncoderFile, Settings
from nnunet_vit_mae.storage.layout import dataset_id, encoder_file
from nnunet_vit_mae.storage.pickles import read_trained
from nnunet_vit_mae.transfer import adapt_encoder
from nnunet_vit_mae.weights import Card, file_hash, read_encoder


class nnUNetTrainerBaseline(ScheduledTrainer):  # noqa: N801 (the names that users type follow nnU-Net)
    """nnU-Net's U-Net with as many steps as the ViT gets, mirrored along the same axes: the fair comparison."""

    norm_name = "gradient norm (clipped to 12)"

    def configure_optimizers(self) -> tuple:
        """Return nnU-Net's optimizer, which notes the norm of its gradients, and its schedule."""
        optimizer, schedule = super().configure_optimizers()
        optimizer.register_step_pre_hook(self._note_norm)  # not called where nnU-Net's fp16 skips a step
        return optimizer, schedule

    def _note_norm(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(nn.utils.clip_grad_norm_(parameters, math.inf))  # infinity leaves them as they are


class nnUNetTrainerViTScratch(ScheduledTrainer):  # noqa: N801
    """The ViT from random weights."""

    adaptive = False  # all channels of a volume are stacked in its tokens
    layer_decay = 1.0  # random blocks have nothing to keep: all of them learn at the full rate, from the start
    freeze_epochs = 0

    @exit_on_user_error
    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        refuse_cascade(self.configuration_manager)
        channels = len(channel_names(self.dataset_json))
        self.settings: Settings = settings_for(self.configuration_manager, channels, adaptive=self.adaptive)
        # nnU-Net writes these plans beside the weights, which then load whatever a later default is
        self.plans_manager.plans["configurations"][configuration][BLOCK] = self.settings.to_dict()
        self.enable_deep_supervision = self.settings.network.decoder == "unet"  # the others have one output
        self.initial_lr = self.settings.finetuning.lr
        self.weight_decay = self.settings.finetuning.weight_decay
        self.augment: BatchAugmentation | None = None
        self.pretrained: set[str] = set()  # names of weights that an encoder has brought
        self.steps_done = 0  # in this epoch
        self.grad_scaler = None  # fp16 only needs one, and the network runs in bf16

    @classmethod  # nnU-Net's own is static and is called on the class alike
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Build the network that the plans describe; the decoder `unet` is built around nnU-Net's own U-Net."""
        settings = settings_for(configuration_manager, num_input_channels, adaptive=cls.adaptive)
        unet = partial(
            nnUNetTrainer.build_network_architecture,
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        return build_segmenter(
            settings.network,
            num_input_channels,
            num_output_channels,
            drop_path=settings.finetuning.drop_path,
            spacing=tuple(map(float, configuration_manager.spacing)),
            unet=unet,
        )

    @exit_on_user_error
    def initialize(self) -> None:
        """Build the network as nnU-Net does. It starts by holding most voxels for background."""
        super().initialize()
        if prior := self.settings.finetuning.foreground_prior:
            labels = self.label_manager
            logits = prior_logits(labels.num_segmentation_heads, prior, regions=labels.has_regions)
            start_from(self.segmenter.decoder.heads, logits)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the outputs at lower resolutions, which only the decoder `unet` has."""
        if self.enable_deep_supervision:
            self.segmenter.decoder.deep_supervision = enabled

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, WarmupCosine]:
        """Return AdamW with layer-wise rates, and a schedule of warm-up and cosine per step."""
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.initial_lr, fused=fused)
        schedule = WarmupCosine(
            optimizer,
            self.initial_lr,
            warmup=self.settings.finetuning.warmup,
            epochs=self.num_epochs,
            steps_per_epoch=self.num_iterations_per_epoch,
            freeze_epochs=self.freeze_epochs,
        )
        return optimizer, schedule

    def _parameter_groups(self) -> list[dict]:
        return parameter_groups(
            self.segmenter.named_parameters(),
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            depth=SIZES[self.settings.network.size].depth,
            pretrained=self.pretrained,
        )

    def on_train_start(self) -> None:
        """Begin as nnU-Net does, unless its plans would change the network of other folds of this model."""
        refuse_network_of_other_folds(Path(self.output_folder), self.configuration_name, self.settings.network)
        super().on_train_start()

    def loaded_patch_size(self) -> Sequence[int]:
        """Return the voxels along each axis of what the loaders hand over: enlarged patches, if the step augments."""
        if self.settings.finetuning.augmentation == "loader":
            return super().loaded_patch_size()
        *_, enlarged, _ = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(self)
        return [int(side) for side in enlarged]

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """Return nnU-Net's augmentation, or nothing where `train_step` does it; absent contrasts stay zero."""
        transform = super().get_training_transforms(*args, **kwargs)
        dropout = self.settings.finetuning.contrast_dropout
        if self.settings.finetuning.augmentation == "loader":
            return keeping_absence(transform, dropout=dropout)
        manager = self.label_manager
        labels = [*manager.all_labels, *([manager.ignore_label] if manager.has_ignore_label else [])]
        self.augment = BatchAugmentation(transform, labels, contrast_dropout=dropout)
        return ComposeTransforms([])

    def _do_i_compile(self) -> bool:
        # shapes change with the number of contrasts, so that an adaptive network would be compiled over and over
        return not self.adaptive and super()._do_i_compile()

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.settings.finetuning.loss == "dice":
            (loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss).weight_ce = 0
        return loss

    @exit_on_user_error
    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load a checkpoint (`--c`, `--val`); say what differs if it is of another network.

        Which weights are pre-trained is in the checkpoint; layer-wise rates and weight decay are those of the plans.
        """
        if not self.was_initialized:
            self.initialize()
        if isinstance(filename_or_checkpoint, str):
            file = Path(filename_or_checkpoint)
            refuse_other_network(read_trained(file), file, self.segmenter, self.optimizer, self.settings)
        super().load_checkpoint(filename_or_checkpoint)
        names = {id(parameter): name for name, parameter in self.segmenter.named_parameters()}
        groups = self.optimizer.param_groups
        self.pretrained = {names[id(p)] for group in groups if group["pretrained"] for p in group["params"]}
        for group, planned in zip(groups, self._parameter_groups(), strict=True):
            group.update({name: planned[name] for name in ("lr_scale", "weight_decay")})

    def on_train_epoch_start(self) -> None:
        """Begin an epoch as nnU-Net does, at its first step."""
        self.steps_done = 0
        super().on_train_epoch_start()

    def take_step(self, batch: dict) -> dict:
        """Take nnU-Net's step with the plans' gradient clipping, and without its fp16."""
        self.lr_scheduler.step(self.current_epoch, self.steps_done)
        self.steps_done += 1
        volume, target = self._on_device(batch["data"]), self._on_device(batch["target"])
        if self.augment:
            volume, target = self.augment(volume, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.network(volume), target)
        loss.backward()
        moving = [p for group in self.optimizer.param_groups if group["lr"] > 0 for p in group["params"]]
        self.norms.append(nn.utils.clip_grad_norm_(moving, self.settings.finetuning.gradient_clip))
        self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}

    def _on_device(self, part: torch.Tensor | list[torch.Tensor]) -> Any:
        """Return what a batch holds on the device: a tensor, or one for each resolution."""
        if isinstance(part, list):
            return [self._on_device(one) for one in part]
        return part.to(self.device, non_blocking=True)

    @property
    def segmenter(self) -> Segmenter:
        """Return our network from what nnU-Net has wrapped around it."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        if isinstance(network, OptimizedModule):
            network = network._orig_mod
        return cast(Segmenter, network)

    def _set_batch_size_and_oversample(self) -> None:
        # the plans' own batch size is the U-Net's; this trainer's copy of the configuration is nobody else's
        self.configuration_manager.configuration["batch_size"] = self.settings.finetuning.batch_size
        super()._set_batch_size_and_oversample()


class nnUNetTrainerViTMAE(nnUNetTrainerViTScratch):  # noqa: N801
    """The ViT from an encoder that `mae3d_pretrain` made; without one it stops before any training."""

    encoder_card: Card | None = None
    takes_over_checkpoint = False

    @property
    def layer_decay(self) -> float:
        """Return the factor of the learning rate per block: earlier blocks keep more of what they have learned."""
        return self.settings.finetuning.layer_decay

    @property
    def freeze_epochs(self) -> int:
        """Return the epochs in which only the new weights learn, before the encoder may change."""
        return self.settings.finetuning.freeze_epochs

    @exit_on_user_error
    def initialize(self) -> None:
        """Build the network as nnU-Net does, then put the encoder in."""
        super().initialize()
        if not self.takes_over_checkpoint:
            self._load_encoder()

    @exit_on_user_error
    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Load a checkpoint (`--c`, `--val`). It has the encoder in it, so the encoder's own file may be gone."""
        self.takes_over_checkpoint = True
        super().load_checkpoint(filename_or_checkpoint)

    def get_tr_and_val_datasets(self) -> tuple:
        """Return nnU-Net's datasets, and log how many validation cases pre-training has seen."""
        training, validation = super().get_tr_and_val_datasets()
        card = self.encoder_card
        if card is not None and card.dataset != self.plans_manager.dataset_name:
            self.print_to_log_file(f"The encoder is from {card.dataset}: if that shares patients, they may be in it.")
        elif card is not None:
            seen, total = card.seen(validation.identifiers), len(validation.identifiers)
            if seen is None:
                origin = f"{card.origin}, fold {card.fold}" if card.fold else card.origin
                self.print_to_log_file(f"The card of the encoder does not tell which cases it has seen ({origin}).")
            else:
                self.print_to_log_file(
                    f"The encoder has seen the images (not the labels) of {len(seen)} of the {total} validation cases."
                )
            if seen and self.fold != "all" and card.fold != str(self.fold):
                self.print_to_log_file(f"For a validation on unseen images, run mae3d_pretrain with -f {self.fold}.")
        return training, validation

    def _load_encoder(self) -> None:
        file = self._find_encoder()
        tensors, card = read_encoder(file)
        place = destination(self.settings.network, self.plans_manager, self.configuration_manager, self.dataset_json)
        try:
            tensors, notes = adapt_encoder(tensors, card, place)
        except UserError as error:
            raise UserError(
                f"The encoder {file} does not fit these plans ({error}): "
                "pre-train with the same plans (mae3d_pretrain -p), or plan with its values (mae3d_plan --encoder)."
            ) from None
        own = self.segmenter.encoder.state_dict()
        self.segmenter.encoder.load_state_dict(own | tensors)
        self.encoder_card = card
        self.pretrained = {f"encoder.{name}" for name in tensors}
        self.optimizer, self.lr_scheduler = self.configure_optimizers()  # what is new learns at the full rate
        self.print_to_log_file(
            f"Loaded the encoder {file}: {len(tensors)} of {len(own)} tensors; "
            f"{card.origin}{'' if card.source else f' for {card.epochs} epochs, last loss {card.loss:.4f}'}."
        )
        for note in card.notes + notes:
            self.print_to_log_file(note)

    def _find_encoder(self) -> Path:
        """Return the plans' own encoder; without one, that of this fold, of its parent, or else of all images."""
        if self.settings.encoder.file:
            return _unchanged(self.settings.encoder)
        results = Path(self.output_folder_base).parent
        dataset, plans_name = self.plans_manager.dataset_name, self.plans_manager.plans_name
        own = str(self.fold)
        parent = parent_fold(Path(self.preprocessed_dataset_folder_base), own)
        for fold in dict.fromkeys((own, parent, "all")):
            file = encoder_file(results, plans_name, self.configuration_name, fold)
            if file.is_file():
                return file
        command = f"mae3d_pretrain -d {dataset_id(dataset)} -c {self.configuration_name} -p {plans_name}"
        scratch = nnUNetTrainerViTScratch
        if self.adaptive:
            command, scratch = f"{command} --adaptive", nnUNetTrainerAMAEScratch
        raise UserError(
            f"There is no pre-trained encoder for {dataset}, plans {plans_name}, {self.configuration_name}: "
            f"run {command} first, or train from random weights with -tr {scratch.__name__}."
        )


class nnUNetTrainerAMAE(nnUNetTrainerViTMAE):  # noqa: N801
    """Any number of contrasts per case: the adaptive UNETR of AMAE (section 2.3) from a pre-trained encoder."""

    adaptive = True


class nnUNetTrainerAMAEScratch(nnUNetTrainerViTScratch):  # noqa: N801
    """The adaptive UNETR from random weights."""

    adaptive = True


OUR_TRAINERS = {
    trainer.__name__: trainer
    for trainer in (
        nnUNetTrainerViTMAE,
        nnUNetTrainerViTScratch,
        nnUNetTrainerAMAE,
        nnUNetTrainerAMAEScratch,
        nnUNetTrainerBaseline,
    )
}


def _unchanged(encoder: EncoderFile) -> Path:
    """Return the encoder that the plans name; raise `UserError` when it is missing or has changed."""
    file = local_file(encoder.file)
    if not file.is_file():
        raise UserError(f"The encoder {file}, which the plans name, is missing: put it back, or run mae3d_plan again.")
    if file_hash(file) != encoder.sha256:
        raise UserError(f"The encoder {encoder.file} has changed since the plans were written: run mae3d_plan again.")
    return file
