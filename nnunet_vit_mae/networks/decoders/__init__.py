"""Segmentation decoders, one per file: tokens of the encoder in, logits at full resolution out.

A decoder takes tokens (b n d) and their grid, and gives (b classes z y x) for the whole grid, padding included.
"""
