"""How our networks learn inside nnU-Net: the plans' `finetuning` settings, whatever the network is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.errors import exit_on_user_error
from nnunet_vit_mae.networks.segmenter import Segmenter, prior_logits, start_from
from nnunet_vit_mae.nnunet.absence import keeping_absence
from nnunet_vit_mae.nnunet.augmentation import BatchAugmentation
from nnunet_vit_mae.nnunet.checkpoints import refuse_other_network
from nnunet_vit_mae.nnunet.plans import channel_names, refuse_cascade, settings_for
from nnunet_vit_mae.nnunet.scheduled import CUDA, ScheduledTrainer
from nnunet_vit_mae.optimisation import WarmupCosine, parameter_groups
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import BLOCK, Settings
from nnunet_vit_mae.storage.pickles import read_trained


class AdamWTrainer(ScheduledTrainer):
    """nnU-Net's trainer with AdamW, warm-up and cosine per step, batches of the `finetuning` settings, and a prior.

    Classes that inherit from it say what the network is, and which of its layers are the last ones.
    """

    adaptive = False  # all channels of a volume are stacked
    layer_decay = 1.0  # random weights have nothing to keep: all of them learn at the full rate, from the start
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
        self.initial_lr = self.settings.finetuning.lr
        self.weight_decay = self.settings.finetuning.weight_decay
        self.augment: BatchAugmentation | None = None
        self.pretrained: set[str] = set()  # names of weights that an encoder has brought
        self.steps_done = 0  # in this epoch
        self.grad_scaler = None  # fp16 only needs one, and the network runs in bf16

    @property
    @abstractmethod
    def last_layers(self) -> Iterable[nn.Module]:
        """Return the layers whose outputs are logits, one for each resolution."""

    @exit_on_user_error
    def initialize(self) -> None:
        """Build the network as nnU-Net does. It starts by holding most voxels for background."""
        super().initialize()
        if prior := self.settings.finetuning.foreground_prior:
            labels = self.label_manager
            logits = prior_logits(labels.num_segmentation_heads, prior, regions=labels.has_regions)
            start_from(self.last_layers, logits)

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
            self.unwrapped.named_parameters(),
            weight_decay=self.weight_decay,
            layer_decay=self.layer_decay,
            depth=SIZES[self.settings.network.size].depth,
            pretrained=self.pretrained,
        )

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

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        if self.settings.finetuning.loss == "dice":
            (loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss).weight_ce = 0
        return loss

    @exit_on_user_error
    def load_checkpoint(self, filename: str) -> None:
        """Load a checkpoint (`--c`, `--val`); say what differs if it is of another network.

        Which weights are pre-trained is in the checkpoint; layer-wise rates and weight decay are those of the plans.
        """
        if not self.was_initialized:
            self.initialize()
        network, file = self.unwrapped, Path(filename)
        planned = self.settings.network if isinstance(network, Segmenter) else None
        refuse_other_network(read_trained(file), file, network, self.optimizer, planned)
        super().load_checkpoint(filename)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        groups = self.optimizer.param_groups
        self.pretrained = {names[id(p)] for group in groups if group["pretrained"] for p in group["params"]}
        for group, planned_group in zip(groups, self._parameter_groups(), strict=True):
            group.update({name: planned_group[name] for name in ("lr_scale", "weight_decay")})

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
        loss = self.loss(self.logits(volume), target)
        loss.backward()
        moving = [p for group in self.optimizer.param_groups if group["lr"] > 0 for p in group["params"]]
        self.norms.append(nn.utils.clip_grad_norm_(moving, self.settings.finetuning.gradient_clip))
        self.optimizer.step()
        return {"loss": loss.detach().cpu().numpy()}

    def logits(self, volume: Tensor) -> Tensor | list[Tensor]:
        """Return what the loss is computed from, in fp32; our networks set their own precision."""
        return self.network(volume)

    def _on_device(self, part: torch.Tensor | list[torch.Tensor]) -> Any:
        """Return what a batch holds on the device: a tensor, or one for each resolution."""
        if isinstance(part, list):
            return [self._on_device(one) for one in part]
        return part.to(self.device, non_blocking=True)

    @property
    def unwrapped(self) -> nn.Module:
        """Return the network from what nnU-Net has wrapped around it."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        if isinstance(network, OptimizedModule):
            network = network._orig_mod
        return cast(nn.Module, network)

    def _set_batch_size_and_oversample(self) -> None:
        # the plans' own batch size is for nnU-Net's trainer; this trainer's copy of the configuration is nobody else's
        self.configuration_manager.configuration["batch_size"] = self.settings.finetuning.batch_size
        super()._set_batch_size_and_oversample()
