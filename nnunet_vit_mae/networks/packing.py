"""Attention of sequences of different lengths that lie one behind the other in a single one, without padding.

On a GPU torch has a kernel for it. Everywhere else each sequence has its own call of ordinary attention, with equal
results: that is for tests, and for heads that the kernel does not take.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

OLDEST = "2.11"  # torch that has the kernel in the form in which it is called here
AMPERE = (8, 0)  # flash attention in bf16 asks for it
KERNEL_WIDTH = 8  # flash attention works on multiples of it; the papers' heads are 10, 20, 40 and 80 wide
WIDEST_HEAD = 128  # of cuDNN, which torch may choose without a look at the width


class Lengths(NamedTuple):
    """How long the sequences are that lie one behind the other: known to the host, which never asks a GPU for it."""

    tokens: list[int]
    starts: Int[Tensor, " e"]  # of each sequence, and the end of the last one, for the kernel

    @classmethod
    def of(cls, tokens: list[int], device: torch.device) -> Lengths:
        """Return the lengths, with the starts on a device."""
        starts = torch.tensor([0, *accumulate(tokens)], dtype=torch.int32)
        return cls(tokens, starts.to(device, non_blocking=True))


class Packing(NamedTuple):
    """The sequences of queries in a packed one, and those of the keys and values that each of them sees."""

    queries: Lengths
    keys: Lengths


@cache
def has_kernel() -> bool:
    """Return whether this torch has the kernel, and a GPU for it."""
    return torch.__version__ >= OLDEST and torch.cuda.is_available() and torch.cuda.get_device_capability() >= AMPERE


def packs(device: torch.device) -> bool:
    """Return whether the kernel takes what networks compute on a device right now."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return False
    return _kernel_takes(device, torch.get_autocast_dtype("cuda"), KERNEL_WIDTH)


def packed_attention(
    query: Float[Tensor, "1 h t w"],
    key: Float[Tensor, "1 h u w"],
    value: Float[Tensor, "1 h u w"],
    packing: Packing,
    *,
    scale: float,
) -> Float[Tensor, "1 h t w"]:
    """Let the queries of each sequence attend to its own keys alone."""
    queries, keys = packing
    longest = max(queries.tokens), max(keys.tokens)
    # where nothing is hidden there are no queries, on which kernels need not be defined
    if not longest[0] or not _kernel_takes(query.device, query.dtype, query.shape[-1]):
        own = zip(query.split(queries.tokens, 2), key.split(keys.tokens, 2), value.split(keys.tokens, 2), strict=True)
        return torch.cat([functional.scaled_dot_product_attention(*parts, scale=scale) for parts in own], dim=2)
    from torch.nn.attention.varlen import varlen_attn  # which takes a while to import

    q, k, v = (rearrange(part, "1 h t w -> t h w").contiguous() for part in (query, key, value))
    mixed = varlen_attn(q, k, v, queries.starts, keys.starts, *longest, scale=scale)
    return rearrange(cast(Tensor, mixed), "t h w -> 1 h t w")


def _kernel_takes(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Return whether the kernel takes heads: in bf16 alone, as our networks never compute in fp16."""
    fits = head_width <= WIDEST_HEAD and head_width % KERNEL_WIDTH == 0
    return fits and device.type == "cuda" and dtype == torch.bfloat16 and has_kernel()
