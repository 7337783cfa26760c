"""Segmentation decoders: `Encoded` in, logits at full resolution out.

Each decoder that `presets.DECODERS` lists is the module of its name here, with a function `build` that makes it from
settings. It gives (b classes z y x) for the whole token grid, padding included; `unet` gives it for the volume, and in
training a list with one map for each of its resolutions. Its `stages` are the steps on the way from tokens to voxels,
coarse to fine.
"""
