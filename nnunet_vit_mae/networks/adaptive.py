"""Any number of contrasts per study (AMAE, sections 2.2 and 2.3).

A contrast that a study lacks is a channel of exact zeros, and takes no part: it has no tokens, so it costs nothing and
changes nothing. Axes: b studies, c channels, s contrast images, which are the present contrasts of all studies, one
study after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.positions import Places, Positions
from nnunet_vit_mae.networks.tokenizer import Triple, grid_of, padded, patchify
from nnunet_vit_mae.networks.transformer import Transformer

LEARNED_LENGTH = 16  # of a learned modality vector; the paper gives none


def present_contrasts(volume: Float[Tensor, "b c z y x"]) -> list[list[int]]:
    """Return the channels of each study that hold anything but zeros; a study of zeros counts as its first contrast."""
    found = volume.flatten(2).ne(0).any(dim=2).tolist()
    return [[channel for channel, here in enumerate(study) if here] or [0] for study in found]


class Group(NamedTuple):
    """Studies of a batch that have the same number of contrasts."""

    studies: Int[Tensor, " g"]
    contrasts: Int[Tensor, "g n"]
    images: Int[Tensor, "g n"]  # positions of their contrast images among all of the batch


def groups(present: list[list[int]], device: torch.device) -> Iterator[Group]:
    """Group the studies of a batch by their number of contrasts, so that nothing is ever padded."""
    starts = [0, *accumulate(map(len, present))]
    for count in sorted({len(contrasts) for contrasts in present}):
        members = [study for study, contrasts in enumerate(present) if len(contrasts) == count]
        yield Group(
            _on_device(members, device),
            _on_device([present[study] for study in members], device),
            _on_device([[starts[study] + i for i in range(count)] for study in members], device),
        )


def split_contrasts(
    volume: Shaped[Tensor, "b c *rest"], present: list[list[int]]
) -> tuple[Shaped[Tensor, "s 1 *rest"], Int[Tensor, " s"]]:
    """Return the contrast images of a batch, and which contrast each of them is."""
    studies = [study for study, contrasts in enumerate(present) for _ in contrasts]
    contrasts = _on_device([contrast for own in present for contrast in own], volume.device)
    return volume[_on_device(studies, volume.device), contrasts][:, None], contrasts


def _on_device(numbers: list, device: torch.device) -> Int[Tensor, "*_"]:
    """Return a tensor on a device without waiting for its work, as `torch.tensor` would there."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class ModalityVectors(nn.Module):
    """A vector for each contrast: `one_hot`, or `learned`."""

    def __init__(self, contrasts: int, kind: str):
        super().__init__()
        self.contrasts, self.kind = contrasts, kind
        self.length = contrasts if kind == "one_hot" else LEARNED_LENGTH
        if kind == "learned":
            self.table = nn.Parameter(torch.empty(contrasts, LEARNED_LENGTH).normal_())

    def forward(self, contrast: Int[Tensor, "*s"]) -> Num[Tensor, "*s l"]:
        if self.kind == "learned":
            return self.table[contrast]
        return functional.one_hot(contrast, self.contrasts)


class DynamicTokenizer(nn.Module):
    """The dynamic convolution tokenizer (section 2.2): one kernel for all contrasts, with factors for each of them.

    The modality vector of a contrast goes through a linear layer, whose output is split into a factor for each output
    channel of the kernel and one for each bias. All factors start at 1, so that training starts from a plain tokenizer.
    Kernel and stride are the token, so the convolution is a linear map of each token, and its factor may be applied
    behind it.
    """

    def __init__(self, vectors: ModalityVectors, token: Triple, width: int):
        super().__init__()
        self.vectors = vectors
        self.projection = nn.Linear(math.prod(token), width)
        self.factors = nn.Linear(vectors.length, 2 * width)
        nn.init.zeros_(self.factors.weight)
        nn.init.ones_(self.factors.bias)

    def forward(self, patches: Float[Tensor, "*s k v"], contrast: Int[Tensor, "*s"]) -> Float[Tensor, "*s k d"]:
        vectors = self.vectors(contrast).to(self.factors.weight)
        of_kernel, of_bias = self.factors(vectors)[..., None, :].chunk(2, dim=-1)
        return functional.linear(patches, self.projection.weight) * of_kernel + self.projection.bias * of_bias


