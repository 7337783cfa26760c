"""Tokens, positions, masks, transformer and segmenter: against literal loops and arithmetic done by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.decoders.upscale import UpscaleDecoder, doublings
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import count_visible, split_tokens, take
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import Tokenizer, grid_of, patchify, unpatchify, voxels_inside
from nnunet_vit_mae.networks.transformer import Attention, Block, Transformer
from nnunet_vit_mae.presets import DECODERS, TOKEN_SIDES, Network

CPU = torch.device("cpu")
TOKENS = [(2, 4, 8), (8, 4, 2), (4, 4, 4)]
UNEVEN = (5, 9, 19)  # no token above divides all of its sides, and no two sides give equal grids

tokens = st.tuples(*[st.sampled_from((1, 2, 4, 8))] * 3)
unequal_sides = st.lists(st.integers(1, 13), min_size=3, max_size=3, unique=True)
volume_shapes = st.tuples(st.integers(2, 3), st.integers(2, 3), unequal_sides).map(lambda s: (s[0], s[1], *s[2]))
grids = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))
few = settings(max_examples=25, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_volume(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def segmenter(decoder: str, token: tuple[int, int, int], channels: int = 2, classes: int = 3, drop_path: float = 0.0):
    torch.manual_seed(0)
    return build_segmenter(Network(size="XS", token=token, decoder=decoder), channels, classes, drop_path=drop_path)


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
def test_padding_lies_at_the_far_end_and_is_zero(shape, token):
    volume = torch.ones(shape)
    back = unpatchify(patchify(volume, token), grid_of(volume, token), token)
    z, y, x = shape[2:]
    back[:, :, :z, :y, :x] = 0
    assert not back.any()


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
def test_voxels_inside_are_as_many_as_the_volume_has(shape, token):
    inside = voxels_inside(torch.zeros(shape), token)
    assert inside.unique().tolist() in ([0.0, 1.0], [1.0])
    assert inside.sum().item() == math.prod(shape[2:])


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


# ---------- positions


@few
@given(grid=grids, width=st.integers(1, 40))
def test_positions_have_a_row_per_token_and_the_width(grid, width):
    assert sine_cosine_positions(grid, width, CPU).shape == (math.prod(grid), width)


@few
@given(grid=grids, other=grids, width=st.integers(6, 40))
def test_a_place_has_the_same_position_in_every_grid(grid, other, width):
    shared = tuple(map(min, grid, other))
    first, second = (
        sine_cosine_positions(g, width, CPU).reshape(*g, width)[: shared[0], : shared[1], : shared[2]]
        for g in (grid, other)
    )
    assert torch.allclose(first, second, rtol=0, atol=1e-6)


@few
@given(grid=grids, width=st.integers(6, 40))
def test_all_positions_of_a_grid_differ(grid, width):
    positions = sine_cosine_positions(grid, width, CPU)
    distances = torch.cdist(positions, positions) + 10 * torch.eye(len(positions))
    assert distances.min() > 0.1


def test_positions_are_sines_and_cosines_of_z_then_y_then_x():
    positions = sine_cosine_positions((3, 4, 5), 14, CPU).reshape(3, 4, 5, 14)
    expected = []
    for place in (2, 1, 4):  # z y x; two frequencies: 1 and 10000 ** -0.5
        expected += [math.sin(place), math.sin(place / 100), math.cos(place), math.cos(place / 100)]
    assert positions[2, 1, 4].tolist() == pytest.approx([*expected, 0, 0], abs=1e-6)


@few
@given(width=st.integers(6, 40))
def test_what_six_does_not_divide_of_the_width_stays_zero(width):
    positions = sine_cosine_positions((2, 3, 4), width, CPU)
    used = width // 6 * 6
    assert not positions[:, used:].any()
    assert positions[:, :used].any(dim=0).all()


def test_positions_first_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        positions = sine_cosine_positions((3, 1, 11), 13, CPU)  # a grid that no other test has
    weight = torch.ones(13, requires_grad=True)
    (positions * weight).sum().backward()
    assert not positions.is_inference()
    assert torch.equal(weight.grad, positions.sum(0))


def test_a_training_step_leaves_the_cached_positions_as_they_were():
    network = segmenter("mae", (2, 4, 8))
    before = [sine_cosine_positions((3, 3, 3), width, CPU).clone() for width in (96, 48)]
    network(random_volume(2, 2, *UNEVEN)).sum().backward()
    after = [sine_cosine_positions((3, 3, 3), width, CPU) for width in (96, 48)]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_stores_nothing_but_its_parameters(decoder):
    network = segmenter(decoder, (2, 4, 8))
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    assert not any("position" in name for name in network.state_dict())


def test_an_autoencoder_stores_nothing_but_its_parameters():
    network = build_autoencoder(Network(size="XS", token=(2, 4, 8)), 2, mask_ratio=0.5)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    assert not any("position" in name for name in network.state_dict())


# ---------- masking


@few
@given(b=st.integers(2, 4), n=st.integers(1, 60), ratio=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_each_token_is_either_visible_or_hidden(b, n, ratio, seed):
    visible, hidden = split_tokens(torch.rand(b, n, generator=seeded(seed)), ratio)
    for v, h in zip(visible.tolist(), hidden.tolist(), strict=True):
        assert sorted(v + h) == list(range(n))


@few
@given(n=st.integers(1, 5000), ratio=st.floats(0.01, 0.99))
def test_the_visible_tokens_are_the_rounded_share_and_at_least_one(n, ratio):
    visible, hidden = split_tokens(torch.rand(2, n, generator=seeded()), ratio)
    assert visible.shape[1] == max(1, round(n * (1 - ratio))) == n - hidden.shape[1]


@pytest.mark.parametrize(("n", "ratio", "visible"), [(1000, 0.9, 100), (512, 0.9, 51), (36, 0.75, 9), (3, 0.9, 1)])
def test_known_numbers_of_visible_tokens(n, ratio, visible):
    assert count_visible(n, ratio) == visible


@few
@given(n=st.integers(2, 40), ratio=st.floats(0.1, 0.9), seed=st.integers(0, 99))
def test_the_tokens_with_the_lowest_noise_stay_visible(n, ratio, seed):
    noise = torch.rand(3, n, generator=seeded(seed))
    visible, hidden = split_tokens(noise, ratio)
    if hidden.shape[1]:
        assert (take(noise, visible).amax(1) <= take(noise, hidden).amin(1)).all()


@few
@given(order=st.permutations(range(4)), seed=st.integers(0, 99))
def test_a_mask_depends_on_the_noise_of_its_own_sample_only(order, seed):
    noise = torch.rand(4, 31, generator=seeded(seed))
    straight, permuted = split_tokens(noise, 0.7), split_tokens(noise[list(order)], 0.7)
    assert all(torch.equal(s[list(order)], p) for s, p in zip(straight, permuted, strict=True))


@few
@given(b=st.integers(2, 4), n=st.integers(1, 9), k=st.integers(0, 9), rest=st.lists(st.integers(1, 3), max_size=2))
def test_take_equals_a_loop(b, n, k, rest):
    values = random_volume(b, n, *rest)
    index = torch.randint(n, (b, k), generator=seeded())
    expected = torch.empty(b, k, *rest)
    for sample, place in itertools.product(range(b), range(k)):
        expected[sample, place] = values[sample, index[sample, place]]
    assert torch.equal(take(values, index), expected)


# ---------- transformer


def literal_attention(attention: Attention, tokens: np.ndarray, heads: int) -> np.ndarray:
    """One sample (n d), head by head and query by query."""
    n, width = tokens.shape
    head = width // heads
    qkv = tokens @ attention.qkv.weight.detach().numpy().T + attention.qkv.bias.detach().numpy()
    mixed = np.zeros((n, width))
    for h in range(heads):
        part = slice(h * head, (h + 1) * head)
        q, k, v = qkv[:, :width][:, part], qkv[:, width : 2 * width][:, part], qkv[:, 2 * width :][:, part]
        for i in range(n):
            weights = np.exp([q[i] @ k[j] / math.sqrt(head) for j in range(n)])
            mixed[i, part] = (weights / weights.sum()) @ v
    return mixed @ attention.out.weight.detach().numpy().T + attention.out.bias.detach().numpy()


@pytest.mark.parametrize(("width", "heads"), [(30, 3), (32, 2), (20, 4)])  # heads 10, 16 and 5 wide
def test_attention_equals_a_literal_softmax(width, heads):
    torch.manual_seed(0)
    attention = Attention(width, heads).double()
    batch = torch.randn(2, 7, width, dtype=torch.float64)
    expected = np.stack([literal_attention(attention, sample.numpy(), heads) for sample in batch])
    np.testing.assert_allclose(attention(batch).detach().numpy(), expected, rtol=0, atol=1e-12)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 32 and 3 heads"):
        Attention(32, 3)


def attention_only_block(drop_path: float) -> Block:
    """A block whose MLP adds nothing, so that one drop alone decides about the output."""
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
@given(order=st.permutations(range(12)))
def test_the_encoder_gives_each_visible_token_the_position_of_its_place(order):
    torch.manual_seed(0)
    encoder = Encoder(Tokenizer(2, (1, 2, 4), 30), Transformer(30, 2, 3), token=(1, 2, 4), width=30).double()
    patches = torch.randn(2, 12, 2, 8, dtype=torch.float64)
    index = torch.tensor([list(order), list(reversed(order))])
    assert torch.allclose(encoder(patches, (1, 3, 4), index), take(encoder(patches, (1, 3, 4)), index), atol=1e-10)


# ---------- decoders


@few
@given(token=st.tuples(*[st.sampled_from(TOKEN_SIDES)] * 3))
def test_doublings_end_at_the_voxels_and_are_as_many_as_the_longest_side_needs(token):
    factors = doublings(token)
    assert tuple(math.prod(factor[axis] for factor in factors) for axis in range(3)) == token
    assert 2 ** len(factors) == max(token)


def test_doublings_take_short_sides_first():
    assert doublings((2, 8, 4)) == [(2, 2, 2), (1, 2, 2), (1, 2, 1)]


def test_the_upscale_decoder_ends_at_a_sixteenth_of_the_width_and_halves_towards_it():
    decoder = UpscaleDecoder(240, token=(2, 8, 4), classes=3)
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv3d)]
    assert [c.in_channels for c in convolutions] == [240, 64, 32, 16]


def test_without_doublings_each_voxels_logits_come_from_its_own_token():
    torch.manual_seed(0)
    decoder = UpscaleDecoder(6, token=(1, 1, 1), classes=3)
    embedded, logits = random_volume(2, 24, 6), torch.empty(2, 3, 2, 3, 4)
    weight, bias = decoder.head.weight.detach().flatten(1), decoder.head.bias.detach()
    for b, z, y, x in itertools.product(range(2), range(2), range(3), range(4)):
        logits[b, :, z, y, x] = weight @ embedded[b, (z * 3 + y) * 4 + x] + bias
    assert torch.allclose(decoder(embedded, (2, 3, 4)), logits, atol=1e-6)


def test_a_token_changes_its_own_voxels_and_none_that_convolutions_do_not_reach():
    torch.manual_seed(0)
    decoder = UpscaleDecoder(12, token=(2, 4, 8), classes=3)
    for stage in decoder.stages:
        stage[2] = nn.Identity()  # the norm, which looks at the whole volume
    embedded = random_volume(2, 5 * 4 * 3, 12)
    other = embedded.clone()
    other[1, (2 * 4 + 1) * 3 + 0] += 1.0  # token (2, 1, 0) of a 5 x 4 x 3 grid
    with torch.no_grad():
        touched = (decoder(embedded, (5, 4, 3)) != decoder(other, (5, 4, 3))).any(1)
    assert touched.shape == (2, 10, 16, 24)
    assert not touched[0].any()
    assert touched[1, 4:6, 4:8, 0:8].all()
    touched[1, 1:9, 0:12, 0:15] = False  # convolutions on cells of 1 x 2 x 4, 1 x 1 x 2 and 1 x 1 x 1 voxels
    assert not touched.any()


def test_the_mae_decoders_outputs_are_classes_then_voxels():
    decoder = segmenter("mae", (2, 4, 8), classes=3).decoder
    with torch.no_grad():
        decoder.decoder.head.weight.zero_()
        decoder.decoder.head.bias.copy_(torch.arange(3 * 64))
        logits = decoder(random_volume(2, 6, 96), (1, 2, 3))
    # voxel (1, 6, 21) is in token (0, 1, 2), at (1, 2, 5): (1 * 4 + 2) * 8 + 5 = 53
    assert logits[:, :, 1, 6, 21].tolist() == [[53, 64 + 53, 128 + 53]] * 2


# ---------- segmenter


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_have_the_volumes_shape_and_every_parameter_a_gradient(decoder, token, channels, classes):
    network = segmenter(decoder, token, channels, classes, drop_path=0.1).train()
    logits = network(random_volume(2, channels, *UNEVEN))
    assert logits.shape == (2, classes, *UNEVEN)
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_weight_of_a_segmenter_matters(decoder, token):
    network = segmenter(decoder, token)
    volume = random_volume(2, 2, *UNEVEN)
    (network(volume) * random_volume(2, 3, *UNEVEN, seed=1)).sum().backward()
    idle = [name for name, p in network.named_parameters() if p.ndim > 1 and not p.grad.any()]
    assert idle == []


@settings(max_examples=12, deadline=None)
@given(shape=volume_shapes, token=st.sampled_from(TOKENS), decoder=st.sampled_from(sorted(DECODERS)))
def test_a_segmenter_takes_any_volume_in_evaluation(shape, token, decoder):
    b, _, *sides = shape
    with torch.no_grad():
        logits = segmenter(decoder, token).eval()(random_volume(b, 2, *sides))
    assert logits.shape == (b, 3, *sides)
    assert logits.isfinite().all()


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_treats_each_sample_for_itself(decoder):
    network = segmenter(decoder, (2, 4, 8), drop_path=0.5).eval()
    volume = random_volume(3, 2, *UNEVEN)
    with torch.no_grad():
        one_by_one = torch.cat([network(sample[None]) for sample in volume])
        assert torch.allclose(network(volume), one_by_one, atol=1e-5)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_reloaded_segmenter_gives_the_same_logits(decoder, token):
    network = segmenter(decoder, token, drop_path=0.3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=seeded()))
    torch.manual_seed(1)
    fresh = build_segmenter(Network(size="XS", token=token, decoder=decoder), 2, 3, drop_path=0.3).eval()
    volume = random_volume(2, 2, *UNEVEN)
    with torch.no_grad():
        assert not torch.equal(fresh(volume), network(volume))
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(volume), network(volume))


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_outer_autocast_does_not_lower_the_precision(decoder):
    network = segmenter(decoder, (2, 4, 8)).eval()
    volume = random_volume(2, 2, *UNEVEN)
    with torch.no_grad():
        plain = network(volume)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(network(volume), plain)


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_are_float32_in_whatever_precision_the_network_works(decoder):
    network = segmenter(decoder, (2, 4, 8)).double().eval()
    assert network(random_volume(2, 2, *UNEVEN).double()).dtype == torch.float32


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_pretrained_encoder_fits_the_segmenter(decoder):
    network = Network(size="XS", token=(2, 4, 8), decoder=decoder)
    pretrained = build_autoencoder(network, 2, mask_ratio=0.5).encoder.state_dict()
    segmenter(decoder, (2, 4, 8)).encoder.load_state_dict(pretrained, strict=True)


@pytest.mark.parametrize(("decoder", "lr"), [("mae", 1e-3), ("upscale", 5e-3)])
def test_a_segmenter_can_overfit_a_batch(decoder, lr):
    network = segmenter(decoder, (2, 4, 8)).train()
    volume = random_volume(2, 2, *UNEVEN)
    labels = torch.zeros(2, *UNEVEN, dtype=torch.long)
    labels[0, 1:4, 2:7, 3:12] = 1
    labels[1, 3:, 5:, :6] = 2
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    losses = []
    for _ in range(120):
        loss = functional.cross_entropy(network(volume), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    predicted = network(volume).argmax(1)
    assert (predicted == labels)[labels > 0].float().mean() > 0.8


# ---------- sizes of the papers


@pytest.mark.parametrize(("size", "millions"), [("S", 9.94), ("M", 39.29), ("L", 156.23)])
def test_autoencoders_have_the_papers_numbers_of_parameters(size, millions):
    network = build_autoencoder(Network(size=size, token=(8, 8, 8)), 1, mask_ratio=0.9)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
