"""What nnU-Net finds through `nnUNet_extTrainer`. No code: nnU-Net imports and forgets this module at each look-up."""

from nnunet_vit_mae.nnunet.trainers import (
    nnUNetTrainerAMAE,
    nnUNetTrainerAMAEScratch,
    nnUNetTrainerBaseline,
    nnUNetTrainerBaselineAdamW,
    nnUNetTrainerViTMAE,
    nnUNetTrainerViTScratch,
)

__all__ = [
    "nnUNetTrainerAMAE",
    "nnUNetTrainerAMAEScratch",
    "nnUNetTrainerBaseline",
    "nnUNetTrainerBaselineAdamW",
    "nnUNetTrainerViTMAE",
    "nnUNetTrainerViTScratch",
]
