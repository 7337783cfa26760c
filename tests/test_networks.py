"""Test tokens, transformer and encoder against literal loops and arithmetic done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import random_volume, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import take
from nnunet_vit_mae.networks.positions import Positions
from nnunet_vit_mae.networks.tokenizer import Tokenizer, grid_of, padded, patchify, unpatchify, voxels_inside
from nnunet_vit_mae.networks.transformer import Attention, Block, Transformer

tokens = st.tuples(*[st.sampled_from((1, 2, 4, 8))] * 3)
unequal_sides = st.lists(st.integers(1, 13), min_size=3, max_size=3, unique=True)
volume_shapes = st.tuples(st.integers(2, 3), st.integers(2, 3), unequal_sides).map(lambda s: (s[0], s[1], *s[2]))
few = settings(max_examples=25, deadline=None)


# ---------- volumes to tokens and back


@few
@given(shape=volume_shapes, token=tokens)
def test_unpatchify_undoes_patchify_once_the_padding_is_cut_off(shape, token):
    volume = random_volume(*shape)
    back = unpatchify(patchify(volume, token), grid_of(volume, token), token)
    z, y, x = shape[2:]
    assert torch.equal(back[:, :, :z, :y, :x], volume)


@few
@given(shape=volume_shapes, token=tokens)
def test_patchify_undoes_unpatchify(shape, token):
    b, c, *grid = shape
    patches = random_volume(b, math.prod(grid), c, math.prod(token))
    assert torch.equal(patchify(unpatchify(patches, tuple(grid), token), token), patches)


@few
@given(shape=volume_shapes, token=tokens)
def test_padding_lies_at_the_far_end_and_is_zero_up_to_whole_tokens(shape, token):
    volume = random_volume(*shape)
    b, c, z, y, x = shape
    expected = torch.zeros(b, c, *(side * math.ceil(n / side) for side, n in zip(token, (z, y, x), strict=True)))
    expected[:, :, :z, :y, :x] = volume
    assert torch.equal(padded(volume, token), expected)
    assert torch.equal(unpatchify(patchify(volume, token), grid_of(volume, token), token), expected)


def test_tokens_are_in_the_order_z_y_x_and_so_are_their_voxels():
    volume = random_volume(2, 3, 5, 9, 31)  # a grid of 3 x 3 x 4
    patches = patchify(volume, (2, 4, 8))
    assert patches.shape == (2, 36, 3, 64)
    # voxel (3, 6, 21) is in token (1, 1, 2), number (1 * 3 + 1) * 4 + 2 = 18, at (1, 2, 5): (1 * 4 + 2) * 8 + 5 = 53
    assert torch.equal(patches[:, 18, :, 53], volume[:, :, 3, 6, 21])


def test_the_grid_is_rounded_up_along_each_axis():
    assert grid_of(torch.zeros(2, 2, 5, 8, 17), (2, 4, 8)) == (3, 2, 3)


@few
@given(shape=volume_shapes, token=tokens)
def test_voxels_inside_are_those_of_the_volume(shape, token):
    volume = torch.rand(shape, generator=seeded()) + 1  # never zero, unlike the padding
    expected = (patchify(volume, token)[:1, :, :1] != 0).float()
    assert torch.equal(voxels_inside(volume, token), expected)


def test_the_tokenizer_is_one_linear_map_of_all_channels_of_a_token():
    torch.manual_seed(0)
    tokenizer = Tokenizer(3, (1, 2, 4), 12).double()
    patches = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in (tokenizer.projection.weight, tokenizer.projection.bias))
    embedded = tokenizer(patches).detach().numpy()
    for b, n in itertools.product(range(2), range(5)):
        np.testing.assert_allclose(embedded[b, n], weight @ patches[b, n].numpy().reshape(-1) + bias)


# ---------- transformer


def literal_attention(attention: Attention, tokens: np.ndarray, context: np.ndarray, heads: int) -> np.ndarray:
    """Attend from one sample (n d) to its context (k d), head by head and query by query."""
    n, width = tokens.shape
    head = width // heads
    weight, bias = attention.qkv.weight.detach().numpy(), attention.qkv.bias.detach().numpy()
    queries, qkv = tokens @ weight.T + bias, context @ weight.T + bias
    mixed = np.zeros((n, width))
    for h in range(heads):
        part = slice(h * head, (h + 1) * head)
        q, k, v = queries[:, :width][:, part], qkv[:, width : 2 * width][:, part], qkv[:, 2 * width :][:, part]
        for i in range(n):
            weights = np.exp([q[i] @ k[j] / math.sqrt(head) for j in range(len(context))])
            mixed[i, part] = (weights / weights.sum()) @ v
    return mixed @ attention.out.weight.detach().numpy().T + attention.out.bias.detach().numpy()


@pytest.mark.parametrize(("width", "heads"), [(30, 3), (32, 2), (20, 4)])  # heads 10, 16 and 5 wide
def test_attention_equals_a_literal_softmax(width, heads):
    torch.manual_seed(0)
    attention = Attention(width, heads).double()
    batch, other = (torch.randn(2, n, width, dtype=torch.float64) for n in (7, 4))
    for context, parts in ((batch, (batch,)), (other, (batch, None, other))):
        pairs = zip(batch.numpy(), context.numpy(), strict=True)
        expected = np.stack([literal_attention(attention, *pair, heads) for pair in pairs])
        np.testing.assert_allclose(attention(*parts).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 32 and 3 heads"):
        Attention(32, 3)


def attention_only_block(drop_path: float) -> Block:
    """Build a block whose MLP adds nothing, so that a single drop decides about the output."""
    torch.manual_seed(0)
    block = Block(30, 3, drop_path=drop_path)
    nn.init.zeros_(block.mlp[2].weight)
    nn.init.zeros_(block.mlp[2].bias)
    return block


def test_drop_path_is_off_in_evaluation():
    dropping, plain = attention_only_block(0.5).eval(), attention_only_block(0.0)
    batch = random_volume(16, 5, 30)
    assert torch.equal(dropping(batch), plain(batch))


def test_drop_path_leaves_a_branch_out_for_whole_samples():
    block = attention_only_block(0.4)
    batch = random_volume(64, 5, 30)
    branch = block.eval()(batch) - batch
    trained = block.train()(batch) - batch
    kept = [torch.allclose(t, b / 0.6, atol=1e-5) for t, b in zip(trained, branch, strict=True)]
    dropped = [not t.any().item() for t in trained]
    assert all(k != d for k, d in zip(kept, dropped, strict=True))
    assert any(kept)
    assert any(dropped)


def test_drop_path_keeps_the_mean_in_training():
    block = attention_only_block(0.4)
    one = random_volume(1, 3, 30)
    branch = block.eval()(one) - one
    trained = (block.train()(one.expand(4000, -1, -1)) - one).mean(0, keepdim=True)
    assert torch.allclose(trained, branch, rtol=0.06, atol=1e-5)  # 0.06 is over four deviations of such a mean


def test_drop_path_rises_from_zero_with_the_depth():
    rates = [block.drop_path for block in Transformer(12, 4, 2, drop_path=0.3).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


@few
@given(taps=st.lists(st.integers(1, 4), max_size=6))
def test_hidden_states_are_what_the_tapped_blocks_gave_counted_from_one(taps):
    torch.manual_seed(0)
    transformer = Transformer(12, 4, 2)
    batch = random_volume(2, 5, 12)
    last, states = batch, []
    for block in transformer.blocks:
        last = block(last)
        states.append(last)
    output, hidden = transformer.with_hidden(batch, None, taps)
    assert torch.equal(output, transformer.norm(last))
    assert torch.equal(output, transformer(batch))
    assert all(torch.equal(state, states[number - 1]) for number, state in zip(taps, hidden, strict=True))


def test_a_transformer_with_a_context_mixes_no_tokens():
    torch.manual_seed(0)
    transformer = Transformer(12, 3, 2).double()
    batch, context = (torch.randn(2, n, 12, dtype=torch.float64) for n in (5, 7))
    together = transformer(batch, context=context)
    alone = torch.cat([transformer(batch[:, i : i + 1], context=context) for i in range(5)], dim=1)
    assert torch.allclose(together, alone, rtol=0, atol=1e-12)
    assert not torch.allclose(together, transformer(batch, context=context.flip(0)), rtol=0, atol=1e-3)


# ---------- encoder


def encoder(token: tuple[int, int, int]) -> Encoder:
    torch.manual_seed(0)
    parts = Tokenizer(2, token, 30), Transformer(30, 2, 3)
    return Encoder(*parts, token=token, positions=Positions("sine_cosine")).double()


@few
@given(order=st.permutations(range(12)))
def test_the_encoder_gives_each_visible_token_the_position_of_its_place(order):
    network = encoder((1, 2, 4))
    patches = torch.randn(2, 12, 2, 8, dtype=torch.float64)
    index = torch.tensor([list(order), list(reversed(order))])
    ordered = network(patches, (1, 3, 4), torch.arange(12).expand(2, -1))
    assert torch.allclose(network(patches, (1, 3, 4), index), take(ordered, index), atol=1e-10)


@few
@given(shape=volume_shapes, token=tokens)
def test_encoding_a_volume_is_encoding_all_its_tokens(shape, token):
    network, volume = encoder(token), random_volume(shape[0], 2, *shape[2:]).double()
    encoded = network.encode(volume, (2, 1))
    every = torch.arange(math.prod(encoded.grid)).expand(shape[0], -1)
    assert torch.allclose(encoded.tokens, network(patchify(volume, token), encoded.grid, every), rtol=0, atol=1e-10)
    assert torch.equal(encoded.tokens, network.transformer.norm(encoded.hidden[0]))
    assert torch.equal(encoded.hidden[0], network.transformer.blocks[1](encoded.hidden[1]))
    assert torch.equal(encoded.volume, padded(volume, token))
    assert encoded.grid == grid_of(volume, token)
