"""Test masked autoencoding on grids that the token does not divide, with masks worked out voxel by voxel."""

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nnunet_vit_mae.networks.autoencoder import (
    MaskedAutoencoder,
    Reconstruction,
    counted_voxels,
    norm_pix_targets,
    reconstruction_loss,
)
from nnunet_vit_mae.networks.encoder import Encoder
from nnunet_vit_mae.networks.masking import Masking, Masks, take
from nnunet_vit_mae.networks.positions import Positions, forget_positions
from nnunet_vit_mae.networks.token_decoder import TokenDecoder
from nnunet_vit_mae.networks.tokenizer import Tokenizer, patchify, unpatchify, voxels_inside
from nnunet_vit_mae.networks.transformer import Transformer

B, C = 2, 3
TOKEN = (2, 4, 8)
SHAPE = (5, 11, 27)  # the last tokens along z, y and x hold 1, 3 and 3 layers of the volume
GRID = (3, 3, 4)
TOKENS = math.prod(GRID)
SEEN = 14  # of 36 tokens at a mask ratio of 0.6
VOXELS = math.prod(TOKEN)

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 999)
places = st.tuples(*(st.integers(0, sides - 1) for sides in (B, C, *SHAPE)))


def random_volume(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, C, *SHAPE, generator=seeded(seed))


def random_noise(seed: int = 0) -> torch.Tensor:
    return torch.rand(B, TOKENS, generator=seeded(seed + 1000))


def masks_of(noise: torch.Tensor) -> Masks:
    return Masking(mask_ratio=0.6).draw(noise)


def random_masks(seed: int = 0) -> Masks:
    return masks_of(random_noise(seed))


def autoencoder(channels: int = C) -> MaskedAutoencoder:
    """Build a network with heads 10 wide, as in the paper's size S, and a decoder width that positions do not fill."""
    torch.manual_seed(0)
    encoder = Encoder(Tokenizer(channels, TOKEN, 30), Transformer(30, 2, 3), token=TOKEN, positions=Positions())
    decoder = TokenDecoder(30, Transformer(20, 1, 2), outputs=channels * VOXELS, positions=Positions())
    return MaskedAutoencoder(encoder, decoder)


