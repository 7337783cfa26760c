"""What the autoencoder has learned, as volumes to look at: original, masked and rebuilt."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter
from torch import Tensor

from nnunet_vit_mae.networks.adaptive import split_contrasts
from nnunet_vit_mae.networks.adaptive_autoencoder import AdaptiveMaskedAutoencoder
from nnunet_vit_mae.networks.autoencoder import mean_and_deviation
from nnunet_vit_mae.networks.build import Autoencoder
from nnunet_vit_mae.networks.masking import Masking, take
from nnunet_vit_mae.networks.precision import autocast
from nnunet_vit_mae.networks.tokenizer import grid_of, patchify, unpatchify, voxels_inside
from nnunet_vit_mae.pretraining.crops import Samples
from nnunet_vit_mae.settings import Triple

REACH = 1.0  # tokens; how far the statistics of a visible token spread
FALLBACK = 1e-3  # weight of the mean over all visible tokens, where no visible token is near


class Views(NamedTuple):
    """Three views of one crop, each (c z y x).

    What the encoder does not see is NaN in `masked`. Tokens that take no part are NaN in `rebuilt` too.
    """

    original: np.ndarray
    masked: np.ndarray
    rebuilt: np.ndarray


@torch.no_grad()
def rebuild(network: Autoencoder, masking: Masking, sample: Samples, *, norm_pix: bool) -> Views:
    """Rebuild all that is hidden of one sample; visible tokens are shown as they are.

    An adaptive network shows the present contrasts. Where a step of training rebuilds a share of the masked tokens,
    the shares are rebuilt here one after the other, so that each token is predicted as in training.

    With norm-pix the network predicts masked tokens without their brightness and contrast. These two are interpolated
    from the visible tokens around, never taken from the hidden ones: the picture leaks nothing of what was hidden.
    """
    volume, masks, present = sample
    token = network.encoder.token
    images = split_contrasts(volume, present)[0] if isinstance(network, AdaptiveMaskedAutoencoder) else volume
    grid, patches = grid_of(images, token), patchify(images, token)
    with autocast(volume.device):
        rounds = [network(volume, part, present).patches for part in masking.rounds(masks)]
    predicted = torch.cat(rounds, dim=1).float()
    if norm_pix:
        inside = voxels_inside(images, token).expand(len(patches), -1, -1, -1)
        mean, deviation = mean_and_deviation(patches, inside)
        predicted = predicted * take(interpolated(deviation, masks.visible, grid), masks.hidden)
        predicted = predicted + take(interpolated(mean, masks.visible, grid), masks.hidden)

    masked, every = torch.full_like(patches, torch.nan), torch.arange(len(patches))[:, None]
    masked[every, masks.visible] = take(patches, masks.visible)
    rebuilt = masked.clone()
    rebuilt[every, masks.hidden] = predicted
    z, y, x = volume.shape[2:]
    views = (unpatchify(view, grid, token)[..., :z, :y, :x].flatten(0, 1) for view in (patches, masked, rebuilt))
    return Views(*(view.cpu().numpy() for view in views))


def interpolated(
    values: Float[Tensor, "s n c 1"], visible: Int[Tensor, "s k"], grid: Triple
) -> Float[Tensor, "s n c 1"]:
    """Return one value per token and channel: a Gaussian-weighted mean over the visible tokens alone."""
    return torch.stack([_interpolated(*image, grid) for image in zip(values, visible, strict=True)])


def _interpolated(values: Float[Tensor, "n c 1"], visible: Int[Tensor, " k"], grid: Triple) -> Float[Tensor, "n c 1"]:
    known = np.zeros(grid)
    known.reshape(-1)[visible.cpu()] = 1
    maps = values[:, :, 0].T.cpu().double().numpy().reshape(-1, *grid)
    means = maps.mean(axis=(1, 2, 3), where=known > 0, keepdims=True)
    weighted = gaussian_filter(maps * known, REACH, mode="constant", axes=(1, 2, 3)) + FALLBACK * means
    filled = weighted / (gaussian_filter(known, REACH, mode="constant") + FALLBACK)
    return torch.from_numpy(filled.reshape(len(filled), -1, 1)).movedim(0, 1).to(values)
