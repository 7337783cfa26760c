"""Test on a GPU what no CPU can show: torch's kernel for packed studies, CUDA graphs, crops that are cut there.

All else is tested without one. `pytest -m gpu` runs them alone.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import compiled_on_gpu
import pytest
import torch
from compiled_on_gpu import GPU, PATCH, apart, write_volumes
from conftest import MIXED, SIDES, perturbed, seeded
from torch import Tensor, nn

from nnunet_vit_mae.networks import grouping, packing
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.presets import DECODERS
from nnunet_vit_mae.pretraining.crops import MaskDrawing, RandomCrops
from nnunet_vit_mae.pretraining.volumes import Cache, DeviceCache
from nnunet_vit_mae.settings import Network, Pretraining

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("default::UserWarning"),  # what torch says of a GPU is shown, and fails no test
]

TOKEN, TOKENS, CONTRASTS = (2, 4, 8), 24, 3
BF16 = 0.03  # how far results in bf16 may be apart, relative to their norm


def with_gradients(network: nn.Module, run: Callable[[], Tensor], *, bf16: bool = True) -> tuple[Tensor, Tensor]:
    """Return a result and the gradient of its weighted sum, all parameters in one vector."""
    with autocast(GPU) if bf16 else nullcontext():
        result = run().float()
    weights = torch.linspace(-1, 1, result.numel(), device=GPU).view_as(result)
    gradients = torch.autograd.grad((result * weights).sum(), [*network.parameters()])
    return result.detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("kind", ["autoencoder", "segmenter"])
def test_the_kernel_for_packed_studies_gives_what_groups_give(monkeypatch, kind):
    if not packing.has_kernel():
        pytest.skip("this torch or this GPU has no kernel for packed sequences")
    torch.manual_seed(0)
    settings = Network(size="XS", token=TOKEN, decoder="unetr", adaptive=True, positions="both")
    volume = torch.randn(len(MIXED), CONTRASTS, *SIDES, generator=seeded()).to(GPU)
    masks = Masking(mask_ratio=0.6).draw(torch.rand(sum(map(len, MIXED)), TOKENS, generator=seeded(1))).to(GPU)
    if kind == "autoencoder":
        network = perturbed(build_autoencoder(settings, CONTRASTS, Pretraining(decoder="cross"))).to(GPU)
        run = lambda: network(volume, masks, MIXED).patches  # noqa: E731
    else:
        network = perturbed(build_segmenter(settings, CONTRASTS, 2, drop_path=0.0)).to(GPU)
        run = lambda: cast(Tensor, network.logits(volume, MIXED))  # noqa: E731
    calls: list[int] = []
    from torch.nn.attention.varlen import varlen_attn as kernel

    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda *a, **b: calls.append(len(a[3]) - 1) or kernel(*a, **b)
    )
    packed = with_gradients(network, run)
    assert set(calls) == {len(MIXED)}
    monkeypatch.setattr(grouping, "packs", lambda device: False)
    grouped, exact = with_gradients(network, run), with_gradients(network, run, bf16=False)
    # of the segmenter's gradients rounding changes a tenth: a maximum over contrasts may change its place
    for found, other, expected in zip(packed, grouped, exact, strict=True):
        assert apart(found, expected) < 1.5 * apart(other, expected)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", compiled_on_gpu.__file__], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_step_as_a_cuda_graph_gives_what_an_eager_one_gives(compiled, decoder):
    for loss, gradient in compiled["steps"][decoder]:
        assert loss < BF16
        assert gradient < 2 * BF16


def test_a_compiled_run_with_volumes_on_the_gpu_has_the_losses_of_an_eager_one(compiled):
    assert "compiled in" in compiled["runs"]["on"]["log"]
    assert "in the memory of the device" in compiled["runs"]["on"]["log"]
    assert compiled["runs"]["on"]["losses"] == pytest.approx(compiled["runs"]["off"]["losses"], rel=BF16)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_network_gives_in_bf16_what_it_gives_in_fp32(decoder):
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    def unet() -> nn.Module:
        return PlainConvUNet(
            1, 3, [8, 16, 16], nn.Conv3d, 3, [1, 2, 2], 1, 3, 1, conv_bias=True, norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, deep_supervision=True,
        )  # fmt: skip

    torch.manual_seed(0)
    settings = Network(size="XS", token=(4, 4, 4), decoder=decoder)
    network = perturbed(build_segmenter(settings, 1, 3, drop_path=0.0, unet=unet)).eval()
    volume = torch.randn(2, 1, 16, 24, 20, generator=seeded())
    with torch.no_grad():
        expected = network(volume)
        with autocast(GPU):
            found = copy.deepcopy(network).to(GPU)(volume.to(GPU))
    finest, reference = (own[0] if isinstance(own, list) else own for own in (found, expected))
    assert apart(finest.cpu(), reference) < BF16


def test_crops_that_are_cut_on_the_gpu_are_those_of_the_readers(tmp_path):
    files = write_volumes(tmp_path)
    drawing = MaskDrawing(masking=Masking(mask_ratio=0.6), token=(4, 4, 4))
    with Cache(files, 10**6) as cache:
        read = RandomCrops(files, PATCH, drawing, 1, cache)[range(12)].samples(GPU)
    cut = RandomCrops(files, PATCH, drawing, 1, DeviceCache(files, GPU))[range(12)].samples(GPU)
    assert cut.volume.device.type == "cuda"
    assert torch.equal(read.volume, cut.volume)
    assert all(torch.equal(one, other) for one, other in zip(read.masks, cut.masks, strict=True))
