"""`mae3d_study`: does pre-training help on one's own data? A Snakemake workflow of nnU-Net's commands and ours."""
