"""Studies with different numbers of contrasts in one transformer: in groups, or packed into one sequence.

Axes: b studies, s contrast images, which are the present contrasts of all studies, one study after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from nnunet_vit_mae.devices import on_device
from nnunet_vit_mae.networks.packing import Lengths, Packing, packs
from nnunet_vit_mae.networks.transformer import Transformer


class Group(NamedTuple):
    """Studies of a batch that go through a transformer together, so that nothing is ever padded.

    The contrast images of a study are one sequence. Studies with equally many of them are the samples of a batch;
    packed ones lie in a single sample, one behind the other.
    """

    studies: Int[Tensor, " g"]
    images: Int[Tensor, " s"]  # positions of their contrast images among all of the batch
    counts: list[int]  # of contrast images of each study
    packed: bool

    def joined(self, images: Shaped[Tensor, "s n *rest"]) -> Shaped[Tensor, "r t *rest"]:
        """Put the tokens of contrast images one behind the other."""
        return rearrange(images, "(r c) n ... -> r (c n) ...", r=1 if self.packed else len(self.counts))

    def parted(self, tokens: Float[Tensor, "*l r t d"]) -> Float[Tensor, "*l s n d"]:
        """Undo `joined`."""
        return rearrange(tokens, "... r (c n) d -> ... (r c) n d", c=len(self.images) // tokens.shape[-3])

    def packing(self, queries: int, keys: int) -> Packing | None:
        """Return where attention finds its sequences, given the tokens of each contrast image."""
        if not self.packed:
            return None
        device = self.images.device
        return Packing(*(Lengths.of([count * tokens for count in self.counts], device) for tokens in (queries, keys)))

    def through(
        self,
        transformer: Transformer,
        images: Float[Tensor, "s n d"],
        rotation: Float[Tensor, "s n 2 r"] | None,
        context: Float[Tensor, "s k d"] | None = None,
        context_rotation: Float[Tensor, "s k 2 r"] | None = None,
    ) -> Float[Tensor, "s n d"]:
        """Let the tokens of all contrast images of a study attend to one another, or to those of the context."""
        packing = self.packing(images.shape[1], (images if context is None else context).shape[1])
        parts = (images, rotation, context, context_rotation)
        return self.parted(transformer(*(None if part is None else self.joined(part) for part in parts), packing))


def groups(present: list[list[int]], device: torch.device) -> Iterator[Group]:
    """Group the studies of a batch by their number of contrasts; where attention has a kernel for it, pack them all."""
    starts = [0, *accumulate(map(len, present))]
    numbers = sorted({len(contrasts) for contrasts in present})
    packed = len(numbers) > 1 and packs(device)
    for chosen in [numbers] if packed else [[number] for number in numbers]:
        members = [study for study, contrasts in enumerate(present) if len(contrasts) in chosen]
        images = [image for study in members for image in range(starts[study], starts[study + 1])]
        counts = [len(present[study]) for study in members]
        yield Group(on_device(members, device), on_device(images, device), counts, packed)
