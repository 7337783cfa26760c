"""The networks of both papers: torch, einops and nnU-Net's building blocks, no files, no environment.

Axes in every file: b batch, c channels (contrasts), z y x voxels, n tokens, k visible tokens, m masked tokens,
v voxels of a token, d width. A grid is the number of tokens along z y x.
"""
