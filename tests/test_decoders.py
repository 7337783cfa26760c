"""Test segmentation decoders and the segmenter: shapes, places, connections, and that every weight learns."""

import itertools
import math
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from conftest import SIDES, random_volume, small_unet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks import decoders as decoders_package
from nnunet_vit_mae.networks.blueprint import Blueprint
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.decoders import upscale
from nnunet_vit_mae.networks.decoders.expanding_path import ResidualBlock
from nnunet_vit_mae.networks.decoders.unetr import shares
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.segmenter import Segmenter, prior_logits, start_from
from nnunet_vit_mae.networks.tokenizer import doublings, padded, stage_widths
from nnunet_vit_mae.networks.upsampling import as_map, narrowest_width, upsampling
from nnunet_vit_mae.presets import DECODERS, SIZES, UPSAMPLINGS
from nnunet_vit_mae.settings import TOKEN_SIDES, Network, Pretraining, Triple

TOKEN = (2, 4, 8)
VOLUMES = {  # for each token three unequal sides that it does not divide; unequal numbers of tokens but for the largest
    (4, 4, 4): (3, 5, 9),
    (8, 8, 8): (5, 9, 19),
    (16, 16, 16): (5, 9, 19),
    (2, 8, 8): (5, 9, 3),
    (8, 4, 2): (5, 9, 3),
    (1, 1, 1): (3, 5, 7),
}
UPSAMPLED = ("unetr", "sfpn", "upscale")  # decoders that `upsampling` and `decoder_width` concern
SAME_RESOLUTION = (1, 1)  # strides of a U-Net that takes volumes of any sides
FEW_TOKENS = {TOKEN: SIDES, (32, 4, 2): (5, 7, 9), (1, 1, 1): (3, 5, 7)}

kinds = st.sampled_from(sorted(UPSAMPLINGS))
of_tokens = st.sampled_from(sorted(DECODERS.keys() - {"unet"}))
tokens = st.tuples(*[st.sampled_from((1, 2, 4, 8))] * 3)
factors = st.tuples(*[st.sampled_from((1, 2))] * 3)
unequal_sides = st.lists(st.integers(1, 13), min_size=3, max_size=3, unique=True)
few = settings(max_examples=25, deadline=None)


def segmenter(
    decoder: str, token: Triple = TOKEN, channels: int = 2, classes: int = 3, *, drop_path=0.0, seed=0, **choices
) -> Segmenter:
    torch.manual_seed(seed)
    network = Network(size="XS", token=token, decoder=decoder, **choices)
    unet = partial(small_unet, channels, classes, SAME_RESOLUTION)
    built = build_segmenter(network, channels, classes, drop_path=drop_path, unet=unet)
    if decoder == "unet":
        nn.init.normal_(built.decoder.projection.weight)  # it starts at zero, where the encoder does not matter yet
    return built


def encoded(token: Triple, grid: Triple, *, width: int = 96, taps: int = 0) -> Encoded:
    """Return what an encoder could give for two samples with two channels, in double precision."""
    states = random_volume(1 + taps, 2, math.prod(grid), width).double()
    z, y, x = (side * n for side, n in zip(token, grid, strict=True))
    volume = random_volume(2, 2, z, y, x, seed=1).double()
    return Encoded(states[0], list(states[1:]), volume, grid, (z, y, x))


# ---------- the registry


def test_the_decoders_are_the_modules_of_their_names():
    modules = {module.name: import_module(f"{decoders_package.__name__}.{module.name}") for module in iter_modules(
        decoders_package.__path__
    )}  # fmt: skip
    assert {name for name, module in modules.items() if hasattr(module, "build")} == set(DECODERS)
    for name in DECODERS:
        network = Network(size="XS", token=TOKEN, decoder=name)
        unet = partial(small_unet, 2, 3, SAME_RESOLUTION)
        built = modules[name].build(Blueprint(network=network, channels=2, classes=3, unet=unet))
        assert isinstance(built, nn.Module)
        assert type(built).__module__ == modules[name].__name__


# ---------- from the token grid towards voxels


