"""Test masked autoencoding of any number of contrasts against the paper's steps, done study by study."""

import itertools
import math
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import MIXED, SIDES, perturbed, seeded, studies_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks import adaptive_autoencoder
from nnunet_vit_mae.networks.adaptive import AdaptiveEncoder, DynamicTokenizer, ModalityVectors
from nnunet_vit_mae.networks.adaptive_autoencoder import AdaptiveMaskedAutoencoder
from nnunet_vit_mae.networks.autoencoder import Reconstruction, reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.grouping import Group, groups
from nnunet_vit_mae.networks.masking import Masking, Masks
from nnunet_vit_mae.networks.memory import pretraining_memory
from nnunet_vit_mae.networks.positions import Positions, forget_positions, sine_cosine_positions
from nnunet_vit_mae.networks.token_decoder import TokenDecoder
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.networks.transformer import Transformer
from nnunet_vit_mae.presets import MODALITY_VECTORS
from nnunet_vit_mae.pretraining.crops import Samples
from nnunet_vit_mae.pretraining.pictures import rebuild
from nnunet_vit_mae.settings import Network, Pretraining, count_visible

CPU = torch.device("cpu")
C, TOKEN, GRID = 3, (2, 4, 8), (4, 2, 3)  # the last tokens hold 1 layer of the volume each
TOKENS, SEEN = 24, 10
MASKING = Masking(mask_ratio=0.6)
IMAGES = [(study, contrast) for study, contrasts in enumerate(MIXED) for contrast in contrasts]

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 999)
both_kinds = pytest.mark.parametrize("kind", MODALITY_VECTORS)
image_numbers = st.integers(0, len(IMAGES) - 1)
voxels = st.tuples(*(st.integers(0, side - 1) for side in SIDES))


