"""MONAI's `ViT` (also inside its `UNETR`) and `MaskedAutoEncoderViT`.

MONAI reads volumes as x y z, nnU-Net as z y x: kernels and positions are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign.checkpoints import Weights, weights_in
from nnunet_vit_mae.foreign.parts import ConvertedEncoder, checked_token, cube_root, mlp_tensors, size_of
from nnunet_vit_mae.presets import SIZES

POSITIONS = "patch_embedding.position_embeddings"
CHANNELS = range(1, 9)  # that a linear tokenizer may have
CONVOLUTION, LINEAR = "patch_embedding.patch_embeddings", "patch_embedding.patch_embeddings.1"


def convert_monai_vit(checkpoint: Mapping[str, Any], *, token: Sequence[int] | None = None) -> ConvertedEncoder:
    """Convert a ViT or the encoder of a masked autoencoder of MONAI.

    Args:
        checkpoint: A state dict, or a dictionary with one.
        token: Voxels of a token (z y x), which a tokenizer that is a linear layer does not show; None: of the cubes
            that fit its weights, the largest, which has the fewest channels.

    Raises:
        UserError: The network is none that ours can express.
    """
    weights = Weights(weights_in(checkpoint))
    table = weights.take(POSITIONS)[0]
    width, depth = table.shape[1], _depth(weights)
    size = size_of(width, depth)
    kernel, bias, assumed = _kernel(weights, token)
    sides = checked_token(list(kernel.shape[2:]))
    notes = [
        "Axes are x y z there, z y x here: kernels and positions are transposed.",
        f"Heads are not in a checkpoint: {SIZES[size].heads} as in size {size}.",
        "How intensities were normalised is not in a checkpoint: to about mean 0 and deviation 1 is assumed.",
        *assumed,
    ]
    tensors = {"tokenizer.projection.weight": kernel.flatten(1).contiguous(), "tokenizer.projection.bias": bias}
    for number in range(depth):
        block = _block(weights, f"blocks.{number}.")
        tensors |= {f"transformer.blocks.{number}.{name}": tensor for name, tensor in block.items()}
    final = "norm" if "norm.weight" in weights else f"blocks.{depth}"  # the autoencoder's is in its list of blocks
    tensors |= {f"transformer.norm.{part}": weights.take(f"{final}.{part}") for part in ("weight", "bias")}
    weights.refuse_rest("blocks.", except_for=("norm_cross_attn", "cross_attn"))  # made, but never used

    learned: list[int] = []
    side = cube_root(len(table))
    if side:
        tensors["position_table.values"] = rearrange(table, "(x y z) d -> z y x d", x=side, y=side, z=side).contiguous()
        learned = [side] * 3
        notes.append(
            f"The grid of learned positions is not in a checkpoint: {len(table)} positions are taken for a cube of "
            f"{side} x {side} x {side} tokens."
        )
    else:
        notes.append(f"Learned positions: {len(table)} fill no cube, sine-cosine ones take their place.")
    registers = weights.take_if_there("cls_token")
    if registers is not None:
        tensors["register_tokens"] = registers.reshape(-1, width)
    return ConvertedEncoder(
        kind="MONAI (a ViT)",
        size=size,
        token=sides,
        network={
            "blocks": "vit",
            "tokenizer": "linear",
            "norm_eps": 1e-5,
            "positions": "sine_cosine",
            "position_unit": "token",
            "learned_positions": learned,
            "register_tokens": 0 if registers is None else 1,
        },
        tensors=tensors,
        channel_names=[f"image {number + 1}" for number in range(kernel.shape[1])],
        dataset="unknown",
        patch_size=[side * tokens for side, tokens in zip(sides, learned, strict=False)],
        notes=[*notes, weights.report],
    )


def _depth(weights: Weights) -> int:
    """Return the number of blocks; the norm behind an autoencoder's blocks has a number of its own."""
    depth = weights.depth("blocks.")
    while depth and f"blocks.{depth - 1}.norm1.weight" not in weights:
        depth -= 1
    return depth


def _kernel(weights: Weights, token: Sequence[int] | None) -> tuple[Tensor, Tensor, list[str]]:
    """Return the kernel (width, channels, z y x) and bias of the tokenizer, and notes on what was assumed for it.

    It is a convolution or a linear layer there.
    """
    if f"{CONVOLUTION}.weight" in weights:
        kernel = weights.take(f"{CONVOLUTION}.weight")
        if kernel.ndim != 5:
            raise UserError(f"its kernels have {kernel.ndim - 2} axes, not 3")
        return rearrange(kernel, "d c x y z -> d c z y x"), weights.take(f"{CONVOLUTION}.bias"), []
    weight = weights.take(f"{LINEAR}.weight")
    (z, y, x), notes = _cubes(weight.shape[1]) if token is None else (token, [])
    if weight.shape[1] not in {number * z * y * x for number in CHANNELS}:
        raise UserError(
            f"its tokens have {weight.shape[1]} values, which no number of channels up to {CHANNELS[-1]} makes of "
            f"{z} x {y} x {x} voxels, the token that was given"
        )
    pattern = "d (x y z c) -> d c z y x"  # the voxels, with each voxel's channels side by side
    return rearrange(weight, pattern, x=x, y=y, z=z), weights.take(f"{LINEAR}.bias"), notes


def _cubes(values: int) -> tuple[list[int], list[str]]:
    """Return the sides of the largest cube of voxels that a token of this many values can be, and notes on others."""
    sides = {number: cube_root(values // number) for number in CHANNELS if values % number == 0}
    fitting = {number: side for number, side in sides.items() if side}
    if not fitting:
        raise UserError(
            f"its tokens of {values} values are cubes of voxels for no number of channels up to {CHANNELS[-1]}, so "
            "their sides have to be given (--token)"
        )
    channels = min(fitting)
    side = fitting.pop(channels)
    assumed = f"Channels are not in a checkpoint: {channels} with tokens of {side} voxels a side are assumed"
    return [side] * 3, [
        f"{assumed}, though {other} with tokens of {other_side} fit too, which --token {other_side} chooses."
        for other, other_side in fitting.items()
    ] or [f"{assumed}; --token takes sides that are not equal."]


def _block(weights: Weights, prefix: str) -> dict[str, Tensor]:
    """Return one block of ours."""
    tensors = {
        f"{ours}.{part}": weights.take(f"{prefix}{theirs}.{part}")
        for theirs, ours in {"norm1": "attention_norm", "norm2": "mlp_norm", "attn.out_proj": "attention.out"}.items()
        for part in ("weight", "bias")
    }
    joined = f"{prefix}attn.qkv" if f"{prefix}attn.qkv.weight" in weights else None
    names = [joined] if joined else [f"{prefix}attn.to_{part}" for part in "qkv"]
    tensors["attention.qkv.weight"] = torch.cat([weights.take(f"{name}.weight") for name in names])
    biases = [weights.take(f"{name}.bias") for name in names if f"{name}.bias" in weights]
    tensors["attention.qkv.bias"] = torch.cat(biases) if biases else torch.zeros(len(tensors["attention.qkv.weight"]))
    first, second = (
        (weights.take(f"{prefix}mlp.{layer}.weight"), weights.take(f"{prefix}mlp.{layer}.bias"))
        for layer in ("linear1", "linear2")
    )
    return tensors | mlp_tensors(first, second)