@few
@given(token=st.tuples(*[st.sampled_from(TOKEN_SIDES)] * 3))
def test_doublings_end_at_the_voxels_and_are_as_many_as_the_longest_side_needs(token):
    steps = doublings(token)
    assert tuple(math.prod(factor[axis] for factor in steps) for axis in range(3)) == token
    assert 2 ** len(steps) == max(token)


def test_doublings_take_short_sides_first():
    assert doublings((2, 8, 4)) == [(2, 2, 2), (1, 2, 2), (1, 2, 1)]


def test_stages_halve_their_width_down_to_the_narrowest():
    assert stage_widths(16, 4) == [128, 64, 32, 16]
    assert stage_widths(8, 1) == [8]
    assert stage_widths(8, 0) == []


@pytest.mark.parametrize(("size", "width"), [("XS", 8), ("S", 16), ("M", 32), ("B", 48), ("L", 64)])
def test_the_narrowest_width_is_a_sixteenth_of_the_encoders_in_steps_of_eight(size, width):
    assert narrowest_width(SIZES[size].width) == width


@few
@given(grid=st.tuples(*[st.integers(1, 4)] * 3))
def test_a_map_has_its_tokens_in_the_order_z_y_x(grid):
    states = random_volume(2, math.prod(grid), 3)
    places = as_map(states, grid)
    assert places.shape == (2, 3, *grid)
    for number, (z, y, x) in enumerate(itertools.product(*map(range, grid))):
        assert torch.equal(places[:, :, z, y, x], states[:, number])


def test_values_are_repeated_in_their_own_precision(monkeypatch):
    """On a GPU autocast has fp32 for this, and a step would write and read the largest maps in it for nothing."""
    seen = []

    def interpolate(features, *arguments, **settings):
        seen.append((features.dtype, torch.is_autocast_enabled("cpu")))
        return repeat(features, *arguments, **settings)

    repeat = functional.interpolate
    monkeypatch.setattr(functional, "interpolate", interpolate)
    layers = upsampling("nearest", 3, 5, (1, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        larger = layers(random_volume(2, 3, 2, 3, 4).bfloat16())
    assert seen == [(torch.bfloat16, False)]
    assert larger.dtype == torch.bfloat16


@few
@given(kind=kinds, factor=factors, sides=st.tuples(*[st.integers(1, 4)] * 3))
def test_upsampling_multiplies_the_sides_by_the_factor(kind, factor, sides):
    larger = upsampling(kind, 3, 5, factor)(random_volume(2, 3, *sides))
    assert larger.shape == (2, 5, *(n * side for n, side in zip(factor, sides, strict=True)))


def unevenness(kind: str, factor: Triple) -> float:
    """Return how much the voxels of an upsampled constant map differ away from its border."""
    torch.manual_seed(0)
    constant = random_volume(2, 3, 1, 1, 1).double().expand(2, 3, 3, 4, 5)
    inside = upsampling(kind, 3, 5, factor).double()(constant)[:, :, 1:-1, 1:-1, 1:-1].flatten(2)
    return (inside.amax(2) - inside.amin(2)).max().item()


@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 2), (2, 1, 1)])
def test_only_transposed_convolutions_lay_a_checkerboard_over_a_constant_map(factor):
    assert unevenness("nearest", factor) < 1e-12
    assert unevenness("transposed", factor) > 0.1


# ---------- decoders

REACH = [  # convolutions that a change passes on each level of resolution
    ("upscale", "nearest", "tokens", 1),
    ("upscale", "transposed", "tokens", 0),
    ("unetr", "nearest", "tokens", 3),
    ("unetr", "nearest", "hidden", 3),
    ("unetr", "transposed", "tokens", 2),
    ("unetr", "transposed", "hidden", 2),
]


def touched(decoder: nn.Module, first: Encoded, second: Encoded) -> torch.Tensor:
    """Return where logits differ (b z y x), without the norms, which depend on the whole volume."""
    for module in list(decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.InstanceNorm3d):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        return (decoder.double()(first) != decoder.double()(second)).any(1)


