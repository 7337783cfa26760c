"""Masked autoencoding of any number of contrasts, with the paper's steps done study by study."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks import adaptive_autoencoder as adaptive_mae
from nnunet_vit_mae.networks.adaptive_autoencoder import AdaptiveMaskedAutoencoder
from nnunet_vit_mae.networks.autoencoder import Reconstruction, reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder
from nnunet_vit_mae.networks.masking import count_visible
from nnunet_vit_mae.networks.memory import pretraining_memory
from nnunet_vit_mae.networks.positions import sine_cosine_positions
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.presets import MODALITY_VECTORS, Network, Pretraining
from nnunet_vit_mae.pretraining.pictures import rebuild

CPU = torch.device("cpu")
C, TOKEN, SIDES, GRID = 3, (2, 4, 8), (7, 5, 17), (4, 2, 3)  # the last tokens hold 1 layer of the volume each
TOKENS, SEEN, VOXELS = 24, 10, 64  # at a mask ratio of 0.6
MIXED = [[0, 1, 2], [1], [0, 2], [1, 2]]  # the contrasts of four studies
SERIES = [(study, contrast) for study, contrasts in enumerate(MIXED) for contrast in contrasts]

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 999)
both_kinds = pytest.mark.parametrize("kind", MODALITY_VECTORS)
series_numbers = st.integers(0, len(SERIES) - 1)
voxels = st.tuples(*(st.integers(0, side - 1) for side in SIDES))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def studies_with(present: Sequence[Sequence[int]], sides: Sequence[int] = SIDES, seed: int = 0) -> torch.Tensor:
    """A batch of noise with zeros for the contrasts that a study lacks."""
    volume = torch.randn(len(present), C, *sides, generator=seeded(seed))
    for study, contrasts in enumerate(present):
        for absent in set(range(C)) - set(contrasts):
            volume[study, absent] = 0
    return volume


def noise_for(studies: int, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.rand(studies, C * tokens, generator=seeded(seed + 1000))


def autoencoder(
    kind: str = "one_hot", channels: int = C, *, mask_ratio: float = 0.6, seed: int = 0
) -> AdaptiveMaskedAutoencoder:
    """With other weights than at first, when modality vectors do not matter yet."""
    torch.manual_seed(seed)
    network = Network(size="XS", token=TOKEN, adaptive=True, modality_vectors=kind)
    built = build_autoencoder(network, channels, Pretraining(mask_ratio=mask_ratio))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def token_of(z: int, y: int, x: int) -> int:
    return (z // 2 * 2 + y // 4) * 3 + x // 8


def split(noise: torch.Tensor, study: int, contrast: int, seen: int = SEEN) -> tuple[list[int], list[int]]:
    """Visible and hidden tokens of one contrast, by their own noise."""
    own = noise[study, contrast * TOKENS : (contrast + 1) * TOKENS].tolist()
    order = sorted(range(TOKENS), key=own.__getitem__)
    return order[:seen], order[seen:]


def hidden_voxels(noise: torch.Tensor, study: int, contrast: int) -> torch.Tensor:
    """True where a voxel (z y x) belongs to a hidden token, voxel by voxel."""
    mask, (_, hidden) = torch.zeros(SIDES, dtype=torch.bool), split(noise, study, contrast)
    for place in itertools.product(*map(range, SIDES)):
        mask[place] = token_of(*place) in hidden
    return mask


def random_reconstruction(noise: torch.Tensor, seed: int = 0) -> Reconstruction:
    halves = zip(*(split(noise, *series) for series in SERIES), strict=True)
    visible, hidden = (torch.tensor(half) for half in halves)
    return Reconstruction(torch.randn(*hidden.shape, 1, VOXELS, generator=seeded(seed + 2000)), visible, hidden)


def loss_of(network: AdaptiveMaskedAutoencoder, volume: torch.Tensor, rebuilt: Reconstruction, *, norm_pix: bool):
    return reconstruction_loss(network.targets(volume), rebuilt, TOKEN, norm_pix=norm_pix)


# ---------- masks


@few
@given(ratio=st.floats(0.01, 0.99), seed=seeds)
def test_each_contrast_hides_its_own_share_by_its_own_noise(ratio, seed):
    noise, seen = noise_for(4, seed=seed), count_visible(TOKENS, ratio)
    with torch.no_grad():
        rebuilt = autoencoder(mask_ratio=ratio)(studies_with(MIXED), noise)
    assert rebuilt.patches.shape == (len(SERIES), TOKENS - seen, 1, VOXELS)
    for number, series in enumerate(SERIES):
        visible, hidden = split(noise, *series, seen)
        assert rebuilt.visible[number].tolist() == visible
        assert rebuilt.hidden[number].tolist() == hidden


@pytest.mark.parametrize("noise", [TOKENS, 3 * TOKENS + 1, 4 * TOKENS])
def test_noise_for_other_contrasts_is_refused(noise):
    with pytest.raises(ValueError, match="3 contrasts of 24 tokens"):
        autoencoder()(studies_with(MIXED), torch.rand(4, noise))


@both_kinds
@pytest.mark.parametrize("present", [MIXED, [[0, 1, 2]] * 2, [[], [2]]], ids=["mixed", "all", "few"])
def test_no_token_is_padding_or_of_an_absent_contrast(kind, present):
    network, lengths = autoencoder(kind), {"encoder": [], "decoder": []}
    for name, found in lengths.items():
        blocks = network.get_submodule(f"{name}.transformer.blocks")
        blocks[0].register_forward_hook(lambda _, given, __, found=found: found.append(given[0].shape[:2]))
    with torch.no_grad():
        network(studies_with(present), noise_for(len(present)))
    for name, each in (("encoder", SEEN), ("decoder", TOKENS)):
        expected = [each * max(1, len(contrasts)) for contrasts in present]
        assert sorted(length for studies, length in lengths[name] for _ in range(studies)) == sorted(expected)


# ---------- predictions


@both_kinds
def test_predictions_are_those_of_the_papers_steps_with_all_tokens_in_place(kind):
    network = autoencoder(kind).double()
    volume, noise = studies_with([*MIXED, []]).double(), noise_for(5)
    patches = patchify(volume, TOKEN)[:, :, :, None]
    narrow, wide = (sine_cosine_positions(GRID, width, CPU) for width in (48, 96))
    found = iter(network(volume, noise).patches)
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
            assert torch.allclose(next(found)[:, 0], of_contrast[masks[c][1]], rtol=0, atol=1e-9)
    assert next(found, None) is None


@few
@given(number=series_numbers, voxel=voxels, seed=seeds)
def test_a_hidden_voxel_changes_the_loss_but_no_prediction(number, voxel, seed):
    network, volume, noise = autoencoder(), studies_with(MIXED), noise_for(4, seed=seed)
    study, contrast = SERIES[number]
    if token_of(*voxel) not in split(noise, study, contrast)[1]:
        noise[study, contrast * TOKENS + token_of(*voxel)] = 2.0  # higher than all others
    other = volume.clone()
    other[study, contrast, *voxel] += 3.0
    with torch.no_grad():
        first, second = network(volume, noise), network(other, noise)
    assert torch.equal(first.patches, second.patches)
    assert not torch.equal(*(loss_of(network, v, first, norm_pix=False) for v in (volume, other)))


@few
@given(number=series_numbers, voxel=voxels, seed=seeds)
def test_a_visible_voxel_changes_the_predictions_of_all_contrasts_of_its_study(number, voxel, seed):
    network, volume, noise = autoencoder(), studies_with(MIXED), noise_for(4, seed=seed)
    study, contrast = SERIES[number]
    noise[study, contrast * TOKENS + token_of(*voxel)] = -1.0  # lower than all others
    other = volume.clone()
    other[study, contrast, *voxel] += 3.0
    with torch.no_grad():
        first, second = network(volume, noise), network(other, noise)
    touched = [not torch.equal(a, b) for a, b in zip(first.patches, second.patches, strict=True)]
    assert touched == [series[0] == study for series in SERIES]
    assert torch.equal(*(loss_of(network, v, first, norm_pix=True) for v in (volume, other)))


@few
@given(order=st.permutations(range(4)), kind=st.sampled_from(MODALITY_VECTORS))
def test_each_study_is_rebuilt_for_itself_whatever_the_order_of_the_batch(order, kind):
    network, volume, noise = autoencoder(kind).double(), studies_with(MIXED).double(), noise_for(4)
    with torch.no_grad():
        straight, permuted = network(volume, noise), network(volume[list(order)], noise[list(order)])
        alone = [network(volume[[study]], noise[[study]]) for study in order]
    moved = [number for study in order for number, series in enumerate(SERIES) if series[0] == study]
    for one, of_order, other in zip(straight, permuted, map(torch.cat, zip(*alone, strict=True)), strict=True):
        assert torch.allclose(one[moved], of_order, rtol=0, atol=1e-9)
        assert torch.allclose(one[moved], other, rtol=0, atol=1e-9)


def with_contrasts(network: AdaptiveMaskedAutoencoder, kind: str, chosen: Sequence[int]) -> AdaptiveMaskedAutoencoder:
    """A copy that knows the chosen contrasts only, in this order."""
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
    shuffled = volume[:, order], of_contrasts(noise, order)
    with torch.no_grad():
        expected = network.double()(volume, noise).patches
        found, wrong = other(*shuffled).patches, network(*shuffled).patches
    again = [SERIES.index((study, c)) for study, own in enumerate(MIXED) for c in order if c in own]
    assert torch.allclose(found, expected[again], rtol=0, atol=1e-9)
    assert not torch.allclose(wrong, expected[again], rtol=0, atol=1e-3)


@both_kinds
@pytest.mark.parametrize("absent", range(C))
def test_an_absent_contrast_changes_nothing(kind, absent):
    network, kept = autoencoder(kind), [contrast for contrast in range(C) if contrast != absent]
    volume, noise = studies_with([kept, kept[1:], kept]), noise_for(3)
    with torch.no_grad():
        full = network(volume, noise)
        own = with_contrasts(network, kind, kept)(volume[:, kept], of_contrasts(noise, kept))
    assert all(torch.equal(a, b) for a, b in zip(full, own, strict=True))


# ---------- loss


def test_the_targets_are_the_present_contrasts_of_one_study_after_the_other():
    volume = studies_with([*MIXED, []])
    targets = autoencoder().targets(volume)
    assert targets.shape == (len(SERIES) + 1, 1, *SIDES)
    assert all(torch.equal(a[0], volume[series]) for a, series in zip(targets, [*SERIES, (4, 0)], strict=True))


def test_the_loss_is_the_mean_over_the_hidden_voxels_of_present_contrasts():
    volume, noise = studies_with(MIXED), noise_for(4)
    rebuilt, errors = random_reconstruction(noise), []
    for number, series in enumerate(SERIES):
        for token, (z, y, x) in itertools.product(range(TOKENS - SEEN), itertools.product(*map(range, SIDES))):
            if token_of(z, y, x) == rebuilt.hidden[number, token]:
                predicted = rebuilt.patches[number, token, 0, (z % 2 * 4 + y % 4) * 8 + x % 8]
                errors.append((predicted - volume[*series, z, y, x]).item() ** 2)
    assert len(errors) == sum(hidden_voxels(noise, *series).sum() for series in SERIES)
    assert loss_of(autoencoder(), volume, rebuilt, norm_pix=False).item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_exactly_the_hidden_voxels_of_present_contrasts_carry_loss():
    volume, noise = studies_with(MIXED).requires_grad_(), noise_for(4)
    rebuilt = random_reconstruction(noise)
    rebuilt.patches.requires_grad_()
    loss_of(autoencoder(), volume, rebuilt, norm_pix=False).backward()
    expected = torch.zeros(len(MIXED), C, *SIDES, dtype=torch.bool)
    for series in SERIES:
        expected[series] = hidden_voxels(noise, *series)
    assert torch.equal(volume.grad != 0, expected)
    assert (rebuilt.patches.grad != 0).sum() == expected.sum()


@few
@given(number=series_numbers, seed=seeds, shift=st.floats(1, 50) | st.floats(-50, -1))
def test_brightness_and_contrast_of_one_image_do_not_change_the_loss(number, seed, shift):
    volume, rebuilt = studies_with(MIXED, seed=seed).double(), random_reconstruction(noise_for(4, seed=seed), seed)
    other = volume.clone()
    other[SERIES[number]] = other[SERIES[number]] * 7 + shift
    same, different = ([loss_of(autoencoder(), v, rebuilt, norm_pix=n) for v in (volume, other)] for n in (True, False))
    assert torch.allclose(*same, rtol=1e-4)
    assert not torch.allclose(*different, rtol=0.1)


def test_a_perfect_prediction_has_no_loss():
    network, volume, rebuilt = autoencoder(), studies_with(MIXED), random_reconstruction(noise_for(4))
    patches = patchify(network.targets(volume), TOKEN)
    perfect = torch.stack([own[hidden] for own, hidden in zip(patches, rebuilt.hidden, strict=True)])
    assert loss_of(network, volume, rebuilt._replace(patches=perfect), norm_pix=False) == 0


# ---------- edges


@both_kinds
@pytest.mark.parametrize(
    ("sides", "ratio", "hidden"), [((1, 3, 7), 0.6, 0), (SIDES, 0.01, 0), (SIDES, 0.05, 1), (SIDES, 0.99, 23)]
)
@pytest.mark.parametrize("present", [MIXED, [[1], [1]], [[], []], [[], [0, 2]]], ids=["mixed", "one", "none", "some"])
def test_all_parameters_have_finite_gradients_whatever_is_hidden_or_absent(kind, sides, ratio, hidden, present):
    network, volume = autoencoder(kind, mask_ratio=ratio), studies_with(present, sides)
    tokens = math.prod(math.ceil(n / side) for n, side in zip(sides, TOKEN, strict=True))
    rebuilt = network(volume, noise_for(len(present), tokens))
    assert rebuilt.hidden.shape == (sum(max(1, len(contrasts)) for contrasts in present), hidden)
    loss = loss_of(network, volume, rebuilt, norm_pix=True)
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
        volume = studies_with(present)
        loss_of(network.module, volume, network(volume, noise_for(len(present))), norm_pix=True).backward()
        optimizer.step()


@both_kinds
def test_an_autoencoder_stores_nothing_but_its_parameters(kind):
    network = autoencoder(kind)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}


@pytest.mark.parametrize(("kind", "norm_pix"), [("one_hot", True), ("learned", False)])
def test_a_batch_of_studies_with_different_contrasts_can_be_overfitted(kind, norm_pix):
    torch.manual_seed(0)
    new = Network(size="XS", token=TOKEN, adaptive=True, modality_vectors=kind)
    network, volume, noise = build_autoencoder(new, C, Pretraining(mask_ratio=0.6)), studies_with(MIXED), noise_for(4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = loss_of(network, volume, network(volume, noise), norm_pix=norm_pix)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ---------- memory and pictures


@pytest.mark.parametrize(("kind", "on_gpu"), [("one_hot", False), ("learned", True)])
def test_the_planner_counts_on_all_contrasts_of_all_studies(kind, on_gpu, monkeypatch):
    network = Network(size="XS", token=TOKEN, adaptive=True, modality_vectors=kind)
    positions = sine_cosine_positions(GRID, 96, CPU).clone()
    before = torch.random.get_rng_state()

    def memory() -> int:
        return pretraining_memory(network, Pretraining(mask_ratio=0.6), SIDES, C, 4, on_gpu=on_gpu)

    largest = memory()
    monkeypatch.setattr(adaptive_mae, "present_contrasts", lambda _: [[0, 1, 2]] * 4)
    assert memory() == largest
    monkeypatch.setattr(adaptive_mae, "present_contrasts", lambda _: [[0, 1, 2]] * 3 + [[0, 2]])
    assert memory() < largest
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
    shown = present or [0]
    original, masked, rebuilt = rebuild(network, volume, noise, norm_pix=norm_pix)
    assert np.array_equal(original, volume[0, shown].numpy())
    hidden = torch.stack([hidden_voxels(noise, 0, contrast) for contrast in shown]).numpy()
    assert np.array_equal(np.isnan(masked), hidden)
    assert np.array_equal(masked[~hidden], original[~hidden])
    assert np.array_equal(rebuilt[~hidden], original[~hidden])
    assert np.isfinite(rebuilt).all()
    if not norm_pix:
        with torch.no_grad():
            predicted = network(volume, noise).patches
        for c, contrast in enumerate(shown):
            places = {token: row for row, token in enumerate(split(noise, 0, contrast)[1])}
            for z, y, x in zip(*hidden[c].nonzero(), strict=True):
                expected = predicted[c, places[token_of(z, y, x)], 0, (z % 2 * 4 + y % 4) * 8 + x % 8]
                assert rebuilt[c, z, y, x] == expected.item()


def test_pictures_leak_nothing_of_what_was_hidden():
    network, volume, noise = autoencoder(), studies_with([[0, 2]]), noise_for(1)
    other = volume.clone()
    for contrast in (0, 2):
        other[0, contrast][hidden_voxels(noise, 0, contrast)] += 10.0 + contrast
    first, second = (rebuild(network, v, noise, norm_pix=True) for v in (volume, other))
    assert not np.array_equal(first.original, second.original)
    assert np.array_equal(first.rebuilt, second.rebuilt)