def token_of(z: int, y: int, x: int) -> int:
    return (z // 2 * 3 + y // 4) * 4 + x // 8


def hidden_voxels(hidden: torch.Tensor) -> torch.Tensor:
    """Return a mask of the voxels that belong to masked tokens (b 1 z y x), worked out voxel by voxel."""
    mask = torch.zeros(len(hidden), 1, *SHAPE, dtype=torch.bool)
    for b, tokens in enumerate(hidden.tolist()):
        for z, y, x in itertools.product(*map(range, SHAPE)):
            mask[b, 0, z, y, x] = token_of(z, y, x) in tokens
    return mask


def in_place(patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return patches of some tokens as a volume with its padding, zero elsewhere."""
    everything = torch.zeros(B, TOKENS, C, VOXELS)
    for b in range(B):
        everything[b, index[b]] = patches[b]
    return unpatchify(everything, GRID, TOKEN)


def cut(padded: torch.Tensor) -> torch.Tensor:
    z, y, x = SHAPE
    return padded[:, :, :z, :y, :x]


def random_patches(masks: Masks, seed: int = 0) -> torch.Tensor:
    return torch.randn(*masks.hidden.shape, C, VOXELS, generator=seeded(seed + 2000))


def loss_of(volume: torch.Tensor, masks: Masks, patches: torch.Tensor, *, norm_pix: bool) -> torch.Tensor:
    """Return the loss of predicted patches."""
    targets = take(patchify(volume, TOKEN), masks.hidden)
    return reconstruction_loss(
        Reconstruction(patches, targets, counted_voxels(volume, TOKEN, masks)), norm_pix=norm_pix
    )


def changed(volume: torch.Tensor, place: tuple[int, ...]) -> torch.Tensor:
    other = volume.clone()
    other[place] += 3.0
    return other


# ---------- what the network sees


def test_a_reconstruction_holds_the_hidden_tokens_and_what_they_are():
    volume, masks = random_volume(), random_masks()
    rebuilt = autoencoder()(volume, masks)
    assert rebuilt.patches.shape == rebuilt.targets.shape == (B, TOKENS - SEEN, C, VOXELS)
    mask = hidden_voxels(masks.hidden)
    assert torch.equal(cut(in_place(rebuilt.targets, masks.hidden)), volume * mask)
    counted = in_place(rebuilt.counted.expand(-1, -1, C, -1), masks.hidden)
    assert torch.equal(cut(counted), mask.expand(-1, C, -1, -1, -1).float())
    assert counted.sum() == C * mask.sum()  # the padding does not count


def test_the_decoders_outputs_are_channels_then_voxels():
    network = autoencoder()
    with torch.no_grad():
        network.decoder.head.weight.zero_()
        network.decoder.head.bias.copy_(torch.arange(C * VOXELS))
        patches = network(random_volume(), random_masks()).patches
    assert patches[1, 2, :, 53].tolist() == [53, 64 + 53, 128 + 53]


@few
@given(place=places, seed=seeds)
@example(place=(1, 0, 0, 6, 16), seed=160)
def test_a_hidden_voxel_changes_the_loss_but_no_prediction(place, seed):
    network, volume, noise = autoencoder(), random_volume(), random_noise(seed)
    noise[place[0], token_of(*place[2:])] = 2.0  # higher than all others
    masks, other = masks_of(noise), changed(volume, place)
    with torch.no_grad():
        first, second = network(volume, masks), network(other, masks)
    assert torch.equal(first.patches, second.patches)
    # not with norm-pix, to which one or two voxels of a token at the border are the same whatever their values
    losses = [reconstruction_loss(rebuilt, norm_pix=False) for rebuilt in (first, second)]
    assert not torch.equal(*losses)


@few
@given(place=places, seed=seeds)
def test_a_visible_voxel_changes_the_predictions_of_its_sample_but_not_their_target(place, seed):
    network, volume, noise = autoencoder(), random_volume(), random_noise(seed)
    noise[place[0], token_of(*place[2:])] = -1.0  # lower than all others
    masks = masks_of(noise)
    with torch.no_grad():
        first, second = network(volume, masks), network(changed(volume, place), masks)
    touched = [not torch.equal(a, b) for a, b in zip(first.patches, second.patches, strict=True)]
    assert touched == [b == place[0] for b in range(B)]
    assert torch.equal(first.targets, second.targets)
    assert torch.equal(first.counted, second.counted)


@few
@given(seed=seeds)
def test_no_hidden_voxel_has_a_gradient_of_any_prediction(seed):
    volume, masks = random_volume(seed).requires_grad_(), random_masks(seed)
    patches = autoencoder()(volume, masks).patches
    (patches * torch.randn(patches.shape, generator=seeded(seed))).sum().backward()
    seen = ~hidden_voxels(masks.hidden).expand_as(volume)
    assert torch.equal(volume.grad != 0, seen)


@few
@given(order=st.permutations(range(SEEN)))
def test_predictions_do_not_depend_on_the_order_of_the_visible_tokens(order):
    network, volume, masks = autoencoder(), random_volume(), random_masks()
    with torch.no_grad():
        first = network(volume, masks)
        second = network(volume, masks._replace(visible=masks.visible[:, list(order)]))
    assert torch.allclose(first.patches, second.patches, atol=1e-5)


def test_predictions_differ_from_hidden_token_to_hidden_token():
    """Mask tokens differ in their positions alone."""
    patches = autoencoder()(random_volume(), random_masks()).patches.detach().flatten(2)
    distances = torch.cdist(patches, patches) + 10 * torch.eye(patches.shape[1])
    assert distances.min() > 1e-3


def test_a_batch_is_predicted_as_its_samples_are():
    network, volume, masks = autoencoder(), random_volume(), random_masks()
    with torch.no_grad():
        batch = network(volume, masks)
        singles = [network(volume[b : b + 1], Masks(*(part[b : b + 1] for part in masks))) for b in range(B)]
    assert torch.allclose(batch.patches, torch.cat([single.patches for single in singles]), atol=1e-5)


def test_every_parameter_gets_a_gradient():
    network = autoencoder()
    reconstruction_loss(network(random_volume(), random_masks()), norm_pix=True).backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_step_reads_no_values_on_the_host(norm_pix):
    """A fake tensor has no values: reading one raises an error."""
    forget_positions()  # the cached tables are real tensors, and those made here are not
    try:
        with FakeTensorMode():
            network, volume = autoencoder(), torch.empty(B, C, *SHAPE)
            masks = Masking(mask_ratio=0.6).draw(torch.empty(B, TOKENS))
            loss = reconstruction_loss(network(volume, masks), norm_pix=norm_pix)
            loss.backward()
            assert all(p.grad is not None for p in network.parameters())
            with pytest.raises(DataDependentOutputException):  # so this test can fail
                loss.item()
    finally:
        forget_positions()


# ---------- what carries loss


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_of_a_batch_is_the_mean_over_all_hidden_voxels_of_its_samples(norm_pix):
    volume, masks = random_volume(), random_masks()
    patches = random_patches(masks)
    weights = hidden_voxels(masks.hidden).sum((1, 2, 3, 4))
    assert weights[0] != weights[1]  # uneven tokens: the mean of the samples' means would be another number
    losses = [
        loss_of(volume[b : b + 1], Masks(*(part[b : b + 1] for part in masks)), patches[b : b + 1], norm_pix=norm_pix)
        for b in range(B)
    ]
    expected = (torch.stack(losses) * weights).sum() / weights.sum()
    assert torch.allclose(loss_of(volume, masks, patches, norm_pix=norm_pix), expected)


@few
@given(seed=seeds)
def test_the_loss_is_the_mean_squared_error_of_the_hidden_voxels(seed):
    volume, masks = random_volume(seed), random_masks(seed)
    patches = random_patches(masks, seed)
    mask = hidden_voxels(masks.hidden).expand(-1, C, -1, -1, -1)
    expected = (cut(in_place(patches, masks.hidden)) - volume)[mask].square().mean()
    assert torch.allclose(loss_of(volume, masks, patches, norm_pix=False), expected, rtol=1e-4)


def test_a_perfect_prediction_has_no_loss():
    volume, masks = random_volume(), random_masks()
    assert loss_of(volume, masks, take(patchify(volume, TOKEN), masks.hidden), norm_pix=False) == 0


@settings(max_examples=10, deadline=None)
@given(seed=seeds, norm_pix=st.booleans())
def test_exactly_the_hidden_voxels_that_count_carry_loss(seed, norm_pix):
    masks = random_masks(seed)
    masks = masks._replace(counted=torch.rand(masks.hidden.shape, generator=seeded(seed)) < 0.7)
    everything = torch.randn(B, C, 6, 12, 32, generator=seeded(seed)) + 100  # padding included; far from any target
    everything.requires_grad_()
    loss_of(random_volume(seed), masks, take(patchify(everything, TOKEN), masks.hidden), norm_pix=norm_pix).backward()
    expected = torch.zeros(B, C, 6, 12, 32, dtype=torch.bool)
    for b in range(B):
        of_sample = hidden_voxels(masks.hidden[b : b + 1, masks.counted[b]])
        cut(expected)[b] = of_sample[0]
    assert torch.equal(everything.grad != 0, expected)


@few
@given(seed=seeds, norm_pix=st.booleans(), rubbish=st.floats(-1e4, 1e4))
def test_tokens_that_do_not_count_change_no_loss_whatever_they_hold(seed, norm_pix, rubbish):
    volume, masks = random_volume(seed), random_masks(seed)
    masks = masks._replace(counted=torch.arange(masks.hidden.shape[1]).expand(B, -1) < 9)
    patches = random_patches(masks, seed)
    some = loss_of(volume, Masks(masks.visible, masks.hidden[:, :9], masks.counted[:, :9]), patches[:, :9],
                   norm_pix=norm_pix)  # fmt: skip
    patches[:, 9:] = rubbish
    assert torch.allclose(loss_of(volume, masks, patches, norm_pix=norm_pix), some, rtol=1e-5)


@few
@given(seed=seeds, norm_pix=st.booleans())
def test_predictions_in_the_padding_carry_no_loss(seed, norm_pix):
    volume, masks = random_volume(seed), random_masks(seed)
    patches = random_patches(masks, seed)
    inside = take(voxels_inside(volume, TOKEN).expand(B, -1, -1, -1), masks.hidden)
    assert (inside == 0).any()
    other = torch.where(inside.bool(), patches, torch.tensor(1e4))
    losses = [loss_of(volume, masks, given, norm_pix=norm_pix) for given in (patches, other)]
    assert torch.equal(*losses)


def test_without_hidden_tokens_the_loss_is_zero():
    volume = torch.randn(2, 2, 1, 3, 7, generator=seeded())  # a single token, which stays visible
    loss = reconstruction_loss(autoencoder(channels=2)(volume, masks_of(torch.rand(2, 1))), norm_pix=True)
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("norm_pix", [True, False])
def test_where_no_token_counts_the_loss_is_zero_and_its_gradients_are_finite(norm_pix):
    network, masks = autoencoder(), random_masks()
    masks = masks._replace(counted=torch.zeros_like(masks.counted))
    loss = reconstruction_loss(network(random_volume(), masks), norm_pix=norm_pix)
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in network.parameters())


# ---------- normalised targets


@few
@given(seed=seeds, scale=st.floats(0.5, 1000), shift=st.floats(-1000, 1000))
def test_normalised_tokens_have_mean_0_and_unbiased_variance_1_inside_the_volume(seed, scale, shift):
    volume = random_volume(seed).double() * scale + shift
    inside = voxels_inside(volume, TOKEN).expand(B, -1, -1, -1)
    patches = norm_pix_targets(patchify(volume, TOKEN), inside)
    back = cut(unpatchify(patches, GRID, TOKEN)).numpy()
    for z, y, x in itertools.product(range(0, 5, 2), range(0, 11, 4), range(0, 27, 8)):
        of_token = back[:, :, z : z + 2, y : y + 4, x : x + 8].reshape(B, C, -1)
        np.testing.assert_allclose(of_token.mean(-1), 0, atol=1e-6)
        np.testing.assert_allclose(of_token.var(-1, ddof=1), 1, atol=1e-3)


@few
@given(seed=seeds, rubbish=st.floats(-1e4, 1e4))
def test_normalised_tokens_do_not_depend_on_the_padding(seed, rubbish):
    volume = random_volume(seed)
    inside = voxels_inside(volume, TOKEN).expand(B, -1, -1, -1)
    patches = patchify(volume, TOKEN)
    soiled = torch.where(inside.bool(), patches, torch.tensor(rubbish))
    clean, other = norm_pix_targets(patches, inside) * inside, norm_pix_targets(soiled, inside) * inside
    assert torch.equal(clean, other)


@few
@given(seed=seeds, channel=st.integers(0, C - 1), scale=st.floats(0.2, 50), shift=st.floats(1, 50) | st.floats(-50, -1))
def test_brightness_and_contrast_of_a_hidden_token_do_not_change_the_loss(seed, channel, scale, shift):
    volume, masks = random_volume(seed).double(), random_masks(seed)
    z, y, x = np.unravel_index(masks.hidden[1, 0].item(), GRID)
    place = (1, channel, slice(2 * z, 2 * z + 2), slice(4 * y, 4 * y + 4), slice(8 * x, 8 * x + 8))
    other = volume.clone()
    other[place] = other[place] * scale + shift
    assert not torch.equal(volume, other)
    with patch("nnunet_vit_mae.networks.autoencoder.NORM_PIX_EPSILON", 1e-15):  # which counts in flat tokens
        losses = [loss_of(v, masks, random_patches(masks, seed), norm_pix=True) for v in (volume, other)]
    assert torch.allclose(*losses, rtol=1e-4)


def test_without_norm_pix_brightness_matters():
    volume, masks = random_volume(), random_masks()
    losses = [loss_of(v, masks, random_patches(masks), norm_pix=False) for v in (volume, volume + 2)]
    assert not torch.allclose(*losses, rtol=1e-2)


@pytest.mark.parametrize("value", [0.0, -1024.0, 0.1])
def test_constant_tokens_give_finite_losses_and_gradients(value):
    network, volume = autoencoder(), torch.full((B, C, *SHAPE), value)
    loss = reconstruction_loss(network(volume, random_masks()), norm_pix=True)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_token_with_a_single_voxel_inside_the_volume_gives_a_finite_loss():
    volume = torch.randn(B, C, 3, 5, 9, generator=seeded())  # the last token holds one voxel
    masks = masks_of(torch.linspace(0, 1, 8).expand(B, -1))
    assert reconstruction_loss(autoencoder()(volume, masks), norm_pix=True).isfinite()


# ---------- learning


@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_batch_can_be_overfitted(norm_pix):
    network, volume, masks = autoencoder(), random_volume(), random_masks()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = reconstruction_loss(network(volume, masks), norm_pix=norm_pix)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
