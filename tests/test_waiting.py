"""Test that a GPU is never waited for in a step of pre-training, with a GPU that has no more than shapes.

And that augmentation on a GPU waits for it only to see which contrasts there are.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nnunet_vit_mae.networks import packing
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.positions import forget_positions
from nnunet_vit_mae.nnunet.augmentation import BatchAugmentation
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.pretraining import loss
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.loss import PretrainingLoss
from nnunet_vit_mae.pretraining.run import _step
from nnunet_vit_mae.pretraining.volumes import DeviceCache
from nnunet_vit_mae.settings import Network, Pretraining

GPU = torch.device("cuda")
SIDES, TOKEN, C = (8, 12, 16), (4, 4, 4), 3


class GPUWithoutValues(TorchDispatchMode):
    """Tensors of the CPU as ever, and such of a GPU that have no values: reading one raises an error.

    `waits` are the copies for which a real GPU would have to finish all that it was given before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [part for part in tree_iter((args, kwargs)) if isinstance(part, Tensor)]
        if not any(isinstance(part, FakeTensor) for part in inputs) and not _on_gpu(kwargs.get("device")):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.calls[str(func)] += 1
        devices = {part.device.type for part in (*inputs, *tree_iter(result)) if isinstance(part, Tensor) and part.ndim}
        if devices == {"cpu", "cuda"} and not _asynchronous(func, args, kwargs):
            self.waits.append(str(func))
        return result


