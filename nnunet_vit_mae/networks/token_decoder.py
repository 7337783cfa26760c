"""The light transformer decoder of masked autoencoding (ViTiac, section 2.2)."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_vit_mae.networks.grouping import Group
from nnunet_vit_mae.networks.positions import Places, Positions
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.settings import Triple


class TokenDecoder(nn.Module):
    """Encoded tokens (and mask tokens for masked ones) in, one vector per token out.

    All tokens attend to one another, as in the original; with `cross`, mask tokens attend to encoded ones alone
    (CrossMAE, Fu et al. 2024, https://arxiv.org/abs/2401.14391), so that each is predicted whatever the others are.
    """

    def __init__(
        self,
        in_width: int,
        transformer: Transformer,
        *,
        outputs: int,
        positions: Positions,
        cross: bool = False,
    ):
        super().__init__()
        self.cross, self.positions = cross, positions
        self.width = transformer.width
        self.embed = nn.Linear(in_width, self.width)
        self.transformer = transformer
        self.head = nn.Linear(self.width, outputs)

    def places(self, grid: Triple, device: torch.device) -> Places:
        """Return the places of all tokens of a grid."""
        return self.positions.places(grid, self.width, self.transformer.head_width, device)

    def forward(
        self,
        encoded: Float[Tensor, "b k d"],
        places: Places,
        mask_tokens: Float[Tensor, "b m e"] | None = None,
        group: Group | None = None,
    ) -> Float[Tensor, "b m_or_n outputs"]:
        """Decode the tokens in the order given, mask tokens last; with these, only theirs are returned (n = k + m).

        With a group, the samples are contrast images, and all those of a study are decoded together.
        """
        transformer = self.transformer if group is None else partial(group.through, self.transformer)
        tokens = self.embed(encoded)
        if mask_tokens is None:
            return self.head(transformer(tokens + places.embedding, places.rotation))
        if self.cross:
            seen, hidden = _split(places, tokens.shape[1])
            queries = mask_tokens + hidden.embedding
            return self.head(transformer(queries, hidden.rotation, tokens + seen.embedding, seen.rotation))
        tokens = torch.cat([tokens, mask_tokens.to(tokens.dtype)], dim=1) + places.embedding
        return self.head(transformer(tokens, places.rotation)[:, encoded.shape[1] :])


def _split(places: Places, first: int) -> tuple[Places, Places]:
    """Return the places of the first tokens of a sequence, and those of the others."""
    rotations = (None, None) if places.rotation is None else places.rotation.tensor_split((first,), dim=-3)
    seen, hidden = map(Places, places.embedding.tensor_split((first,), dim=-2), rotations)
    return seen, hidden
