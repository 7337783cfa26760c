"""Forward pass and loss of pre-training as one module, which torch compiles where that pays.

Eager steps at usual batches are bound by the processor, which starts more than a thousand kernels for each of them.
Compiled, there are far fewer, and a GPU repeats them as one CUDA graph as long as the number of tokens stays the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.errors import UserError, first_line
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import Autoencoder
from nnunet_vit_mae.networks.masking import Masks
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.pretraining.crops import Samples
from nnunet_vit_mae.pretraining.job import PretrainingJob

logger = logging.getLogger(__name__)

# a graph for any number of tokens, which the second number that comes asks for, is made once; recording it as a CUDA
# graph would be done for each number
COMPILER: dict[str, Any] = {"options": {"triton.cudagraphs": True, "triton.cudagraph_skip_dynamic_graphs": True}}
LEAST_STEPS = 5000  # that are left to do: compiling takes more than a minute, and can save 30 ms of a step on an H100
REHEARSALS = 3  # a CUDA graph is prepared, recorded and repeated


class PretrainingLoss(nn.Module):
    """The loss of a batch: forward pass and loss as one module, for torch to compile and DDP to wrap."""

    def __init__(self, network: Autoencoder):
        super().__init__()
        self.network = network

    def forward(
        self,
        volume: Float[Tensor, "s c z y x"],
        masks: Masks,
        present: list[list[int]] | None = None,
        *,
        norm_pix: bool,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Return the loss, and the number of voxels over which it is a mean."""
        with autocast(volume.device):
            rebuilt = self.network(volume, masks, present)
            return reconstruction_loss(rebuilt, norm_pix=norm_pix), rebuilt.counted.sum()


def loss_of_step(job: PretrainingJob, epoch: int, module: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
    """Return what the module, which may be compiled, gives for the batch of a step."""
    masks = job.masking.rounds(samples.masks)[0]
    # only networks that take each contrast on its own ask which there are; all others would be compiled for each answer
    present = samples.present if job.network.adaptive else None
    return module(samples.volume, masks, present, norm_pix=job.protocol.norm_pix_in(epoch))


def compiled_where_it_pays(
    module: PretrainingLoss, job: PretrainingJob, epoch: int, device: torch.device, example: Callable[[], Samples]
) -> nn.Module:
    """Return the module, compiled as `pretraining.compile` says and rehearsed on an example, or as it is.

    Studies that differ in their contrasts are never compiled: each combination would be a graph of its own.

    Raises:
        UserError: If it has to be compiled and cannot be.
    """
    if not _pays(job, epoch, device):
        return module
    samples, started = example(), time.monotonic()
    try:
        compiled = cast(nn.Module, torch.compile(module, fullgraph=True, **COMPILER))
        for _ in range(REHEARSALS):
            loss_of_step(job, epoch, compiled, samples)[0].backward()
            module.zero_grad(set_to_none=True)
    except Exception as error:  # noqa: BLE001 (torch, triton and C compilers raise many kinds)
        torch._dynamo.reset()
        module.zero_grad(set_to_none=True)
        reason = first_line(getattr(error, "inner_exception", error))  # torch names the backend first
        if job.protocol.compile == "on":
            what = f"pretraining.compile is on, but the network cannot be compiled here ({reason})"
            raise UserError(f"{what}: set it to auto.") from None
        logger.warning("The network cannot be compiled here, so steps take longer (%s).", reason)
        return module
    logger.info("compiled in %.0f s", time.monotonic() - started)
    return compiled


def _pays(job: PretrainingJob, epoch: int, device: torch.device) -> bool:
    steps = job.steps - epoch * job.steps_per_epoch
    if job.protocol.compile != "auto":
        return job.protocol.compile == "on" and steps > 0
    return device.type == "cuda" and not job.network.adaptive and steps >= LEAST_STEPS
