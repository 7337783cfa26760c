"""Test the planner's estimate of training memory against what real steps take and against arithmetic."""

import sys
from collections.abc import Callable
from functools import partial

import memory as benchmark
import pytest
import torch
from conftest import small_unet
from torch import Tensor, nn

from nnunet_vit_mae.networks import memory
from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.networks.memory import finetuning_memory, pretraining_memory
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.presets import DECODERS
from nnunet_vit_mae.settings import Network, Pretraining

PATCH = (14, 18, 22)
BYTES_PER_PARAMETER = 16  # weight, gradient and two moments of AdamW, in fp32


# what the hybrid needs; other decoders leave it alone
unet = partial(small_unet, 2, 3, (1, (1, 2, 2), (2, 1, 1)), deep_supervision=True)

MEASURED = [
    benchmark.Case("finetuning", "S", (8, 8, 8), "upscale", "nearest", 2),
    benchmark.Case("finetuning", "S", (2, 8, 8), "unetr", "nearest", 1),
    benchmark.Case("finetuning", "S", (4, 4, 4), "mae", "nearest", 1),
    benchmark.Case("pretraining", "S", (8, 8, 8), "mae", "nearest", 8),
]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("case", MEASURED, ids=lambda case: f"{case.phase}-{case.size}-{case.token[2]}-{case.decoder}")
def test_the_estimate_is_near_what_a_step_takes(case):
    expected = {"rel": 0.3}  # the workspace of convolutions is not estimated, and depends on the CPU
    ((_, sizes),) = benchmark.compare([case])
    if sizes.estimated != pytest.approx(sizes.measured, **expected):  # pages taken back by the kernel count twice
        ((_, sizes),) = benchmark.compare([case])
    assert sizes.estimated == pytest.approx(sizes.measured, **expected)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("decoder", DECODERS)
def test_memory_grows_with_the_batch_from_what_weights_and_moments_take(decoder, on_gpu):
    network = Network(size="XS", token=(4, 4, 8), decoder=decoder)
    one, two, three = (finetuning_memory(network, PATCH, 2, 3, batch, on_gpu=on_gpu, unet=unet) for batch in (1, 2, 3))
    parameters = sum(p.numel() for p in build_segmenter(network, 2, 3, drop_path=0.0, unet=unet).parameters())
    assert one > BYTES_PER_PARAMETER * parameters
    assert two > one
    assert three - two == pytest.approx(two - one, rel=0.2)


def test_half_precision_takes_less_but_not_less_than_half():
    network = Network(size="XS", token=(4, 4, 8), decoder="unetr")
    half, full = (finetuning_memory(network, (28, 36, 44), 1, 2, 4, on_gpu=on_gpu) for on_gpu in (True, False))
    assert 0.5 * full < half < 0.9 * full


def test_norms_are_rehearsed_in_the_precision_that_autocast_gives_them_on_a_gpu():
    """On a CPU it leaves them in bf16, which a rehearsal for a GPU must not."""
    seen: set[tuple[torch.dtype, ...]] = set()

    def prepare() -> tuple[nn.Module, Callable[[], Tensor]]:
        layers = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])

        def loss() -> Tensor:
            features = layers[0](torch.ones(2, 4))
            normed = layers[1](features)
            seen.add((features.dtype, normed.dtype, features.pow(2).dtype))
            return normed.sum()

        return layers, loss

    memory._rehearse(prepare, on_gpu=True)
    assert seen == {(torch.bfloat16, torch.float32, torch.float32)}


def test_hidden_tokens_cost_less_than_visible_ones():
    network = Network(size="S", token=(4, 4, 4))
    few, many = (pretraining_memory(network, Pretraining(mask_ratio=ratio), PATCH, 1, 8) for ratio in (0.9, 0.25))
    assert few < many


def test_smaller_tokens_take_more():
    small, large = (
        finetuning_memory(Network(size="XS", token=token, decoder="mae"), (28, 36, 44), 1, 2, 4)
        for token in ((2, 4, 4), (4, 8, 8))
    )
    assert small > 2 * large


def test_a_rehearsal_leaves_nothing_behind():
    network = Network(size="XS", token=(4, 4, 8), decoder="mae")
    positions = sine_cosine_positions((4, 5, 3), 96, torch.device("cpu")).clone()
    before = torch.random.get_rng_state()
    finetuning_memory(network, PATCH, 2, 3, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(sine_cosine_positions((4, 5, 3), 96, torch.device("cpu")), positions)
    logits = build_segmenter(network, 2, 3, drop_path=0.0)(torch.randn(1, 2, *PATCH))
    assert logits.isfinite().all()
