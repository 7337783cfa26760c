"""Primus encoders as nnssl saves them: the checkpoints of OpenMind and of the SSL3D challenge.

Their blocks are timm's `EvaBlock`s. Rotary positions turn pairs (2i, 2i + 1) there and pairs (i, i + r) here: the rows
of queries and keys move, scalar products stay. nnssl's `EvaMAE` flattens the grid (z y x) in the order y z x, so that
its first rotary axis, and the first axis of its learned positions, are y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.foreign.checkpoints import Weights, weights_in
from nnunet_vit_mae.foreign.parts import Z_SCORE, ConvertedEncoder, checked_token, cube_root, size_of
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import Triple

PLAN = "nnssl_adaptation_plan"
ROTARY_BASE = 10_000.0  # timm's temperature
STEM_TOKEN = [8, 8, 8]  # of the convolutional stems of Primus V2 and V3
MOST_CHANNELS = 100
ORDERS = {"yzx": (1, 0, 2), "zyx": (0, 1, 2)}  # in which axes are flattened, slowest first
RENAMED = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "attn.norm": "attention.inner_norm",
    "attn.proj": "attention.out",
    "mlp.fc1_g": "mlp.gate",
    "mlp.fc1_x": "mlp.value",
    "mlp.norm": "mlp.norm",
    "mlp.fc2": "mlp.out",
}


def convert_primus(checkpoint: Mapping[str, Any], *, order: str | None = None) -> ConvertedEncoder:
    """Convert a checkpoint of nnssl.

    Args:
        checkpoint: With `network_weights` and `nnssl_adaptation_plan`.
        order: In which tokens are flattened, `yzx` or `zyx`; None: that of the trainer in nnssl.

    Raises:
        UserError: The network is none that ours can express.
    """
    plan = _checked_plan(checkpoint[PLAN])
    weights = Weights(weights_in(checkpoint))
    trunk, stem = plan["key_to_encoder"], plan["key_to_stem"]
    if f"{trunk}.norm.weight" not in weights or f"{trunk}.blocks.0.attn.q_proj.weight" not in weights:
        name = plan.get("architecture_plans", {}).get("arch_class_name", "of an unknown kind")
        raise UserError(f"its network ({name}) is not a Primus")
    width, depth = len(weights.take(f"{trunk}.norm.weight")), weights.depth(f"{trunk}.blocks.")
    size = size_of(width, depth)
    order, said = _order(checkpoint, order)
    notes = [f"Tokens are in the order {' '.join(order)} there ({said}), z y x here: positions are transposed."]

    tensors: dict[str, Tensor] = {}
    inner_norm = f"{trunk}.blocks.0.attn.norm.weight" in weights
    for number in range(depth):
        block = _block(weights, f"{trunk}.blocks.{number}.", SIZES[size].heads, ORDERS[order])
        tensors |= {f"transformer.blocks.{number}.{name}": tensor for name, tensor in block.items()}
    weights.refuse_rest(f"{trunk}.blocks.")
    tensors |= {f"transformer.norm.{part}": weights.take(f"{trunk}.norm.{part}") for part in ("weight", "bias")}
    if f"{trunk}.blocks.0.gamma_1" not in weights:
        notes.append("Branches have no scale there, and one of 1 here, which can be learned.")

    channels = plan.get("pretrain_num_input_channels", 1)
    network: dict[str, Any] = {"blocks": "modern" if inner_norm else "gated", "rotary_base": ROTARY_BASE}
    network |= {"position_unit": "token", "norm_eps": 1e-5}
    token = STEM_TOKEN
    if f"{stem}.proj.weight" in weights:
        kernel = weights.take(f"{stem}.proj.weight")
        token, channels = checked_token(list(kernel.shape[2:])), kernel.shape[1]
        tensors |= {"tokenizer.projection.weight": kernel.flatten(1)}
        tensors |= {"tokenizer.projection.bias": weights.take(f"{stem}.proj.bias")}
        network["tokenizer"] = "linear"
    else:
        notes.append(
            "Tokenizer: the pre-trained one is a convolutional stem that sees neighbouring tokens (Primus V2 or V3), "
            "this network starts with a new one."
        )
    configuration = _configuration(plan)
    patch = configuration.get("patch_size") or plan.get("recommended_downstream_patchsize") or []
    places, more = _places(weights, plan.get("key_to_lpe") or f"{trunk}.pos_embed", patch, token, order)
    learned, registers = places.pop("position_table.values", None), places.get("register_tokens")
    if learned is not None:
        tensors["position_table.values"] = learned
    tensors |= places
    network |= {
        "positions": "rotary" if f"{trunk}.pos_embed" not in weights else "both",
        "learned_positions": [] if learned is None else list(learned.shape[:3]),
        "register_tokens": 0 if registers is None else len(registers),
    }
    if not 0 < channels <= MOST_CHANNELS:
        raise UserError(f"its plan has {channels} input channels")
    return ConvertedEncoder(
        kind=f"nnssl ({plan.get('architecture_plans', {}).get('arch_class_name', 'Primus')})",
        size=size,
        token=token,
        network=network,
        tensors=tensors,
        channel_names=[f"image {number + 1}" for number in range(channels)],
        dataset=str(plan.get("pretrain_plan", {}).get("dataset_name", "unknown")),
        patch_size=[int(side) for side in patch],
        spacing=[float(side) for side in configuration.get("spacing") or []],
        normalization=list(configuration.get("normalization_schemes") or [Z_SCORE]),
        licence="not stated in the checkpoint; OpenMind's are CC-BY-4.0",
        notes=[*notes, *more, weights.report],
    )


def _checked_plan(plan: Any) -> dict[str, Any]:
    if not isinstance(plan, Mapping) or not all(
        isinstance(plan.get(k), str) for k in ("key_to_encoder", "key_to_stem")
    ):
        raise UserError(f"its {PLAN} does not name key_to_encoder and key_to_stem")
    return dict(plan)


def _configuration(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of pre-training, the only one in its plan, or nothing."""
    configurations = plan.get("pretrain_plan", {}).get("configurations", {})
    return next((entry for entry in configurations.values() if isinstance(entry, Mapping)), {})


