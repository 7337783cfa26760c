"""Segmentation decoders, one per file: `Encoded` in, logits at full resolution out.

A decoder gives (b classes z y x) for the whole token grid, padding included. Its `stages` are
the steps on the way from tokens to voxels, coarse to fine.
"""
