"""How much memory a training step needs: rehearsed with tensors that have shapes but no data.

A rehearsal runs the real network, loss, backward pass and optimiser step, and adds up what is allocated at each moment.
So the estimate follows every change of the networks by itself, takes a second, and needs no GPU.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.masking import Masking
from nnunet_vit_mae.networks.positions import forget_positions
from nnunet_vit_mae.settings import Network, Pretraining, token_grid


def finetuning_memory(
    network: Network,
    patch_size: Sequence[int],
    channels: int,
    classes: int,
    batch: int,
    *,
    on_gpu: bool = True,
    unet: Callable[[], nn.Module] | None = None,
) -> int:
    """Estimate the peak bytes of a fine-tuning step (weights, gradients, AdamW, activations) for a patch (z y x).

    On a GPU the network works in bf16, otherwise in fp32. Not counted are what CUDA itself takes and what convolutions
    use as workspace.
    """

    def prepare() -> tuple[nn.Module, Callable[[], Tensor]]:
        segmenter = build_segmenter(network, channels, classes, drop_path=0.1, unet=unet)
        volume = torch.empty(batch, channels, *patch_size)
        target = torch.empty(batch, *patch_size, dtype=torch.long)
        present = [list(range(channels))] * batch  # the largest step has all contrasts
        return segmenter, lambda: segmentation_loss(segmenter.logits(volume, present), target)

    return _rehearse(prepare, on_gpu=on_gpu)


def pretraining_memory(
    network: Network,
    protocol: Pretraining,
    patch_size: Sequence[int],
    channels: int,
    batch: int,
    *,
    on_gpu: bool = True,
) -> int:
    """Estimate the peak bytes of a pre-training step in the same way."""

    def prepare() -> tuple[nn.Module, Callable[[], Tensor]]:
        autoencoder = build_autoencoder(network, channels, protocol)
        volume = torch.empty(batch, channels, *patch_size)
        # the largest step: all contrasts are there, and all tokens have content
        present = [list(range(channels))] * batch
        tokens = math.prod(token_grid(patch_size, network.token))
        masking = Masking(mask_ratio=protocol.mask_ratio, rebuilt_share=protocol.rebuilt_share)
        masks = masking.rounds(masking.draw(torch.empty(network.token_sequences(channels) * batch, tokens)))[0]
        return autoencoder, lambda: reconstruction_loss(autoencoder(volume, masks, present), norm_pix=protocol.norm_pix)

    return _rehearse(prepare, on_gpu=on_gpu)


def segmentation_loss(logits: Tensor | list[Tensor], target: Tensor) -> Tensor:
    """Return cross-entropy minus soft Dice: what nnU-Net's loss is as far as memory is concerned.

    With deep supervision, it is the sum over all resolutions.
    """
    if isinstance(logits, list):
        reference = target[:, None].float()
        targets = [functional.interpolate(reference, part.shape[2:])[:, 0].long() for part in logits]
        return torch.stack(list(map(segmentation_loss, logits, targets))).sum()
    logits = logits.float()
    probabilities = logits.softmax(dim=1)
    reference = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target[:, None], True)
    overlap = (probabilities * reference).sum(dim=(2, 3, 4))
    dice = 2 * overlap / (probabilities.sum(dim=(2, 3, 4)) + reference.sum(dim=(2, 3, 4)))
    return functional.cross_entropy(logits, target) - dice.mean()


def _rehearse(prepare: Callable[[], tuple[nn.Module, Callable[[], Tensor]]], *, on_gpu: bool) -> int:
    forget_positions()  # cached tables: a rehearsal must neither meet real ones nor leave its own behind
    try:
        with FakeTensorMode(), _Allocations() as allocations, _NormsInSinglePrecision():
            network, loss = prepare()
            optimizer = torch.optim.AdamW(network.parameters(), fused=True)
            for weights in network.parameters():
                weights.grad = torch.empty_like(weights)
            optimizer.step()  # the moments are there from the second step on
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on_gpu):
                value = loss()
            optimizer.zero_grad(set_to_none=True)  # a training does so before: a margin for what is not counted
            value.backward()
            optimizer.step()
        return allocations.peak
    finally:
        forget_positions()


class _NormsInSinglePrecision(TorchFunctionMode):
    """Compute norms, and the squares in them, in fp32, as autocast does on a GPU and does not on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (functional.layer_norm, Tensor.pow):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


class _Allocations(TorchDispatchMode):
    """Bytes of all storages that are alive, now and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for entry in tree_iter(result):
            if isinstance(entry, Tensor):
                self._count(entry.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        identity = storage._cdata
        if identity in self._alive:
            return
        self._alive.add(identity)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, identity, storage.nbytes())

    def _release(self, identity: int, size: int) -> None:
        self._alive.discard(identity)
        self.now -= size