@pytest.mark.parametrize(("decoder", "kind", "part", "convolutions"), REACH)
def test_a_token_changes_its_own_voxels_and_those_that_convolutions_reach(decoder, kind, part, convolutions):
    token, grid = (1, 2, 4), (15, 9, 7)
    given = encoded(token, grid, taps=3 if decoder == "unetr" else 0)
    nudge = torch.zeros_like(given.tokens)
    nudge[1, (7 * 9 + 4) * 7 + 3] = 1.0  # token (7, 4, 3) of sample 1
    others = [given._replace(tokens=given.tokens + nudge)]
    if part == "hidden":  # each of the three states by itself
        others = [
            given._replace(hidden=[state + nudge * (i == n) for i, state in enumerate(given.hidden)]) for n in range(3)
        ]
    z, y, x = (convolutions * cells for cells in (1 + 1, 1 + 1, 2 + 1))  # cells of 1 x 1 x 2 and 1 x 1 x 1 voxels
    expected = torch.zeros(2, 15, 18, 28, dtype=torch.bool)
    expected[1, 7 - z : 8 + z, 8 - y : 10 + y, 12 - x : 16 + x] = True
    decode = segmenter(decoder, token, upsampling=kind).decoder
    for other in others:
        assert torch.equal(touched(decode, given, other), expected)


@pytest.mark.parametrize(("kind", "convolutions"), [("nearest", 3), ("transposed", 2)])
def test_a_token_reaches_further_in_sfpn_through_the_coarsest_level(kind, convolutions):
    given = encoded((1, 2, 4), (40, 9, 7))
    nudge = torch.zeros_like(given.tokens)
    nudge[1, (20 * 9 + 4) * 7 + 3] = 1.0  # token (20, 4, 3) of sample 1; its coarse place has tokens 20 and 21
    changed = touched(
        segmenter("sfpn", (1, 2, 4), upsampling=kind).decoder, given, given._replace(tokens=given.tokens + nudge)
    )
    reach = 2 + 3 * convolutions  # a coarse place beyond, then three stages: no axis but z is long enough to see an end
    expected = torch.zeros(2, 40, 18, 28, dtype=torch.bool)
    expected[1, 20 - reach : 22 + reach] = True
    assert torch.equal(changed, expected)


def test_a_voxel_of_the_image_changes_the_logits_around_it_in_unetr():
    given = encoded((2, 4, 4), (5, 3, 4), taps=3)
    other = given._replace(volume=given.volume.clone())
    other.volume[1, 0, 5, 6, 7] += 1.0
    expected = torch.zeros(2, 10, 12, 16, dtype=torch.bool)
    expected[1, 1:10, 2:11, 3:12] = True  # four convolutions of width 3
    assert torch.equal(touched(segmenter("unetr", (2, 4, 4)).decoder, given, other), expected)


@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"unetr", "unet"}))
def test_other_decoders_build_on_the_last_tokens_alone(decoder):
    network = segmenter(decoder)
    given = encoded(TOKEN, (4, 2, 3))
    other = given._replace(hidden=[given.tokens + 1] * 2, volume=given.volume + 1)
    decode = network.decoder.double()
    assert network.taps == ()
    assert torch.equal(decode(given), decode(other))