def noise_for(studies: int, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.rand(studies, C * tokens, generator=seeded(seed + 1000))


def autoencoder(
    kind: str = "one_hot", channels: int = C, *, seed: int = 0, **changed: str
) -> AdaptiveMaskedAutoencoder:
    torch.manual_seed(seed)
    network = Network(size="XS", token=TOKEN, adaptive=True, modality_vectors=kind, **changed)
    return perturbed(build_autoencoder(network, channels, Pretraining()), seed)


def token_of(z: int, y: int, x: int) -> int:
    return (z // 2 * 2 + y // 4) * 3 + x // 8


def images_of(present: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return study and contrast of each contrast image of a batch; a study of zeros counts as its first contrast."""
    return [(study, contrast) for study, own in enumerate(present) for contrast in own or [0]]


def split(noise: torch.Tensor, study: int, contrast: int, seen: int = SEEN) -> tuple[list[int], list[int]]:
    """Return visible and masked tokens of one contrast, by their own noise."""
    own = noise[study].unflatten(0, (C, -1))[contrast].tolist()
    order = sorted(range(len(own)), key=own.__getitem__)
    return order[:seen], order[seen:]


def masks_for(noise: torch.Tensor, present: Sequence[Sequence[int]], seen: int = SEEN) -> Masks:
    """Return the masks of the contrast images of a batch, in which every masked token counts."""
    visible, hidden = zip(*(split(noise, *image, seen) for image in images_of(present)), strict=True)
    index = torch.tensor(hidden, dtype=torch.long)
    return Masks(torch.tensor(visible), index, torch.ones_like(index, dtype=torch.bool))


def hidden_voxels(noise: torch.Tensor, study: int, contrast: int) -> torch.Tensor:
    """Return a mask of the voxels (z y x) of one contrast that belong to masked tokens, voxel by voxel."""
    mask, (_, hidden) = torch.zeros(SIDES, dtype=torch.bool), split(noise, study, contrast)
    for place in itertools.product(*map(range, SIDES)):
        mask[place] = token_of(*place) in hidden
    return mask


def with_random_patches(rebuilt: Reconstruction, seed: int = 0) -> Reconstruction:
    return rebuilt._replace(patches=torch.randn(rebuilt.patches.shape, generator=seeded(seed + 2000)))


# ---------- what goes through the network


@both_kinds
@pytest.mark.parametrize("present", [MIXED, [[0, 1, 2]] * 2, [[], [2]]], ids=["mixed", "all", "few"])
def test_no_token_is_padding_or_of_an_absent_contrast(kind, present):
    network, lengths = autoencoder(kind), {"encoder": [], "decoder": []}
    for name, found in lengths.items():
        blocks = network.get_submodule(f"{name}.transformer.blocks")
        blocks[0].register_forward_hook(lambda _, given, __, found=found: found.append(given[0].shape[:2]))
    with torch.no_grad():
        network(studies_with(present), masks_for(noise_for(len(present)), present))
    for name, each in (("encoder", SEEN), ("decoder", TOKENS)):
        expected = [each * max(1, len(contrasts)) for contrasts in present]
        assert sorted(length for studies, length in lengths[name] for _ in range(studies)) == sorted(expected)


# ---------- predictions


@both_kinds
def test_predictions_are_those_of_the_papers_steps_with_all_tokens_in_place(kind):
    network, studies = autoencoder(kind, positions="sine_cosine").double(), [*MIXED, []]
    volume, noise = studies_with(studies).double(), noise_for(5)
    patches = patchify(volume, TOKEN)[:, :, :, None]
    narrow, wide = (sine_cosine_positions(GRID, width, CPU) for width in (48, 96))
    predicted = iter(network(volume, masks_for(noise, studies)).patches)
    for study, contrasts in enumerate([*MIXED, [0]]):
        masks = {c: split(noise, study, c) for c in contrasts}
        seen = []
        for c, place in ((c, place) for c, (visible, _) in masks.items() for place in sorted(visible)):
            embedded = network.encoder.tokenizer(patches[study, place, c][None], torch.tensor([c]))
            seen.append(embedded[0, 0] + wide[place])
        encoded = iter(network.decoder.embed(network.encoder.transformer(torch.stack(seen)[None]))[0])
        every = []
        for c, place in itertools.product(contrasts, range(TOKENS)):
            token = next(encoded) if place in masks[c][0] else network.mask_token
            every.append(token + narrow[place] + network.contrast_embedding[c])
        decoded = network.decoder.head(network.decoder.transformer(torch.stack(every)[None]))[0].split(TOKENS)
        for c, of_contrast in zip(contrasts, decoded, strict=True):
            assert torch.allclose(next(predicted)[:, 0], of_contrast[masks[c][1]], rtol=0, atol=1e-9)
    assert next(predicted, None) is None


@few
@given(number=image_numbers, voxel=voxels, seed=seeds)
def test_a_hidden_voxel_changes_the_loss_but_no_prediction(number, voxel, seed):
    network, volume, noise = autoencoder(), studies_with(MIXED), noise_for(4, seed=seed)
    study, contrast = IMAGES[number]
    noise[study, contrast * TOKENS + token_of(*voxel)] = 2.0  # higher than all others
    masks, other = masks_for(noise, MIXED), volume.clone()
    other[study, contrast, *voxel] += 3.0
    with torch.no_grad():
        first, second = network(volume, masks), network(other, masks)
    assert torch.equal(first.patches, second.patches)
    assert not torch.equal(*(reconstruction_loss(rebuilt, norm_pix=False) for rebuilt in (first, second)))


@few
@given(number=image_numbers, voxel=voxels, seed=seeds)
def test_a_visible_voxel_changes_the_predictions_of_all_contrasts_of_its_study(number, voxel, seed):
    network, volume, noise = autoencoder(), studies_with(MIXED), noise_for(4, seed=seed)
    study, contrast = IMAGES[number]
    noise[study, contrast * TOKENS + token_of(*voxel)] = -1.0  # lower than all others
    masks, other = masks_for(noise, MIXED), volume.clone()
    other[study, contrast, *voxel] += 3.0
    with torch.no_grad():
        first, second = network(volume, masks), network(other, masks)
    touched = [not torch.equal(a, b) for a, b in zip(first.patches, second.patches, strict=True)]
    assert touched == [image[0] == study for image in IMAGES]
    assert torch.equal(first.targets, second.targets)


@few
@given(seed=seeds)
def test_exactly_the_visible_voxels_of_present_contrasts_have_a_gradient_of_the_predictions(seed):
    volume, noise = studies_with(MIXED, seed=seed).requires_grad_(), noise_for(4, seed=seed)
    patches = autoencoder()(volume, masks_for(noise, MIXED)).patches
    (patches * torch.randn(patches.shape, generator=seeded(seed))).sum().backward()
    expected = torch.zeros_like(volume, dtype=torch.bool)
    for image in IMAGES:
        expected[image] = ~hidden_voxels(noise, *image)
    assert torch.equal(volume.grad != 0, expected)


@few
@given(order=st.permutations(range(4)), kind=st.sampled_from(MODALITY_VECTORS))
def test_each_study_is_rebuilt_for_itself_whatever_the_order_of_the_batch(order, kind):
    network, volume, noise = autoencoder(kind).double(), studies_with(MIXED).double(), noise_for(4)
    with torch.no_grad():
        straight = network(volume, masks_for(noise, MIXED))
        permuted = network(volume[order], masks_for(noise[order], [MIXED[study] for study in order]))
        alone = [network(volume[[study]], masks_for(noise[[study]], [MIXED[study]])) for study in order]
    moved = [number for study in order for number, image in enumerate(IMAGES) if image[0] == study]
    for one, of_order, other in zip(straight, permuted, map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert torch.allclose(one[moved], of_order, rtol=0, atol=1e-9)
        assert torch.allclose(one[moved], other, rtol=0, atol=1e-9)


@both_kinds
def test_the_voxels_tell_which_contrasts_there_are_unless_it_is_given(kind):
    network, studies = autoencoder(kind), [*MIXED, []]
    volume, masks = studies_with(studies), masks_for(noise_for(5), studies)
    with torch.no_grad():
        found, given = network(volume, masks), network(volume, masks, [*MIXED, [0]])
        other = network(volume, masks, [*MIXED, [1]])
    assert all(torch.equal(a, b) for a, b in zip(found, given, strict=True))
    assert not torch.equal(found.patches[-1], other.patches[-1])


@both_kinds
@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_step_reads_no_values_on_the_host(kind, norm_pix):
    """A fake tensor has no values: reading one raises an error."""
    forget_positions()  # the cached tables are real tensors, and those made here are not
    try:
        with FakeTensorMode():
            network, volume = autoencoder(kind), torch.empty(len(MIXED), C, *SIDES)
            masks = MASKING.draw(torch.empty(len(IMAGES), TOKENS))
            reconstruction_loss(network(volume, masks, MIXED), norm_pix=norm_pix).backward()
            assert all(p.grad is not None for p in network.parameters())
            with pytest.raises(DataDependentOutputException):  # so this test can fail
                network(volume, masks)
    finally:
        forget_positions()


def with_contrasts(network: AdaptiveMaskedAutoencoder, kind: str, chosen: Sequence[int]) -> AdaptiveMaskedAutoencoder:
    """Return a copy that knows the chosen contrasts only, in this order."""
    copy, state = autoencoder(kind, len(chosen), seed=1), network.state_dict()
    state["contrast_embedding"] = state["contrast_embedding"][list(chosen)]
    if kind == "learned":
        state["encoder.tokenizer.vectors.table"] = state["encoder.tokenizer.vectors.table"][list(chosen)]
    else:
        state["encoder.tokenizer.factors.weight"] = state["encoder.tokenizer.factors.weight"][:, list(chosen)]
    copy.load_state_dict(state)
    return copy


def of_contrasts(noise: torch.Tensor, chosen: Sequence[int]) -> torch.Tensor:
    return noise.unflatten(1, (C, TOKENS))[:, list(chosen)].flatten(1)


@both_kinds
def test_the_order_of_contrasts_does_not_matter_but_which_one_it_is_does(kind):
    order, network = (2, 0, 1), autoencoder(kind)
    other = with_contrasts(network, kind, order).double()
    volume, noise = studies_with(MIXED).double(), noise_for(4)
    present = [[place for place, contrast in enumerate(order) if contrast in own] for own in MIXED]
    shuffled = volume[:, order], masks_for(of_contrasts(noise, order), present)
    with torch.no_grad():
        expected = network.double()(volume, masks_for(noise, MIXED)).patches
        found, wrong = other(*shuffled).patches, network(*shuffled).patches
    again = [IMAGES.index((study, c)) for study, own in enumerate(MIXED) for c in order if c in own]
    assert torch.allclose(found, expected[again], rtol=0, atol=1e-9)
    assert not torch.allclose(wrong, expected[again], rtol=0, atol=1e-3)


@both_kinds
@pytest.mark.parametrize("absent", range(C))
def test_an_absent_contrast_changes_nothing(kind, absent):
    network, kept = autoencoder(kind), [contrast for contrast in range(C) if contrast != absent]
    present = [kept, kept[1:], kept]
    volume, masks = studies_with(present), masks_for(noise_for(3), present)
    with torch.no_grad():
        full = network(volume, masks)
        own = with_contrasts(network, kind, kept)(volume[:, kept], masks)
    assert all(torch.equal(a, b) for a, b in zip(full, own, strict=True))


# ---------- loss


def test_the_targets_are_the_hidden_tokens_of_present_contrasts_one_study_after_the_other():
    studies = [*MIXED, []]
    volume, masks = studies_with(studies), masks_for(noise_for(5), studies)
    targets, patches = autoencoder()(volume, masks).targets, patchify(volume, TOKEN)
    for (study, contrast), hidden, of_image in zip(images_of(studies), masks.hidden, targets, strict=True):
        assert torch.equal(of_image[:, 0], patches[study, hidden, contrast])


def test_the_loss_is_the_mean_over_the_hidden_voxels_of_present_contrasts():
    volume, noise, errors = studies_with(MIXED), noise_for(4), []
    masks = masks_for(noise, MIXED)
    rebuilt = with_random_patches(autoencoder()(volume, masks))
    rows = [{token: row for row, token in enumerate(hidden)} for hidden in masks.hidden.tolist()]
    for number, image in enumerate(IMAGES):
        for z, y, x in itertools.product(*map(range, SIDES)):
            if (row := rows[number].get(token_of(z, y, x))) is not None:
                predicted = rebuilt.patches[number, row, 0, (z % 2 * 4 + y % 4) * 8 + x % 8]
                errors.append((predicted - volume[*image, z, y, x]).item() ** 2)
    assert len(errors) == sum(hidden_voxels(noise, *image).sum() for image in IMAGES)
    assert reconstruction_loss(rebuilt, norm_pix=False).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_exactly_the_hidden_voxels_of_present_contrasts_carry_loss():
    volume, noise = studies_with(MIXED).requires_grad_(), noise_for(4)
    rebuilt = with_random_patches(autoencoder()(volume, masks_for(noise, MIXED)))
    rebuilt.patches.requires_grad_()
    reconstruction_loss(rebuilt, norm_pix=False).backward()
    expected = torch.zeros(len(MIXED), C, *SIDES, dtype=torch.bool)
    for image in IMAGES:
        expected[image] = hidden_voxels(noise, *image)
    assert torch.equal(volume.grad != 0, expected)
    assert (rebuilt.patches.grad != 0).sum() == expected.sum()


@few
@given(number=image_numbers, seed=seeds, shift=st.floats(1, 50) | st.floats(-50, -1))
def test_brightness_and_contrast_of_one_image_do_not_change_the_loss(number, seed, shift):
    network, volume = autoencoder().double(), studies_with(MIXED, seed=seed).double()
    other, masks = volume.clone(), masks_for(noise_for(4, seed=seed), MIXED)
    other[IMAGES[number]] = other[IMAGES[number]] * 7 + shift
    # the epsilon counts in flat tokens
    with torch.no_grad(), patch("nnunet_vit_mae.networks.autoencoder.NORM_PIX_EPSILON", 1e-15):
        rebuilt = [with_random_patches(network(v, masks), seed) for v in (volume, other)]
        same, different = ([reconstruction_loss(r, norm_pix=n) for r in rebuilt] for n in (True, False))
    assert torch.allclose(*same, rtol=1e-4)
    assert not torch.allclose(*different, rtol=0.1)


def test_a_perfect_prediction_has_no_loss():
    rebuilt = autoencoder()(studies_with(MIXED), masks_for(noise_for(4), MIXED))
    assert reconstruction_loss(rebuilt._replace(patches=rebuilt.targets), norm_pix=False) == 0


# ---------- edges


@both_kinds
@pytest.mark.parametrize(
    ("sides", "ratio", "hidden"), [((1, 3, 7), 0.6, 0), (SIDES, 0.01, 0), (SIDES, 0.05, 1), (SIDES, 0.99, 23)]
)
@pytest.mark.parametrize("present", [MIXED, [[1], [1]], [[], []], [[], [0, 2]]], ids=["mixed", "one", "none", "some"])
def test_all_parameters_have_finite_gradients_whatever_is_hidden_or_absent(kind, sides, ratio, hidden, present):
    network, volume = autoencoder(kind), studies_with(present, sides)
    tokens = math.prod(math.ceil(n / side) for n, side in zip(sides, TOKEN, strict=True))
    masks = masks_for(noise_for(len(present), tokens), present, count_visible(tokens, ratio))
    assert masks.hidden.shape == (sum(max(1, len(contrasts)) for contrasts in present), hidden)
    loss = reconstruction_loss(network(volume, masks), norm_pix=True)
    loss.backward()
    assert loss.isfinite()
    assert (loss.item() == 0) == (hidden == 0)
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []
    assert network.contrast_embedding.grad.any(1).tolist() == [
        hidden > 0 and any(c in (contrasts or [0]) for contrasts in present) for c in range(C)
    ]


@pytest.mark.usefixtures("one_process")
@both_kinds
def test_an_autoencoder_trains_in_distributed_processes_whatever_contrasts_a_batch_has(kind):
    network = DistributedDataParallel(autoencoder(kind), find_unused_parameters=False)
    optimizer = torch.optim.AdamW(network.parameters())
    for present in ([[1], [1]], MIXED, [[], [2]]):  # the next step finds parameters that one left out
        optimizer.zero_grad()
        masks = masks_for(noise_for(len(present)), present)
        reconstruction_loss(network(studies_with(present), masks), norm_pix=True).backward()
        optimizer.step()


@both_kinds
def test_an_autoencoder_stores_nothing_but_its_parameters(kind):
    network = autoencoder(kind)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(("kind", "norm_pix"), [("one_hot", True), ("learned", False)])
def test_a_batch_of_studies_with_different_contrasts_can_be_overfitted(kind, norm_pix):
    torch.manual_seed(0)
    tokenizer = DynamicTokenizer(ModalityVectors(C, kind), TOKEN, 30)
    encoder = AdaptiveEncoder(tokenizer, Transformer(30, 2, 3), token=TOKEN, positions=Positions())
    decoder = TokenDecoder(30, Transformer(20, 1, 2), outputs=math.prod(TOKEN), positions=Positions())
    network = AdaptiveMaskedAutoencoder(encoder, decoder, contrasts=C)
    present = [[0, 1, 2], [1], [0, 2]]
    volume, masks = studies_with(present), masks_for(noise_for(3), present)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = reconstruction_loss(network(volume, masks), norm_pix=norm_pix)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---------- memory and pictures


def test_the_planner_counts_on_all_contrasts_of_all_studies(monkeypatch):
    network = Network(size="XS", token=TOKEN, adaptive=True)
    positions, before = sine_cosine_positions(GRID, 96, CPU).clone(), torch.random.get_rng_state()
    rehearsed = []

    def recorded(present: list[list[int]], device: torch.device) -> Iterator[Group]:
        rehearsed.append(present)
        return groups(present, device)

    monkeypatch.setattr(adaptive_autoencoder, "groups", recorded)
    assert pretraining_memory(network, Pretraining(mask_ratio=0.6), SIDES, C, 4) > 0
    assert rehearsed == [[[0, 1, 2]] * 4]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(sine_cosine_positions(GRID, 96, CPU), positions)


@few
@given(
    present=st.sets(st.integers(0, C - 1)).map(sorted),
    kind=st.sampled_from(MODALITY_VECTORS),
    norm_pix=st.booleans(),
    seed=seeds,
)
def test_pictures_show_each_present_contrast_with_its_hidden_tokens_rebuilt(present, kind, norm_pix, seed):
    network, volume, noise = autoencoder(kind), studies_with([present], seed=seed) * 5 + 0.0, noise_for(1, seed=seed)
    shown, masks = present or [0], masks_for(noise, [present])
    original, masked, rebuilt = rebuild(network, MASKING, Samples(volume, masks, [shown]), norm_pix=norm_pix)
    assert np.array_equal(original, volume[0, shown].numpy())
    hidden = torch.stack([hidden_voxels(noise, 0, contrast) for contrast in shown]).numpy()
    assert np.array_equal(np.isnan(masked), hidden)
    assert np.array_equal(masked[~hidden], original[~hidden])
    assert np.array_equal(rebuilt[~hidden], original[~hidden])
    assert np.isfinite(rebuilt).all()
    if not norm_pix:
        with torch.no_grad():
            predicted = network(volume, masks).patches
        for c, contrast in enumerate(shown):
            places = {token: row for row, token in enumerate(split(noise, 0, contrast)[1])}
            for z, y, x in zip(*hidden[c].nonzero(), strict=True):
                expected = predicted[c, places[token_of(z, y, x)], 0, (z % 2 * 4 + y % 4) * 8 + x % 8]
                assert rebuilt[c, z, y, x] == expected.item()


def test_pictures_leak_nothing_of_what_was_hidden():
    network, volume, noise = autoencoder(), studies_with([[0, 2]]), noise_for(1)
    masks, other = masks_for(noise, [[0, 2]]), volume.clone()
    for contrast in (0, 2):
        other[0, contrast][hidden_voxels(noise, 0, contrast)] += 10.0 + contrast
    first, second = (rebuild(network, MASKING, Samples(v, masks, [[0, 2]]), norm_pix=True) for v in (volume, other))
    assert not np.array_equal(first.original, second.original)
    assert np.array_equal(first.rebuilt, second.rebuilt)
