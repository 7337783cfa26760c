"""AdamW as vision transformers want it: no decay on biases and norms, warm-up and cosine, layer-wise learning rates."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

WITHOUT_DECAY = ("encoder.position_table.values", "encoder.register_tokens")


def warmup_cosine(progress: float, warmup: float) -> float:
    """Return the factor of the learning rate at a share `progress` (0 to 1) of the schedule.

    It rises linearly up to the share `warmup`, and falls along a cosine from there.

    >>> warmup_cosine(0.05, 0.1), warmup_cosine(1.0, 0.1)
    (0.5, 0.0)
    """
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    depth: int = 0,
    pretrained: Collection[str] | None = None,
) -> list[dict]:
    """Return groups for AdamW, each with its `lr_scale` and whether it is `pretrained`.

    The first has scale 1 and is never frozen, for its rate is the one that nnU-Net logs.

    Layer-wise decay (fine-tuning protocol of He et al. 2022): the head learns at the full rate, block i of `depth` at
    `layer_decay ** (depth - i)`, tokenizer and learned positions at `layer_decay ** (depth + 1)`. Vectors (biases,
    norms, the mask token) and learned positions have no weight decay.

    Args:
        named_parameters: Parameters of a network by name.
        weight_decay: Of matrices and kernels.
        layer_decay: Factor of the learning rate for each block from the head down.
        depth: Blocks of the encoder.
        pretrained: Names that have pre-trained weights; None: all of the encoder. What is new learns at the full rate.
    """
    groups: dict[tuple[bool, int, str, bool], dict] = {}
    for name, parameter in named_parameters:
        in_encoder, layer = name.startswith("encoder."), _layer(name, depth)
        is_vector = parameter.ndim <= 1 or name in WITHOUT_DECAY
        # an encoder brings each of these as a whole or not at all
        part = "" if layer else ".".join(name.split(".")[:2])
        group = groups.setdefault(
            (not in_encoder, layer, part, is_vector),
            {
                "params": [],
                "pretrained": False,
                "lr_scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": 0.0 if is_vector else weight_decay,
            },
        )
        group["params"].append(parameter)
        group["pretrained"] |= in_encoder if pretrained is None else name in pretrained
    for group in groups.values():
        if not group["pretrained"]:
            group["lr_scale"] = 1.0
    return [groups[key] for key in sorted(groups, reverse=True)]


def _layer(name: str, depth: int) -> int:
    """Return 0 for tokenizer and positions, i + 1 for block i of the encoder, depth + 1 for everything behind it."""
    parts = name.split(".")
    if parts[:2] == ["encoder", "tokenizer"] or name in WITHOUT_DECAY:
        return 0
    if parts[:3] == ["encoder", "transformer", "blocks"]:
        return min(int(parts[3]), depth) + 1
    return depth + 1


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float, *, freeze_pretrained: bool = False) -> None:
    """Set every group's rate to `lr` times its scale.

    With `freeze_pretrained` the rate of pre-trained weights is 0: they do not move, and DDP still finds a gradient for
    each parameter.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if freeze_pretrained and group["pretrained"] else lr * group["lr_scale"]


class WarmupCosine:
    """The schedule of fine-tuning: a function of epoch and step alone, so that `--c` goes on where it was."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        lr: float,
        *,
        warmup: float,
        epochs: int,
        steps_per_epoch: int,
        freeze_epochs: int = 0,
    ):
        self.optimizer, self.lr, self.warmup = optimizer, lr, warmup
        self.epochs, self.steps_per_epoch, self.freeze_epochs = epochs, steps_per_epoch, freeze_epochs

    def step(self, epoch: int, step: int = 0) -> None:
        """Set the rates of a step of an epoch, both counted from 0; neither the first nor the last one is 0."""
        progress = (epoch * self.steps_per_epoch + step + 1) / (self.epochs * self.steps_per_epoch + 1)
        lr = self.lr * warmup_cosine(progress, self.warmup)
        set_learning_rate(self.optimizer, lr, freeze_pretrained=epoch < self.freeze_epochs)
