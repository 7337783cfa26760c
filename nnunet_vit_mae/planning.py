"""Default settings from what nnU-Net planned: a pure function, so that plans without a `vit_mae` block work too.

nnU-Net rebuilds the network at prediction from the plans alone, so the answer depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.presets import Finetuning, Network, Settings

TOKEN_BUDGET = 4096  # 64^3 voxels at token 4, the paper's setting; a 128^3 patch at token 8
THIN_TOKEN = 2


def default_settings(patch_size: Sequence[int], spacing: Sequence[float], unet_batch_size: int) -> Settings:
    """Settings for a patch (z y x, voxels) at a spacing (z y x, mm).

    The batch is at least nnU-Net's own: a ViT needs less memory for a patch than the U-Net that was planned for it.
    Raises `UserError` when the configuration is not 3D.
    """
    if len(patch_size) != 3:
        raise UserError(
            f"This configuration has a {len(patch_size)}D patch {list(patch_size)}, but the ViT is 3D: "
            "choose a 3D configuration such as 3d_fullres."
        )
    token = default_token(patch_size, spacing)
    return Settings(
        network=Network(token=token, decoder=default_decoder(token)),
        finetuning=Finetuning(batch_size=max(unet_batch_size, Finetuning().batch_size)),
    )


def default_token(
    patch_size: Sequence[int], spacing: Sequence[float], budget: int = TOKEN_BUDGET
) -> tuple[int, int, int]:
    """The smallest token of 4, 8 or 16 voxels whose grid stays inside the budget (ViTiac, 3.1: small is better).

    Along an axis of thick slices a token spans fewer voxels, so that it stays about as long in mm as along the others.
    """
    thicknesses = [axis_spacing / min(spacing) for axis_spacing in spacing]
    for side in (4, 8, 16):
        z, y, x = (_side_along(side, thickness) for thickness in thicknesses)
        token = (z, y, x)
        if math.prod(token_grid(patch_size, token)) <= budget:
            break
    return token


def _side_along(side: int, thickness: float) -> int:
    """`side`, halved for each whole factor of two in `thickness`; a token thinner than two voxels gains nothing."""
    return max(THIN_TOKEN, side >> math.floor(math.log2(thickness)))


def default_decoder(token: Sequence[int]) -> str:
    """ViTiac, figure 5: the MAE decoder wins at token 4 and falls furthest behind above it."""
    return "mae" if max(token) <= 4 else "upscale"


def token_grid(patch_size: Sequence[int], token: Sequence[int]) -> tuple[int, ...]:
    """Tokens along z y x; the last one of an axis may reach beyond the patch."""
    return tuple(math.ceil(voxels / side) for voxels, side in zip(patch_size, token, strict=True))
