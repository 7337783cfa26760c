"""A pre-norm transformer (Dosovitskiy et al. 2021), the trunk of encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

MLP_RATIO = 4
KERNEL_WIDTH = 16  # attention kernels work on multiples of it; the papers' heads are 10, 20, 40 and 80 wide


class Transformer(nn.Module):
    """Blocks and a final norm; tokens in, tokens of the same shape out."""

    def __init__(self, width: int, depth: int, heads: int, *, drop_path: float = 0.0):
        super().__init__()
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(Block(width, heads, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(width)
        self.apply(_reset_linear)

    def forward(
        self, tokens: Float[Tensor, "b n d"], context: Float[Tensor, "b k d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        """The tokens attend to one another, or only to the tokens of `context`, which stay as they are."""
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.norm(tokens)

    def with_hidden(
        self, tokens: Float[Tensor, "b n d"], taps: Sequence[int]
    ) -> tuple[Float[Tensor, "b n d"], list[Float[Tensor, "b n d"]]]:
        """The output, and what the tapped blocks (counted from 1) gave on the way there, before any final norm."""
        hidden = {}
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens)
            if number in taps:
                hidden[number] = tokens
        return self.norm(tokens), [hidden[number] for number in taps]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int, heads: int, *, drop_path: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))
        self.drop_path = drop_path

    def forward(
        self, tokens: Float[Tensor, "b n d"], context: Float[Tensor, "b k d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        tokens = tokens + self._maybe_dropped(self.attention(self.attention_norm(tokens), context))
        return tokens + self._maybe_dropped(self.mlp(self.mlp_norm(tokens)))

    def _maybe_dropped(self, branch: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Stochastic depth (Huang et al. 2016): in training, leave a branch out for a random part of the batch."""
        if not self.training or self.drop_path == 0:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)


class Attention(nn.Module):
    """Multi-head attention of tokens to themselves or to a context, never with a stored score matrix."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"expected a width that the heads divide, got width {width} and {heads} heads")
        self.heads = heads
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, tokens: Float[Tensor, "b n d"], context: Float[Tensor, "b k d"] | None = None
    ) -> Float[Tensor, "b n d"]:
        if context is None:
            query, key, value = self._heads(self.qkv(tokens))
        else:
            width = tokens.shape[2]
            (query,) = self._heads(functional.linear(tokens, self.qkv.weight[:width], self.qkv.bias[:width]))
            key, value = self._heads(functional.linear(context, self.qkv.weight[width:], self.qkv.bias[width:]))
        mixed = functional.scaled_dot_product_attention(query, key, value, scale=self.head_width**-0.5)
        return self.out(rearrange(mixed[..., : self.head_width], "b h n w -> b n (h w)"))

    def _heads(self, projected: Float[Tensor, "b n parts_d"]) -> Float[Tensor, "parts b h n padded"]:
        heads = rearrange(projected, "b n (parts h w) -> parts b h n w", h=self.heads, w=self.head_width)
        # zeros add nothing to a scalar product and give zeros in the values: the same result, on a faster kernel
        return functional.pad(heads, (0, -self.head_width % KERNEL_WIDTH))


def _reset_linear(module: nn.Module) -> None:
    """Glorot initialisation, as in the original MAE."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
