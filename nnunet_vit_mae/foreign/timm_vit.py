"""ViTs of timm, and of projects with its names (the original MAE): two-dimensional weights, inflated along z."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign.checkpoints import Weights, weights_in
from nnunet_vit_mae.foreign.parts import ConvertedEncoder, checked_token, mlp_tensors, size_of
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import TOKEN_SIDES, token_grid

KERNEL = "patch_embed.proj.weight"
NORM_EPS = 1e-6
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")  # in timm's order


def convert_timm_vit(
    checkpoint: Mapping[str, Any],
    *,
    patch_size: Sequence[int],
    spacing: Sequence[float],
    token_depth: int | None = None,
) -> ConvertedEncoder:
    """Convert a ViT of timm.

    Args:
        checkpoint: A state dict, or a dictionary with one.
        patch_size: Voxels (z y x) for whose grid learned positions are repeated along z.
        spacing: mm along z y x of the data it will see.
        token_depth: Voxels of a token along z; None: as many as make it about a cube in mm.

    Raises:
        UserError: The network is none that ours can express.
    """
    weights = Weights(weights_in(checkpoint))
    kernel = weights.take(KERNEL)
    if kernel.ndim != 4:
        raise UserError(f"its {KERNEL} has {kernel.ndim} axes, not the 4 of a two-dimensional ViT")
    width, depth = len(kernel), weights.depth("blocks.")
    size = size_of(width, depth)
    y, x = kernel.shape[2:]
    z = token_depth or cubic_depth(y, spacing)
    token = checked_token([z, y, x])
    notes = [
        f"Tokenizer: the weights of {kernel.shape[1]} colours are summed to grey, divided by {z}, and repeated over "
        f"{z} voxels along z.",
        f"Heads are not in a checkpoint: {SIZES[size].heads} as in size {size}.",
    ]
    tensors = {
        "tokenizer.projection.weight": inflated(kernel, z),
        "tokenizer.projection.bias": _or_zeros(weights.take_if_there("patch_embed.proj.bias"), width),
    }
    for number in range(depth):
        block = _block(weights, f"blocks.{number}.")
        tensors |= {f"transformer.blocks.{number}.{name}": tensor for name, tensor in block.items()}
    weights.refuse_rest("blocks.")
    if "norm_pre.weight" in weights:
        raise UserError("it has a norm before its blocks, which ours do not have")
    final = "norm" if "norm.weight" in weights else "fc_norm"
    tensors |= {f"transformer.norm.{part}": weights.take(f"{final}.{part}") for part in ("weight", "bias")}
    if final == "fc_norm":
        notes.append("The final norm followed an average over all tokens there; here it is applied to each of them.")

    grid_depth = token_grid(patch_size, token)[0]
    places, more = _places(weights, width, grid_depth)
    learned, registers = places.get("position_table.values"), places.get("register_tokens")
    return ConvertedEncoder(
        kind="timm (a two-dimensional ViT)",
        size=size,
        token=token,
        network={
            "blocks": "vit",
            "tokenizer": "linear",
            "norm_eps": NORM_EPS,
            "positions": "sine_cosine",
            "position_unit": "token",
            "learned_positions": [] if learned is None else list(learned.shape[:3]),
            "register_tokens": 0 if registers is None else len(registers),
        },
        tensors=tensors | places,
        channel_names=["grey"],
        dataset="pictures",
        notes=[*notes, *more, weights.report],
    )


def cubic_depth(side: int, spacing: Sequence[float]) -> int:
    """Return the voxels along z of a token that is about as long along z as along y, in mm.

    >>> cubic_depth(16, (3.0, 0.8, 0.8))
    4
    """
    wanted = side * spacing[1] / spacing[0]
    return min(TOKEN_SIDES, key=lambda voxels: abs(math.log(voxels / wanted)))


def inflated(kernel: Tensor, depth: int) -> Tensor:
    """Return the weight (width, voxels) for tokens of grey voxels from a kernel (width, colours, y, x).

    A grey picture that is repeated along z gives the same token as there.
    """
    grey = kernel.sum(dim=1) / depth
    return grey[:, None].expand(-1, depth, -1, -1).flatten(1).contiguous()


def _block(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Return one block of ours; a scale of its branches becomes part of their last layers."""
    qkv = weights.take(f"{prefix}attn.qkv.weight")
    width = qkv.shape[1]
    tensors = {
        f"{ours}.{part}": weights.take(f"{prefix}{theirs}.{part}")
        for theirs, ours in {"norm1": "attention_norm", "norm2": "mlp_norm"}.items()
        for part in ("weight", "bias")
    }
    tensors["attention.qkv.weight"] = qkv
    tensors["attention.qkv.bias"] = _or_zeros(weights.take_if_there(f"{prefix}attn.qkv.bias"), 3 * width)
    out = _linear(weights, f"{prefix}attn.proj", weights.take_if_there(f"{prefix}ls1.gamma"))
    tensors["attention.out.weight"], tensors["attention.out.bias"] = out
    first = _linear(weights, f"{prefix}mlp.fc1")
    return tensors | mlp_tensors(
        first, _linear(weights, f"{prefix}mlp.fc2", weights.take_if_there(f"{prefix}ls2.gamma"))
    )


def _linear(weights: Weights, name: str, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    weight, bias = weights.take(f"{name}.weight"), weights.take(f"{name}.bias")
    return (weight, bias) if scale is None else (weight * scale[:, None], bias * scale)


def _or_zeros(bias: Tensor | None, width: int) -> Tensor:
    return torch.zeros(width) if bias is None else bias


def _places(weights: Weights, width: int, grid_depth: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return learned positions (z y x d) and register tokens, as far as there are any, and notes."""
    prefix = [weights.take(name).reshape(-1, width) for name in PREFIX_TOKENS if name in weights]
    registers = torch.cat(prefix) if prefix else None
    places: dict[str, Tensor] = {} if registers is None else {"register_tokens": registers}
    table = weights.take_if_there("pos_embed")
    if table is None:
        return places, ["There are no learned positions: sine-cosine ones of ours take their place."]
    table = table.reshape(-1, width)
    for count in (0, len(prefix), sum(map(len, prefix))):  # positions before those of the picture
        side = math.isqrt(len(table) - count)
        if side**2 == len(table) - count:
            break
    else:
        return places, [f"Learned positions: {len(table)} fill no square, sine-cosine ones of ours take their place."]
    if registers is not None and count:
        places["register_tokens"] = torch.cat([registers[:count] + table[:count], registers[count:]])
    picture = table[count:].reshape(1, side, side, width)
    places["position_table.values"] = picture.expand(grid_depth, -1, -1, -1).contiguous()
    return places, [f"Learned positions: {side} x {side}, repeated for {grid_depth} tokens along z."]