def _on_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _asynchronous(func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation between CPU and GPU returns before it is done: a copy to the GPU that is told so.

    torch first gathers a tensor with gaps in memory that is not pinned, so that one waits whatever it is told.
    """
    if func is torch.ops.aten._to_copy.default:
        return _on_gpu(kwargs.get("device")) and kwargs.get("non_blocking", False) and args[0].is_contiguous()
    return False


@pytest.fixture(name="gpu")
def gpu_without_values() -> Iterator[GPUWithoutValues]:
    forget_positions()  # tables of other tests are real tensors, and those made here are not
    with FakeTensorMode(allow_non_fake_inputs=True), GPUWithoutValues() as gpu:
        yield gpu
    forget_positions()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Volumes with an empty half; the second is smaller than a crop, and lacks a contrast."""
    made = []
    for number, shape in enumerate([(C, 9, 14, 20), (C, 6, 14, 11)]):
        volume = np.random.default_rng(number).normal(size=shape).astype(np.float32)
        volume[:, :, : shape[2] // 2] = 0
        volume[number : number + 1] *= 1 - number
        made.append(tmp_path / f"case_{number}.b2nd")
        blosc2.asarray(volume, urlpath=str(made[-1]), mode="w")
    return made


@pytest.mark.parametrize(
    ("network", "protocol"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({}, {"skip_background": True}, id="skip_background"),
        pytest.param({}, {"decoder": "cross", "rebuilt_share": 0.5, "norm_pix": False}, id="cross"),
        pytest.param({}, {"rotation": 180.0, "scaling": (0.7, 1.4)}, id="rotated"),
        pytest.param({"tokenizer": "convolutional", "register_tokens": 2}, {"masks_per_crop": 2}, id="several masks"),
        pytest.param({"adaptive": True}, {}, id="adaptive"),
        pytest.param({"adaptive": True, "modality_vectors": "learned"}, {"skip_background": True}, id="both"),
    ],
)
def test_a_step_from_the_crops_to_the_optimizer_never_waits(gpu, files, network, protocol, monkeypatch):
    assert steps(gpu, files, network, protocol, None, monkeypatch) == {"cuda"}
    assert gpu.waits == []


@pytest.mark.skipif(torch.__version__ < packing.OLDEST, reason="no kernel for packed sequences")
def test_a_step_of_packed_studies_never_waits(gpu, files, monkeypatch):
    """Every block calls torch's own kernel, which is told all lengths by the host."""
    monkeypatch.setattr(packing, "has_kernel", lambda: True)  # as where torch is made for a GPU
    monkeypatch.setattr(loss, "autocast", bf16_without_a_gpu)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN would be looked for on the GPU
        found = steps(gpu, files, {"adaptive": True}, {"decoder": "cross"}, None, monkeypatch)
    assert found == {"cuda"}
    assert gpu.waits == []
    blocks = SIZES["XS"].depth + SIZES["XS"].decoder_depth
    assert gpu.calls["torch_attn._varlen_attn.default"] == 2 * blocks  # of two steps


@contextlib.contextmanager
def bf16_without_a_gpu(device: torch.device) -> Iterator[None]:
    """Do what `precision.autocast` does on a GPU; torch's own context looks for the GPU."""
    before = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    torch.set_autocast_enabled(device.type, True)
    torch.set_autocast_dtype(device.type, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device.type, before[0])
        torch.set_autocast_dtype(device.type, before[1])


@pytest.mark.parametrize("protocol", [{"crops_per_volume": 2}, {"rotation": 180.0, "scaling": (0.7, 1.4)}])
def test_no_step_waits_for_crops_that_are_cut_on_the_device(gpu, files, protocol, monkeypatch):
    assert steps(gpu, files, {}, protocol, DeviceCache(files, GPU), monkeypatch) == {"cuda"}
    assert gpu.waits == []


def steps(
    gpu: GPUWithoutValues,
    files: list[Path],
    network: dict[str, Any],
    protocol: dict[str, Any],
    cache: DeviceCache | None,
    monkeypatch: pytest.MonkeyPatch,
) -> set[str]:
    """Take two steps; returns where the results of the second one are, whose waits are noted."""
    job = PretrainingJob(
        files=files,
        channel_names=["T1", "T2", "FLAIR"],
        patch_size=SIDES,
        spacing=(1.0, 1.0, 1.0),
        network=Network(size="XS", token=TOKEN, **network),
        protocol=Pretraining(batch_size=4, **protocol),
        cache=cache,
    )
    crops = job.crops()
    with GPU:
        model = PretrainingLoss(build_autoencoder(job.network, C, job.protocol))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    # torch's engine asks the driver for its streams, so gradients are made here; the tests of the networks have a
    # backward pass without values
    monkeypatch.setattr(Tensor, "backward", lambda _: _give_gradients(model))

    results = []
    for _ in range(2):  # the first one makes the tables of positions
        gpu.waits.clear()
        results = _step(job, 0, model, optimizer, crops[range(job.protocol.reads)].samples(GPU))
    return {part.device.type for part in results}


@pytest.mark.parametrize(
    "settings", [{}, {"do_dummy_2d_data_aug": True}, {"regions": [(1, 2), 2], "ignore_label": 3}], ids=str
)
def test_augmentation_waits_only_to_see_which_contrasts_there_are(gpu, monkeypatch, settings):
    monkeypatch.setattr(Tensor, "cpu", lambda values: torch.ones(values.shape, dtype=values.dtype))
    choices = {"do_dummy_2d_data_aug": False, "use_mask_for_norm": [True, False], **settings}
    theirs = nnUNetTrainer.get_training_transforms(SIDES, (-0.5, 0.5), [[1, 1, 1], [0.5, 0.5, 0.5]], (0, 1), **choices)
    augment = BatchAugmentation(theirs, (0, 1, 2, 3), contrast_dropout=0.5)
    image = torch.zeros(8, 2, *(side + 4 * (axis > 0) for axis, side in enumerate(SIDES)), device=GPU)
    np.random.seed(0)  # noqa: NPY002 (nnU-Net's transforms draw from it)
    torch.manual_seed(0)
    for _ in range(3):  # by then each transform has changed a sample
        found, targets = augment(image, torch.zeros(image.shape[0], 1, *image.shape[2:], dtype=torch.int16, device=GPU))
        assert {part.device.type for part in (found, *targets)} == {"cuda"}
        assert found.shape == (8, 2, *SIDES)
    assert gpu.waits == []


@pytest.mark.parametrize(
    "read", [Tensor.item, Tensor.nonzero, lambda values: values[values > 0], lambda values: bool(values.sum() > 0)]
)
def test_what_depends_on_values_raises_an_error(gpu, read):
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        read(torch.ones(1, device=GPU))


@pytest.mark.parametrize(
    "copy",
    [
        lambda values: values.cpu(),
        lambda values: values.to("cpu", non_blocking=True),
        lambda values: values + torch.ones(2, 2)[:, 0].to(GPU, non_blocking=True),
        lambda values: values + torch.ones(2).to(GPU),
        lambda values: values + torch.tensor([1, 2], device=GPU),
        lambda values: values[torch.tensor([0, 1])],
        lambda values: values[[0, 1]],
    ],
)
def test_copies_that_wait_are_noticed(gpu, copy):
    values = torch.ones(2, device=GPU)
    assert gpu.waits == []
    copy(values)
    assert len(gpu.waits) == 1


def _give_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
