"""The trainers: nnU-Net's own loss, augmentation, sampling, validation and prediction around a ViT.

The plans choose the network and the schedule; the classes differ in behaviour only. nnU-Net rebuilds a network at
prediction from the plans and the trainer's name, so `build_network_architecture` depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_vit_mae.datasets.split.files import parent_fold
from nnunet_vit_mae.errors import UserError, abbreviated, exit_on_user_error
from nnunet_vit_mae.hub import local_file
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.precision import autocast, in_fp32
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.nnunet.adamw import AdamWTrainer
from nnunet_vit_mae.nnunet.checkpoints import refuse_network_of_other_folds
from nnunet_vit_mae.nnunet.plans import destination, settings_for
from nnunet_vit_mae.nnunet.scheduled import CUDA, ScheduledTrainer
from nnunet_vit_mae.settings import EncoderFile
from nnunet_vit_mae.storage.files import file_hash
from nnunet_vit_mae.storage.layout import dataset_id, encoder_file
from nnunet_vit_mae.transfer import adapt_encoder
from nnunet_vit_mae.weights import Card, read_encoder


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


class nnUNetTrainerBaselineAdamW(AdamWTrainer):  # noqa: N801
    """nnU-Net's U-Net, trained as the ViT is: what then differs between them is the network."""

    @property
    def last_layers(self) -> Iterable[nn.Module]:
        """Return the layers whose outputs are logits, one for each resolution."""
        return cast(Any, self.unwrapped).decoder.seg_layers

    def logits(self, volume: Tensor) -> Tensor | list[Tensor]:
        """Return what the loss is computed from, in fp32, from a network that runs in bf16 where the ViT does."""
        with autocast(volume.device):
            logits = self.network(volume)
        return in_fp32(logits)


class nnUNetTrainerViTScratch(AdamWTrainer):  # noqa: N801
    """The ViT from random weights."""

    @exit_on_user_error
    def __init__(
        self, plans: dict, configuration: str, fold: int, dataset_json: dict, device: torch.device = CUDA
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = self.settings.network.decoder == "unet"  # the others have one output

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

    @property
    def segmenter(self) -> Segmenter:
        """Return the network without what nnU-Net has wrapped around it."""
        return cast(Segmenter, self.unwrapped)

    @property
    def last_layers(self) -> Iterable[nn.Module]:
        """Return the layers whose outputs are logits, one for each resolution."""
        return cast(Any, self.segmenter.decoder).heads

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the outputs at lower resolutions, which only the decoder `unet` has."""
        if self.enable_deep_supervision:
            self.segmenter.decoder.deep_supervision = enabled

    def on_train_start(self) -> None:
        """Begin as nnU-Net does, unless its plans would change the network of other folds of this model."""
        refuse_network_of_other_folds(Path(self.output_folder), self.configuration_name, self.settings.network)
        super().on_train_start()

    def _do_i_compile(self) -> bool:
        # shapes change with the number of contrasts, so that an adaptive network would be compiled over and over
        return not self.adaptive and super()._do_i_compile()


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
    def load_checkpoint(self, filename: str) -> None:
        """Load a checkpoint (`--c`, `--val`). It has the encoder in it, so the encoder's own file may be gone."""
        self.takes_over_checkpoint = True
        super().load_checkpoint(filename)

    def get_tr_and_val_datasets(self) -> tuple:
        """Return nnU-Net's datasets, and log how many validation cases pre-training has seen."""
        training, validation = super().get_tr_and_val_datasets()
        card = self.encoder_card
        if card is not None and card.dataset != self.plans_manager.dataset_name:
            self.print_to_log_file(
                f"The encoder was pre-trained on {card.dataset}, which may share patients with this dataset."
            )
        elif card is not None:
            seen, total = card.seen(validation.identifiers), len(validation.identifiers)
            if seen is None:
                origin = f"{card.origin}, fold {card.fold}" if card.fold else card.origin
                self.print_to_log_file(f"The card of the encoder does not say which cases it has seen ({origin}).")
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
        found = results.glob(str(encoder_file(Path(), "*", self.configuration_name, "*")))
        others = {file.parent.parent.name.split("__")[1] for file in found} - {plans_name}
        hint = f" (those of {abbreviated(sorted(others))} have one: check -p)" if others else ""
        command = f"mae3d_pretrain -d {dataset_id(dataset)} -c {self.configuration_name} -p {plans_name}"
        scratch = nnUNetTrainerViTScratch
        if self.adaptive:
            command, scratch = f"{command} --adaptive", nnUNetTrainerAMAEScratch
        raise UserError(
            f"There is no pre-trained encoder for {dataset}, plans {plans_name}, {self.configuration_name}{hint}: "
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
        nnUNetTrainerBaselineAdamW,
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
