"""A pre-norm transformer, the trunk of encoder and decoder, with one of three kinds of blocks.

`vit` blocks are those of both papers (Dosovitskiy et al. 2021). `modern` ones are what made transformers competitive in
nnU-Net's own comparison (Primus, Wald et al. 2025, https://arxiv.org/abs/2503.01835): a gated MLP (SwiGLU), a norm
inside attention, and residual branches that start small (LayerScale). `gated` ones lack the norm inside
attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.networks.packing import KERNEL_WIDTH, Packing, packed_attention
from nnunet_vit_mae.networks.positions import rotated

MLP_RATIO = 4
LAYER_SCALE = 0.1  # at which it starts


class Transformer(nn.Module):
    """Blocks and a final norm; tokens in, tokens of the same shape out.

    Args:
        width: Length of a token.
        depth: Number of blocks.
        heads: Attention heads of each block.
        drop_path: Probability to leave out a branch of the last block in training, rising from 0 at the first one.
        blocks: `vit`, `modern` or `gated`.
        norm_eps: What layer norms add to the variance.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        drop_path: float = 0.0,
        blocks: str = "vit",
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.width, self.head_width = width, width // heads
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, drop_path=rate, kind=blocks) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.apply(_reset_linear)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        rotation: Float[Tensor, "*b n 2 r"] | None = None,
        context: Float[Tensor, "b k d"] | None = None,
        context_rotation: Float[Tensor, "*b k 2 r"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Let the tokens attend to one another, or only to the tokens of `context`, which stay as they are.

        With `packing`, the only sample of the batch holds several sequences that do not see one another.
        """
        for block in self.blocks:
            tokens = block(tokens, rotation, context, context_rotation, packing)
        return self.norm(tokens)

    def with_hidden(
        self,
        tokens: Float[Tensor, "b n d"],
        rotation: Float[Tensor, "*b n 2 r"] | None,
        taps: Sequence[int],
        packing: Packing | None = None,
    ) -> tuple[Float[Tensor, "b n d"], list[Float[Tensor, "b n d"]]]:
        """Return the output, and what the tapped blocks (counted from 1) give on the way, before the final norm."""
        hidden = {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, rotation, packing=packing)
            if number in taps:
                hidden[number] = tokens
        return self.norm(tokens), [hidden[number] for number in taps]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, *, drop_path: float, kind: str = "vit"):
        super().__init__()
        modern = kind != "vit"
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, inner_norm=kind == "modern")
        self.attention_scale = LayerScale(width) if modern else nn.Identity()
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = GatedMLP(width) if modern else plain_mlp(width)
        self.mlp_scale = LayerScale(width) if modern else nn.Identity()
        self.drop_path = drop_path

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        rotation: Float[Tensor, "*b n 2 r"] | None = None,
        context: Float[Tensor, "b k d"] | None = None,
        context_rotation: Float[Tensor, "*b k 2 r"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "b n d"]:
        mixed = self.attention(self.attention_norm(tokens), rotation, context, context_rotation, packing)
        tokens = tokens + self._maybe_dropped(self.attention_scale(mixed), packing)
        return tokens + self._maybe_dropped(self.mlp_scale(self.mlp(self.mlp_norm(tokens))), packing)

    def _maybe_dropped(self, branch: Float[Tensor, "b n d"], packing: Packing | None) -> Float[Tensor, "b n d"]:
        """Leave a branch out for a random part of the sequences in training (stochastic depth, Huang et al. 2016)."""
        if not self.training or self.drop_path == 0:
            return branch
        sequences = len(branch) if packing is None else len(packing.queries.tokens)
        kept = branch.new_empty(sequences, 1, 1).bernoulli_(1 - self.drop_path)
        if packing is not None:
            # the sum is known, so that no GPU is asked for it
            kept = kept.repeat_interleave(packing.queries.starts.diff(), dim=0, output_size=branch.shape[1])
            kept = rearrange(kept, "n 1 1 -> 1 n 1")
        return branch * kept / (1 - self.drop_path)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context, never with a stored score matrix."""

    def __init__(self, width: int, heads: int, *, inner_norm: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that the heads divide, got width {width} and {heads} heads")
        self.heads = heads
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.inner_norm = nn.LayerNorm(width) if inner_norm else nn.Identity()
        self.out = nn.Linear(width, width)

    def forward(
        self,
        tokens: Float[Tensor, "b n d"],
        rotation: Float[Tensor, "*b n 2 r"] | None = None,
        context: Float[Tensor, "b k d"] | None = None,
        context_rotation: Float[Tensor, "*b k 2 r"] | None = None,
        packing: Packing | None = None,
    ) -> Float[Tensor, "b n d"]:
        if context is None:
            query, key, value = self._heads(self.qkv(tokens), rotation, turned=2)
        else:
            sizes = [tokens.shape[2], 2 * tokens.shape[2]]
            weights, biases = self.qkv.weight.split(sizes), self.qkv.bias.split(sizes)
            (query,) = self._heads(functional.linear(tokens, weights[0], biases[0]), rotation, turned=1)
            projected = functional.linear(context, weights[1], biases[1])
            key, value = self._heads(projected, context_rotation, turned=1)
        scale = self.head_width**-0.5
        if packing is None:
            mixed = functional.scaled_dot_product_attention(query, key, value, scale=scale)
        else:
            mixed = packed_attention(query, key, value, packing, scale=scale)
        return self.out(self.inner_norm(rearrange(mixed[..., : self.head_width], "b h n w -> b n (h w)")))

    def _heads(
        self, projected: Float[Tensor, "b n parts_d"], rotation: Float[Tensor, "*b n 2 r"] | None, *, turned: int
    ) -> Sequence[Float[Tensor, "b h n padded"]]:
        """Split a projection into heads; the first `turned` parts of it are queries and keys, which have a place."""
        heads = rearrange(projected, "b n (parts h w) -> parts b h n w", h=self.heads, w=self.head_width)
        # zeros add nothing to a scalar product and give zeros in the values: the same result, on a faster kernel
        padding = -self.head_width % KERNEL_WIDTH
        if rotation is not None:
            heads = rotated(heads, rotation, turned=turned, padding=padding)
        elif padding:
            heads = functional.pad(heads, (0, padding))
        return heads.unbind(0)


def plain_mlp(width: int) -> nn.Sequential:
    """Build the MLP of a `vit` block."""
    return nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202) with a norm before its last layer.

    It has as many weights as the plain MLP: three matrices, each two thirds as wide.
    """

    def __init__(self, width: int):
        super().__init__()
        hidden = int(width * MLP_RATIO * 2 / 3)
        self.gate, self.value = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.out(self.norm(functional.silu(self.gate(tokens)) * self.value(tokens)))


class LayerScale(nn.Module):
    """A learned factor for each feature of a branch (Touvron et al. 2021, https://arxiv.org/abs/2103.17239)."""

    def __init__(self, width: int):
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, branch: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return branch * self.factor


def _reset_linear(module: nn.Module) -> None:
    """Use Glorot initialisation, as in the original MAE."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
