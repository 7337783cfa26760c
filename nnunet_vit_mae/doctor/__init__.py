"""Whether this machine and this installation can do the work: what `mae3d_doctor` looks at outside of nnU-Net."""
