"""The networks of both papers: torch and einops only, no files, no environment, no nnU-Net.

Axes in every file: b batch, c channels (contrasts), z y x voxels, n tokens, k visible tokens, m hidden tokens,
v voxels of a token, d width. A grid is the number of tokens along z y x.
"""
