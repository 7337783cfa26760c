"""Any number of contrasts per study (AMAE, sections 2.2 and 2.3).

A contrast that a study lacks is a channel of exact zeros, and takes no part: it has no tokens, so it costs nothing and
changes nothing. Axes: b studies, c channels, s contrast images, which are the present contrasts of all studies, one
study after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor, nn
from torch.nn import functional

from nnunet_vit_mae.devices import on_device
from nnunet_vit_mae.networks.encoder import Encoded
from nnunet_vit_mae.networks.grouping import groups
from nnunet_vit_mae.networks.positions import Places, Positions
from nnunet_vit_mae.networks.tokenizer import grid_of, padded, patchify
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.settings import Triple

LEARNED_LENGTH = 16  # of a learned modality vector; the paper gives none


def present_contrasts(volume: Float[Tensor, "b c z y x"]) -> list[list[int]]:
    """Return the channels of each study that hold anything but zeros; a study of zeros counts as its first contrast."""
    found = volume.flatten(2).ne(0).any(dim=2).tolist()
    return [[channel for channel, here in enumerate(study) if here] or [0] for study in found]


def contrast_images(present: list[list[int]], device: torch.device) -> tuple[Int[Tensor, " s"], Int[Tensor, " s"]]:
    """Return the study of each contrast image of a batch, and which contrast it is."""
    studies = [study for study, contrasts in enumerate(present) for _ in contrasts]
    return on_device(studies, device), on_device([contrast for own in present for contrast in own], device)


def split_contrasts(
    volume: Shaped[Tensor, "b c *rest"], present: list[list[int]]
) -> tuple[Shaped[Tensor, "s 1 *rest"], Int[Tensor, " s"]]:
    """Return the contrast images of a batch, and which contrast each of them is."""
    studies, contrasts = contrast_images(present, volume.device)
    return volume[studies, contrasts][:, None], contrasts


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
        positions: Positions,
    ):
        super().__init__()
        self.tokenizer, self.transformer = tokenizer, transformer
        self.token, self.positions = token, positions

    def images(
        self, patches: Float[Tensor, "s k v"], contrast: Int[Tensor, " s"], places: Places
    ) -> tuple[Float[Tensor, "s k d"], Float[Tensor, "s k 2 r"] | None]:
        """Return the tokens of contrast images, and how far attention turns them.

        `places` are those of the tokens of every contrast image (k), or of each of them (s k).
        """
        tokens = self.tokenizer(patches, contrast) + places.embedding
        return tokens, None if places.rotation is None else places.rotation.expand(*tokens.shape[:2], -1, -1)

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
        z, y, x = volume.shape[2:]
        volume, grid = padded(volume, self.token), grid_of(volume, self.token)
        places = self.places(grid, volume.device)
        patches = rearrange(patchify(volume, self.token), "b n c v -> b c n v")
        states: list[Tensor] = []
        order: list[Tensor] = []
        owners, contrasts = contrast_images(present, volume.device)
        for group in groups(present, volume.device):
            own = contrasts[group.images]
            images, rotation = self.images(patches[owners[group.images], own], own, places)
            turned = None if rotation is None else group.joined(rotation)
            packing = group.packing(images.shape[1], images.shape[1])
            tokens, hidden = self.transformer.with_hidden(group.joined(images), turned, taps, packing)
            of_studies = group.parted(torch.stack([tokens, *hidden])).split(group.counts, dim=1)
            states.append(torch.stack([levels.amax(dim=1) for levels in of_studies], dim=1))
            order.append(group.studies)
        tokens, *hidden = torch.cat(states, dim=1)[:, torch.cat(order).argsort()]
        return Encoded(tokens, hidden, volume, grid, (z, y, x), present)


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