class AdaptiveEncoder(nn.Module):
    """Tokens of all contrasts of a study in one sequence, the same position at the same place, one transformer."""

    def __init__(
        self,
        tokenizer: DynamicTokenizer,
        transformer: Transformer,
        *,
        token: Triple,
        positions: Positions | None = None,
    ):
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.token, self.positions = token, positions or Positions()

    def sequence(
        self, patches: Float[Tensor, "g n k v"], contrast: Int[Tensor, "g n"], places: Places
    ) -> tuple[Float[Tensor, "g nk d"], Float[Tensor, "g nk 2 r"] | None]:
        """Return the sequence of each study, one contrast after the other, and how far attention turns its tokens.

        `places` are those of the tokens of a contrast image (k), or of each contrast image (g n k).
        """
        tokens = rearrange(self.tokenizer(patches, contrast) + places.embedding, "g n k d -> g (n k) d")
        if places.rotation is None:
            return tokens, None
        rotation = places.rotation.expand(*contrast.shape, -1, -1, -1)
        return tokens, rearrange(rotation, "g n k two r -> g (n k) two r")

    def places(self, grid: Triple, device: torch.device) -> Places:
        """Return the places of all tokens of a grid."""
        return self.positions.places(grid, self.transformer.width, self.transformer.head_width, device)

    def encode(
        self, volume: Float[Tensor, "b c z y x"], taps: Sequence[int], present: list[list[int]] | None = None
    ) -> Encoded:
        """Encode all tokens of the present contrasts; at each place and level, take the maximum over the contrasts.

        So what leaves has the shape of an encoded single image, however many contrasts a study has (section 2.3).
        Without `present`, the voxels tell which contrasts there are.
        """
        present = present or present_contrasts(volume)
        volume, grid = padded(volume, self.token), grid_of(volume, self.token)
        places = self.places(grid, volume.device)
        patches = rearrange(patchify(volume, self.token), "b n c v -> b c n v")
        states: list[Tensor] = []
        order: list[Tensor] = []
        for studies, contrasts, _ in groups(present, volume.device):
            sequence, rotation = self.sequence(patches[studies[:, None], contrasts], contrasts, places)
            tokens, hidden = self.transformer.with_hidden(sequence, rotation, taps)
            levels = torch.stack([tokens, *hidden])
            states.append(rearrange(levels, "l g (n k) d -> l g n k d", n=contrasts.shape[1]).amax(dim=2))
            order.append(studies)
        tokens, *hidden = torch.cat(states, dim=1)[:, torch.cat(order).argsort()]
        return Encoded(tokens, hidden, volume, grid, present)


class AdaptiveStem(nn.Module):
    """Features of the volume itself, by one block for all contrasts; the maximum over those that are present.

    The paper does not say how the decoder's image skip meets a varying number of contrasts: here the block sees one
    contrast at a time, and a factor and a bias for each contrast and feature follow it, as in the tokenizer.
    """

    def __init__(self, block: nn.Module, vectors: ModalityVectors, *, width: int):
        super().__init__()
        self.block, self.vectors = block, vectors
        self.factors = nn.Linear(vectors.length, 2 * width)
        nn.init.zeros_(self.factors.weight)
        with torch.no_grad():
            self.factors.bias.copy_(torch.cat([torch.ones(width), torch.zeros(width)]))

    def forward(
        self, volume: Float[Tensor, "b c z y x"], present: list[list[int]] | None = None
    ) -> Float[Tensor, "b d z y x"]:
        present = present or present_contrasts(volume)
        images, contrasts = split_contrasts(volume, present)
        vectors = self.vectors(contrasts).to(self.factors.weight)
        scale, shift = self.factors(vectors)[..., None, None, None].chunk(2, dim=1)
        features = (self.block(images) * scale + shift).split([len(own) for own in present])
        return torch.stack([own.amax(dim=0) for own in features])