def _order(checkpoint: Mapping[str, Any], order: str | None) -> tuple[str, str]:
    """Return the order of tokens, and why it is that one."""
    if order is not None:
        return order, "as given"
    trainer = str(checkpoint.get("trainer_name", ""))
    if "SimMIM" in trainer:
        return "zyx", "as in nnssl's EvaSimMIM"
    return "yzx", "as in nnssl's EvaMAE"


def _block(weights: Weights, prefix: str, heads: int, axes: tuple[int, ...]) -> dict[str, Tensor]:
    """Return one block of ours."""
    tensors = {
        f"{ours}.{part}": weights.take(f"{prefix}{theirs}.{part}")
        for theirs, ours in RENAMED.items()
        for part in ("weight", "bias")
        if theirs != "attn.norm" or f"{prefix}{theirs}.{part}" in weights
    }
    width = len(tensors["attention_norm.weight"])
    projections = [weights.take(f"{prefix}attn.{part}_proj.weight") for part in "qkv"]
    found = [weights.take_if_there(f"{prefix}attn.{part}_proj.bias") for part in "qkv"]  # keys have none
    biases = [torch.zeros(width) if bias is None else bias for bias in found]
    rows = rotary_rows(width, heads, axes)
    tensors["attention.qkv.weight"] = torch.cat([projections[0][rows], projections[1][rows], projections[2]])
    tensors["attention.qkv.bias"] = torch.cat([biases[0][rows], biases[1][rows], biases[2]])
    for theirs, ours in (("gamma_1", "attention_scale"), ("gamma_2", "mlp_scale")):
        scale = weights.take_if_there(f"{prefix}{theirs}")
        tensors[f"{ours}.factor"] = torch.ones(width) if scale is None else scale
    return tensors


def rotary_rows(width: int, heads: int, axes: tuple[int, ...]) -> Tensor:
    """Return which rows of timm's queries and keys become those of ours, in order.

    Args:
        width: Of all heads together.
        heads: Number of heads.
        axes: The peer's axes for z, y, x.
    """
    rows = torch.arange(width)
    if width // heads % 6:
        raise UserError(f"its heads are {width // heads} wide, which 6 does not divide, as rotary positions need it")
    by_pair = rearrange(rows, "(h zyx f pair) -> zyx h f pair", h=heads, zyx=3, pair=2)
    return rearrange(by_pair[list(axes)], "zyx h f pair -> (h pair zyx f)")


def _places(
    weights: Weights, name: str, patch: list[int], token: list[int], order: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the table of learned positions (z y x d) and the register tokens, as far as there are any, and notes."""
    registers = weights.take_if_there("register_tokens")
    registers = None if registers is None else registers.flatten(0, 1)
    count = 0 if registers is None else len(registers)
    places = {} if registers is None else {"register_tokens": registers}
    table = weights.take_if_there(name)
    if table is None:
        return places, []
    table = table.flatten(0, 1)
    if registers is not None:
        places["register_tokens"], table = registers + table[:count], table[count:]
    grid = _grid(len(table), patch, token)
    if grid is None:
        return places, [f"Learned positions: {len(table)} fill no known grid, sine-cosine ones take their place."]
    if order == "yzx" and grid[0] != grid[1]:
        raise UserError(
            f"it was pre-trained on {' x '.join(map(str, grid))} tokens in the order y z x, where rotary positions do "
            "not belong to the places of tokens"
        )
    z, y, x = grid
    axes = {"z": z, "y": y, "x": x}
    places["position_table.values"] = rearrange(table, f"({' '.join(order)}) d -> z y x d", **axes)
    return places, []


def _grid(tokens: int, patch: list[int], token: list[int]) -> Triple | None:
    if len(patch) == 3:
        z, y, x = (int(voxels) // side for voxels, side in zip(patch, token, strict=True))
        if z * y * x == tokens:
            return z, y, x
    side = cube_root(tokens)
    return (side, side, side) if side else None