def recorded(network: Segmenter, volume: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the first input and the output of every module."""
    seen = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda _, given, output, name=name: seen.update({name: (given[0], output)}))
    with torch.no_grad():
        network(volume)
    return seen


@pytest.mark.parametrize(("taps", "skips"), [(1, 1), (3, 1), (2, 2), (3, 2), (4, 2), (7, 3), (4, 4)])
def test_every_skip_of_unetr_has_a_state_and_coarser_ones_have_at_most_one_more(taps, skips):
    found = shares(taps, skips)
    assert len(found) == skips
    assert sum(found) == taps
    assert found == sorted(found, reverse=True)
    assert 1 <= found[-1] <= found[0] <= found[-1] + 1


@pytest.mark.parametrize(
    ("taps", "early", "late"),  # blocks of the finer and of the coarser skip; by default 2, 3 and 4 are tapped
    [
        ((), [2], [4, 3]),
        ((1, 3), [1], [3]),
        ((2, 2), [2], [2]),
        ((1, 2, 4), [1], [4, 2]),
        ((1, 2, 3, 4), [2, 1], [4, 3]),
    ],
)
def test_unetr_feeds_the_image_to_the_finest_skip_and_later_blocks_to_coarser_ones(taps, early, late):
    volume = random_volume(2, 2, *SIDES)
    seen = recorded(segmenter("unetr", taps=taps), volume)
    blocks = {n: as_map(seen[f"encoder.transformer.blocks.{n - 1}"][1], (4, 2, 3)) for n in (1, 2, 3, 4)}
    assert torch.equal(seen["decoder.expand"][0], as_map(seen["encoder.transformer.norm"][1], (4, 2, 3)))
    assert torch.equal(seen["decoder.skips.0"][0], torch.cat([blocks[n] for n in late], dim=1))
    assert torch.equal(seen["decoder.skips.1"][0], torch.cat([blocks[n] for n in early], dim=1))
    assert torch.equal(seen["decoder.stem"][0], padded(volume, TOKEN))
    shapes = [tuple(seen[f"decoder.{name}"][1].shape[1:]) for name in ("skips.0", "skips.1", "stem")]
    assert shapes == [(32, 8, 4, 6), (16, 8, 8, 12), (8, 8, 8, 24)]
    assert [seen[f"decoder.expand.stages.{i}.block"][1].shape[1:] for i in range(3)] == shapes


@pytest.mark.parametrize("width", [3, 5])
def test_a_residual_block_bends_behind_the_sum_with_its_shortcut(width):
    """As MONAI's `UnetResBlock`, which UNETR's public code has."""
    block, features = ResidualBlock(3, width).double(), random_volume(2, 3, 4, 5, 6).double()
    first, norm, _, second, last = block.convolutions
    total = last(second(functional.leaky_relu(norm(first(features)), 0.01))) + block.shortcut(features)
    assert torch.allclose(block(features), torch.where(total > 0, total, 0.01 * total))
    assert isinstance(block.shortcut, nn.Identity) == (width == 3)


def test_every_level_of_sfpn_comes_from_the_last_map_and_the_coarsest_is_where_the_decoder_begins():
    seen = recorded(segmenter("sfpn"), random_volume(2, 2, *SIDES))
    last = as_map(seen["encoder.transformer.norm"][1], (4, 2, 3))
    assert all(torch.equal(seen[f"decoder.pyramid.{i}"][0], last) for i in range(5))
    assert torch.equal(seen["decoder.to_tokens"][0], seen["decoder.pyramid.0"][1])
    assert torch.equal(seen["decoder.expand"][0], seen["decoder.to_tokens"][1])
    shapes = [tuple(seen[f"decoder.pyramid.{i}"][1].shape[1:]) for i in range(5)]
    assert shapes == [(96, 2, 1, 2), (64, 4, 2, 3), (32, 8, 4, 6), (16, 8, 8, 12), (8, 8, 8, 24)]
    assert seen["decoder.to_tokens.block"][1].shape[1:] == shapes[1]
    assert [seen[f"decoder.expand.stages.{i}.block"][1].shape[1:] for i in range(3)] == shapes[2:]


def test_levels_of_sfpn_have_places_of_mean_0_and_variance_1_at_the_start():
    seen = recorded(segmenter("sfpn"), random_volume(2, 2, *SIDES))
    for number in range(5):
        level = seen[f"decoder.pyramid.{number}"][1]
        assert torch.allclose(level.mean(1), torch.zeros(()), atol=1e-5)
        assert torch.allclose(level.var(1, correction=0), torch.ones(()), atol=1e-2)


def test_upscale_ends_at_a_sixteenth_of_the_width_and_halves_towards_it():
    network = Network(size="S", token=(2, 8, 4), decoder="upscale")
    decoder = upscale.build(Blueprint(network=network, channels=1, classes=3))
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv3d)]
    assert [c.in_channels for c in convolutions] == [240, 64, 32, 16]


@pytest.mark.parametrize("kind", sorted(UPSAMPLINGS))
def test_a_second_convolution_of_upscale_follows_the_upsampling_of_each_stage(kind):
    first, second = (segmenter("upscale", upsampling=kind, upscale_convolutions=number) for number in (1, 2))
    for stage, larger in zip(first.decoder.stages, second.decoder.stages, strict=True):
        assert [type(layer) for layer in larger[:3]] == [type(layer) for layer in stage]
        convolution, *others = larger[3:]
        assert (convolution.in_channels, convolution.kernel_size) == (convolution.out_channels, (3, 3, 3))
        assert [type(layer) for layer in others] == [nn.InstanceNorm3d, nn.LeakyReLU]
    volume = random_volume(2, 2, *SIDES)
    logits = second(volume)
    assert logits.shape == first(volume).shape
    (logits * random_volume(*logits.shape, seed=1)).sum().backward()
    assert all(p.grad.any() for p in second.parameters() if p.ndim > 1)


@pytest.mark.parametrize("decoder", UPSAMPLED)
def test_a_chosen_width_is_that_of_the_last_stage_and_doubles_towards_the_tokens(decoder):
    network = segmenter(decoder, decoder_width=12)
    seen = recorded(network, random_volume(2, 2, *SIDES))
    outputs = {id(module): seen[name][1] for name, module in network.named_modules() if name in seen}
    assert [outputs[id(stage)].shape[1] for stage in network.decoder.stages] == [48, 24, 12]


def test_without_doublings_the_logits_of_upscale_come_from_the_voxels_own_token():
    decoder = upscale.UpscaleDecoder(6, [], factors=[], classes=3, kind="nearest").double()
    given, logits = encoded((1, 1, 1), (2, 3, 4), width=6), torch.empty(2, 3, 2, 3, 4, dtype=torch.float64)
    weight, bias = decoder.head.weight.detach().flatten(1), decoder.head.bias.detach()
    for b, z, y, x in itertools.product(range(2), range(2), range(3), range(4)):
        logits[b, :, z, y, x] = weight @ given.tokens[b, (z * 3 + y) * 4 + x] + bias
    assert torch.allclose(decoder(given), logits)


def test_the_outputs_of_mae_are_classes_then_voxels():
    decoder = segmenter("mae").decoder.double()
    with torch.no_grad():
        decoder.decoder.head.weight.zero_()
        decoder.decoder.head.bias.copy_(torch.arange(3 * 64))
        logits = decoder(encoded(TOKEN, (1, 2, 3)))
    # voxel (1, 6, 21) is in token (0, 1, 2), at (1, 2, 5): (1 * 4 + 2) * 8 + 5 = 53
    assert logits[:, :, 1, 6, 21].tolist() == [[53, 64 + 53, 128 + 53]] * 2


# ---------- segmenter


@pytest.mark.parametrize(("channels", "classes"), [(1, 4), (3, 2)])
@pytest.mark.parametrize("token", VOLUMES, ids=str)
@pytest.mark.parametrize(
    ("decoder", "kind"),
    [(decoder, kind) for decoder in DECODERS for kind in UPSAMPLINGS if kind == "nearest" or decoder in UPSAMPLED],
)
def test_a_segmenter_trains_all_its_parameters_and_predicts_the_same_when_reloaded(
    decoder, kind, token, channels, classes
):
    chosen = {"upsampling": kind, "drop_path": 0.1}
    network = segmenter(decoder, token, channels, classes, **chosen).train()
    volume = random_volume(2, channels, *VOLUMES[token])
    logits = network(volume)
    assert logits.shape == (2, classes, *VOLUMES[token])
    assert logits.dtype == torch.float32
    logits.square().mean().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        fresh = segmenter(decoder, token, channels, classes, seed=1, **chosen).eval()
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(volume), network.eval()(volume))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_trains_in_distributed_processes(decoder):
    network = DistributedDataParallel(segmenter(decoder, drop_path=0.1).train(), find_unused_parameters=False)
    optimizer = torch.optim.AdamW(network.parameters())
    for _ in range(2):  # the second step finds parameters that the first one left out
        optimizer.zero_grad()
        network(random_volume(2, 2, *SIDES)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", UPSAMPLINGS)
@pytest.mark.parametrize("token", FEW_TOKENS, ids=str)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_weight_of_a_segmenter_matters(decoder, token, kind):
    network = segmenter(decoder, token, upsampling=kind)
    logits = network(random_volume(2, 2, *FEW_TOKENS[token]))
    (logits * random_volume(*logits.shape, seed=1)).sum().backward()
    idle = [name for name, p in network.named_parameters() if p.ndim > 1 and not p.grad.any()]
    assert idle == []


@few
@given(sides=unequal_sides, token=tokens, decoder=of_tokens, kind=kinds)
def test_a_segmenter_takes_any_volume_and_its_decoder_covers_whole_tokens(sides, token, decoder, kind):
    network = segmenter(decoder, token, upsampling=kind).eval()
    volume = random_volume(2, 2, *sides)
    with torch.no_grad():
        logits = network(volume)
        whole = network.decoder(network.encoder.encode(volume, network.taps))
    z, y, x = sides
    assert whole.shape == (2, 3, *padded(volume, token).shape[2:])
    assert torch.equal(logits, whole[:, :, :z, :y, :x])
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", UPSAMPLINGS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_treats_each_sample_for_itself(decoder, kind):
    network = segmenter(decoder, drop_path=0.5, upsampling=kind).double().eval()
    volume = random_volume(3, 2, *SIDES).double()
    with torch.no_grad():
        one_by_one = torch.cat([network(sample[None]) for sample in volume])
        assert torch.allclose(network(volume), one_by_one, atol=1e-6)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_segmenter_stores_nothing_but_its_parameters(decoder):
    network = segmenter(decoder)
    # nnU-Net's U-Net holds some of its modules under several names
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters(remove_duplicate=False)}
    assert not any("position" in name for name in network.state_dict())


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_outer_autocast_does_not_lower_the_precision(decoder):
    network = segmenter(decoder).eval()
    volume = random_volume(2, 2, *SIDES)
    with torch.no_grad():
        plain = network(volume)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(network(volume), plain)


@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_are_float32_in_whatever_precision_the_network_works(decoder):
    network = segmenter(decoder).double().eval()
    assert network(random_volume(2, 2, *SIDES).double()).dtype == torch.float32


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_pretrained_encoder_fits_the_segmenter(decoder):
    network = Network(size="XS", token=TOKEN, decoder=decoder)
    pretrained = build_autoencoder(network, 2, Pretraining(mask_ratio=0.5)).encoder.state_dict()
    segmenter(decoder).encoder.load_state_dict(pretrained, strict=True)


@pytest.mark.parametrize(
    ("decoder", "steps", "lr"), [("unetr", 30, 3e-3), ("sfpn", 70, 3e-3), ("upscale", 45, 1e-2), ("mae", 100, 1e-3)]
)
def test_a_segmenter_can_overfit_a_batch(decoder, steps, lr):
    network = segmenter(decoder).train()
    volume = random_volume(2, 2, *SIDES)
    labels = torch.zeros(2, *SIDES, dtype=torch.long)
    labels[0, 1:5, 1:4, 3:12] = 1
    labels[1, 3:, 2:, :6] = 2
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(network(volume), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    predicted = network(volume).argmax(1)
    assert (predicted == labels)[labels > 0].float().mean() > 0.8


# ---------- where training starts


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_training_starts_from_the_same_logits_in_every_voxel(decoder):
    built, logits = segmenter(decoder), [0.5, -1.0, -2.0]
    start_from(built.decoder.heads, logits)
    for head in built.decoder.heads:
        nn.init.zeros_(head.weight)
    found = built(random_volume(2, 2, 9, 7, 11))
    expected = torch.tensor(logits)[:, None, None, None]
    assert built.decoder.heads
    for part in found if isinstance(found, list) else [found]:
        torch.testing.assert_close(part, expected.expand_as(part))


@given(classes=st.integers(2, 200), foreground=st.floats(1e-4, 0.9))
def test_classes_have_equal_parts_of_the_foreground(classes, foreground):
    softmax = torch.tensor(prior_logits(classes, foreground, regions=False)).double().softmax(dim=0)
    torch.testing.assert_close(softmax[1:].sum().item(), foreground, rtol=1e-4, atol=0)
    torch.testing.assert_close(softmax[1:], softmax[1].expand(classes - 1))
    regions = torch.tensor(prior_logits(classes, foreground, regions=True)).double().sigmoid()
    torch.testing.assert_close(regions, torch.full_like(regions, foreground), rtol=1e-4, atol=0)
