"""Fixed 3D sine-cosine positions (He et al. 2022, extended to three axes; ViTiac, section 2.2).

They are rebuilt for the grid at hand and never stored, so an encoder moves between patch sizes without interpolation.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from nnunet_vit_mae.networks.tokenizer import Triple

PERIOD = 10_000


@torch.compiler.assume_constant_result  # a compiled network holds the table as it holds its weights
def sine_cosine_positions(grid: Triple, width: int, device: torch.device) -> Float[Tensor, "n d"]:
    """Positions of all tokens of a grid, in the order z y x.

    Each axis fills a third of the width: sines, then cosines, of `width // 6` frequencies. What a width that 6 does not
    divide has left over stays zero.
    """
    return _table(grid, width, device)


@lru_cache(maxsize=16)  # a run meets one or two grids, at two widths
def _table(grid: Triple, width: int, device: torch.device) -> Float[Tensor, "n d"]:
    frequencies = width // 6
    # normal tensors even when the first call comes from nnU-Net's predictor, for training may follow in this process
    with torch.inference_mode(False), torch.no_grad():
        omega = PERIOD ** -(torch.arange(frequencies, dtype=torch.float64) / frequencies)
        axes = [torch.arange(tokens, dtype=torch.float64) for tokens in grid]
        angles = [axis.flatten()[:, None] * omega for axis in torch.meshgrid(*axes, indexing="ij")]
        positions = torch.zeros(angles[0].shape[0], width)
        positions[:, : 6 * frequencies] = torch.cat(
            [part for a in angles for part in (a.sin(), a.cos())], dim=1
        ).float()
        return positions.to(device)


def forget_positions() -> None:
    """Empty the cache of tables."""
    _table.cache_clear()
