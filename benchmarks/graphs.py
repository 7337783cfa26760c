"""Steps that a GPU repeats as CUDA graphs, without a compiler: at small sizes an eager step waits for the processor."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor, nn


class Repeated:
    """A module whose forward and backward pass are recorded once for each shape of its arguments; on a CPU, itself.

    All recordings share their memory: a call, its backward pass and the use of both are over before the next call.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.module, self.on_gpu = module, device.type == "cuda"
        self._recorded: dict[tuple[torch.Size, ...], Any] = {}
        self._pool: Any = None  # of memory

    def __call__(self, *arguments: Tensor) -> Any:
        """Return what the module returns."""
        if not self.on_gpu:
            return self.module(*arguments)
        shapes = tuple(argument.shape for argument in arguments)
        if shapes not in self._recorded:
            if not self._recorded:
                # torch before 2.15 leaves the recordings of an earlier module, with their memory, to the collector,
                # which must not find them during a recording
                gc.collect()
                self._pool = torch.cuda.graph_pool_handle()
            examples = tuple(argument.clone() for argument in arguments)
            # torch changes the module that it is given; some networks have parameters that a pass does not need
            self._recorded[shapes] = torch.cuda.make_graphed_callables(
                _Passing(self.module), examples, allow_unused_input=True, pool=self._pool
            )
        return self._recorded[shapes](*arguments)


class _Passing(nn.Module):
    """A module of its own with the parameters of another one."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *arguments: Tensor) -> Any:
        return self.module(*arguments)
