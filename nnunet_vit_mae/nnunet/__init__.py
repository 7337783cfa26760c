"""Everything that touches nnU-Net; no other folder of the package imports `nnunetv2`."""
