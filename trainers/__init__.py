"""The folder for nnU-Net's `nnUNet_extTrainer`: re-exports only, for nnU-Net imports every module it meets here."""
