"""Test tokenizer, encoder and segmenter for any number of contrasts against the formulas of AMAE, study by study."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from conftest import MIXED, SIDES, perturbed, seeded, studies_with
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks import adaptive
from nnunet_vit_mae.networks.adaptive import (
    AdaptiveStem,
    DynamicTokenizer,
    ModalityVectors,
    present_contrasts,
    split_contrasts,
)
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.grouping import Group, groups
from nnunet_vit_mae.networks.memory import finetuning_memory
from nnunet_vit_mae.networks.positions import forget_positions, rotary_positions, sine_cosine_positions
from nnunet_vit_mae.networks.segmenter import Segmenter
from nnunet_vit_mae.networks.tokenizer import padded, patchify
from nnunet_vit_mae.presets import DECODERS, MODALITY_VECTORS, POSITIONS
from nnunet_vit_mae.settings import Network, Pretraining, Triple

CPU = torch.device("cpu")
TOKEN, GRID = (2, 4, 8), (4, 2, 3)  # GRID holds the tokens of SIDES
TOKENS = math.prod(GRID)

few = settings(max_examples=15, deadline=None)
kinds = st.sampled_from(MODALITY_VECTORS)
both_kinds = pytest.mark.parametrize("kind", MODALITY_VECTORS)
seeds = st.integers(0, 999)
tokens = st.tuples(*[st.sampled_from((1, 2, 4, 8))] * 3)
unequal_sides = st.lists(st.integers(1, 11), min_size=3, max_size=3, unique=True)
some_contrasts = st.sets(st.integers(0, 3), min_size=1).map(sorted)
batches = st.lists(some_contrasts, min_size=2, max_size=6)


def segmenter(
    kind: str, channels: int = 3, token: Triple = TOKEN, *, decoder="unetr", drop_path=0.0, seed=0, **choices
) -> Segmenter:
    torch.manual_seed(seed)
    network = Network(size="XS", token=token, decoder=decoder, adaptive=True, modality_vectors=kind, **choices)
    return perturbed(build_segmenter(network, channels, 2, drop_path=drop_path), seed).eval()


def rows(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """Return the weights that belong to single contrasts, with the contrasts as the first axis."""
    if kind == "learned":
        return {name: tensor for name, tensor in state.items() if name.endswith("vectors.table")}
    return {name: tensor.T for name, tensor in state.items() if name.endswith("factors.weight")}


def with_contrasts(network: Segmenter, kind: str, chosen: Sequence[int]) -> Segmenter:
    """Return a copy that knows the chosen contrasts only, in this order."""
    copy, state = segmenter(kind, len(chosen), seed=1), network.state_dict()
    own = {name: tensor[list(chosen)] for name, tensor in rows(state, kind).items()}
    assert len(own) == 2  # of tokenizer and stem
    copy.load_state_dict(state | {name: tensor if kind == "learned" else tensor.T for name, tensor in own.items()})
    return copy


def vector(vectors: ModalityVectors, kind: str, contrast: int) -> torch.Tensor:
    if kind == "learned":
        return vectors.table[contrast]
    return torch.tensor([float(other == contrast) for other in range(vectors.contrasts)], dtype=torch.float64)


def literal_tokens(tokenizer: DynamicTokenizer, kind: str, image: torch.Tensor, contrast: int, token: Triple):
    """Follow section 2.2 for one image (z y x): scale weights and biases of a convolution, then convolve."""
    linear, plain = tokenizer.factors, tokenizer.projection
    both = linear.weight @ vector(tokenizer.vectors, kind, contrast) + linear.bias
    w_conv, b_conv = both[: len(plain.bias)], both[len(plain.bias) :]
    kernel = plain.weight.reshape(-1, 1, *token) * w_conv[:, None, None, None, None]
    output = functional.conv3d(image[None, None], kernel, plain.bias * b_conv, stride=token)
    return output[0].flatten(1).T


# ---------- the dynamic convolution tokenizer


@few
@given(kind=kinds, token=tokens, grid=unequal_sides, orders=st.lists(st.permutations(range(4)), min_size=2, max_size=3))
def test_the_tokenizer_is_the_convolution_with_updated_weights(kind, token, grid, orders):
    torch.manual_seed(0)
    tokenizer = perturbed(DynamicTokenizer(ModalityVectors(4, kind), token, 7).double())
    contrasts = torch.tensor(orders)[:, :3]  # three of four contrasts, in any order
    sides = [1 + n % 3 for n in grid]
    images = torch.randn(
        len(orders), 3, *(s * n for s, n in zip(token, sides, strict=True)), generator=seeded(1)
    ).double()
    found = tokenizer(patchify(images, token).transpose(1, 2), contrasts)
    assert found.shape == (len(orders), 3, math.prod(sides), 7)
    for study, place in itertools.product(range(len(orders)), range(3)):
        expected = literal_tokens(tokenizer, kind, images[study, place], contrasts[study, place].item(), token)
        assert torch.allclose(found[study, place], expected, rtol=0, atol=1e-9)


@both_kinds
def test_a_new_tokenizer_is_the_same_plain_convolution_for_all_contrasts(kind):
    torch.manual_seed(0)
    tokenizer = DynamicTokenizer(ModalityVectors(4, kind), TOKEN, 7)
    images = torch.randn(2, 4, 4, 12, 16, generator=seeded())
    kernel, bias = tokenizer.projection.weight.reshape(7, 1, *TOKEN), tokenizer.projection.bias
    found = tokenizer(patchify(images, TOKEN).transpose(1, 2), torch.tensor([[2, 0, 1, 3], [3, 1, 2, 0]]))
    for study, place in itertools.product(range(2), range(4)):
        plain = functional.conv3d(images[study, place][None, None], kernel, bias, stride=TOKEN)
        assert torch.allclose(found[study, place], plain[0].flatten(1).T, atol=1e-5)


@both_kinds
def test_no_two_contrasts_share_a_vector(kind):
    torch.manual_seed(0)
    vectors = ModalityVectors(5, kind)(torch.arange(5)).float()
    assert (torch.cdist(vectors, vectors) + 10 * torch.eye(5)).min() > 0.5


# ---------- which contrasts there are


@few
@given(present=batches, seed=seeds)
def test_a_contrast_is_present_if_it_holds_a_single_voxel_other_than_zero(present, seed):
    volume = torch.zeros(len(present), 4, 3, 2, 5)
    volume[:, :, 1] = -0.0
    for study, contrasts in enumerate(present):
        for contrast in contrasts:
            place = torch.randint(30, (), generator=seeded(seed))
            volume[study, contrast].view(-1)[place] = (-1) ** contrast * 1e-30
    assert present_contrasts(volume) == present


def test_a_study_of_zeros_counts_as_its_first_contrast():
    assert present_contrasts(studies_with([[1, 2], [], [0]])) == [[1, 2], [0], [0]]


@few
@given(present=batches)
def test_all_studies_of_a_batch_are_in_one_group_with_all_their_contrasts(present):
    numbers = {}  # of the contrast images of the batch
    for study, contrasts in enumerate(present):
        for contrast in contrasts:
            numbers[study, contrast] = len(numbers)
    found, counts = [], []
    for group in groups(present, CPU):
        assert not group.packed
        assert len(set(group.counts)) == 1
        counts += group.counts[:1]
        own = iter(group.images.tolist())
        for study, count in zip(group.studies.tolist(), group.counts, strict=True):
            found.append(study)
            assert [next(own) for _ in range(count)] == [numbers[study, contrast] for contrast in present[study]]
        assert next(own, None) is None
    assert sorted(found) == list(range(len(present)))
    assert sorted(counts) == sorted({len(contrasts) for contrasts in present})


@few
@given(present=batches)
def test_contrast_images_are_the_contrasts_of_one_study_after_the_other(present):
    volume = studies_with(present, (3, 2, 5), channels=4)
    images, contrasts = split_contrasts(volume, present)
    expected = [(volume[study, contrast], contrast) for study, own in enumerate(present) for contrast in own]
    assert images.shape == (len(expected), 1, 3, 2, 5)
    assert contrasts.tolist() == [contrast for _, contrast in expected]
    assert all(torch.equal(image[0], own) for image, (own, _) in zip(images, expected, strict=True))


# ---------- encoder and stem


def literal_places(positions: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what is added to the tokens of a contrast, and how far heads of 16 features are turned."""
    added = sine_cosine_positions(GRID, 96, CPU)
    rotation = rotary_positions(GRID, 16, CPU, (1.0, 1.0, 1.0), 100.0)
    return {"sine_cosine": (added, None), "rotary": (0 * added, rotation), "both": (added, rotation)}[positions]


@both_kinds
@pytest.mark.parametrize("positions", POSITIONS)  # AMAE has sine-cosine ones
def test_what_the_encoder_gives_is_the_maximum_over_the_contrasts_at_each_place_and_level(kind, positions):
    encoder = segmenter(kind, positions=positions).double().encoder
    volume = studies_with([*MIXED, []]).double()
    whole = padded(volume, TOKEN)
    found = encoder.encode(volume, (1, 3))
    assert torch.equal(found.volume, whole)
    assert found.grid == GRID
    added, rotation = literal_places(positions)
    for study, contrasts in enumerate([*MIXED, [0]]):
        images = [literal_tokens(encoder.tokenizer, kind, whole[study, c], c, TOKEN) + added for c in contrasts]
        state, expected = torch.cat(images)[None], {}
        turned = None if rotation is None else torch.cat([rotation] * len(contrasts))  # equal at the same place
        for number, block in enumerate(encoder.transformer.blocks, start=1):
            state = block(state, turned)
            expected[number] = state
        expected["last"] = encoder.transformer.norm(state)
        for level, states in {"last": found.tokens, 1: found.hidden[0], 3: found.hidden[1]}.items():
            of_contrasts = expected[level][0].split(TOKENS)
            assert len(of_contrasts) == len(contrasts)
            maximum = torch.stack(of_contrasts).max(dim=0).values
            assert torch.allclose(states[study], maximum, rtol=0, atol=1e-9)


@both_kinds
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_single_contrast_is_what_the_transformer_gives_for_its_tokens(kind, positions):
    encoder = segmenter(kind, positions=positions).encoder
    added, rotation = literal_places(positions)
    volume = studies_with([[2], [0]])
    with torch.no_grad():
        found = encoder.encode(volume, (2,))
        patches = patchify(volume, TOKEN).transpose(1, 2)
        own = torch.stack([patches[0, 2], patches[1, 0]])[:, None]
        sequence = encoder.tokenizer(own, torch.tensor([[2], [0]])) + added
        last, (second,) = encoder.transformer.with_hidden(sequence[:, 0], rotation, (2,))
    assert torch.equal(found.tokens, last)
    assert torch.equal(found.hidden[0], second)


@both_kinds
@pytest.mark.parametrize("present", [MIXED, [[0, 1, 2]] * 2, [[], [2]]], ids=["mixed", "all", "few"])
def test_no_token_is_padding_or_of_an_absent_contrast(kind, present):
    encoder, shapes = segmenter(kind).encoder, []
    encoder.transformer.blocks[0].register_forward_hook(lambda _, given, __: shapes.append(given[0].shape[:2]))
    with torch.no_grad():
        encoder.encode(studies_with(present), ())
    expected = [TOKENS * max(1, len(contrasts)) for contrasts in present]
    assert sorted(length for studies, length in shapes for _ in range(studies)) == sorted(expected)


@both_kinds
def test_the_stem_is_the_maximum_over_the_contrasts_each_with_its_factors(kind):
    stem = segmenter(kind).double().decoder.stem
    volume = studies_with(MIXED).double()
    found = stem(volume)
    for study, contrasts in enumerate(MIXED):
        of_contrasts = []
        for c in contrasts:
            both = stem.factors.weight @ vector(stem.vectors, kind, c) + stem.factors.bias
            scale, shift = both[:8, None, None, None], both[8:, None, None, None]  # a factor and a bias per feature
            of_contrasts.append(stem.block(volume[study, c][None, None])[0] * scale + shift)
        maximum = torch.stack(of_contrasts).max(dim=0).values
        assert torch.allclose(found[study], maximum, rtol=0, atol=1e-9)


@both_kinds
def test_a_new_stem_has_no_factors_of_its_own(kind):
    torch.manual_seed(0)
    stem = AdaptiveStem(nn.Conv3d(1, 5, 3, padding=1), ModalityVectors(3, kind), width=5)
    volume = studies_with([[0, 2], [0, 2]])
    expected = torch.maximum(stem.block(volume[:, :1]), stem.block(volume[:, 2:]))
    assert torch.allclose(stem(volume), expected, atol=1e-6)


# ---------- segmenter


@both_kinds
def test_the_order_of_contrasts_does_not_matter_but_which_one_it_is_does(kind):
    order, network = (2, 0, 1), segmenter(kind)
    volume = studies_with(MIXED).double()
    shuffled, other = volume[:, list(order)], with_contrasts(network, kind, order).double()
    with torch.no_grad():
        logits = network.double().logits(volume)
        assert torch.allclose(other.logits(shuffled), logits, rtol=0, atol=1e-9)
        assert not torch.allclose(network.logits(shuffled), logits, rtol=0, atol=1e-3)


@both_kinds
@pytest.mark.parametrize("absent", range(3))
def test_an_absent_contrast_changes_nothing(kind, absent):
    network, kept = segmenter(kind), [contrast for contrast in range(3) if contrast != absent]
    volume = studies_with([kept, kept[:1], kept])
    with torch.no_grad():
        assert torch.equal(network(volume), with_contrasts(network, kind, kept)(volume[:, kept]))


@both_kinds
def test_the_modality_vector_of_an_absent_contrast_does_not_matter(kind):
    network = segmenter(kind)
    volume = studies_with([[0, 2], [2], [0]])
    with torch.no_grad():
        before = network(volume)
        for tensor in rows(network.state_dict(), kind).values():
            tensor[1] += 100
        assert torch.equal(network(volume), before)
        for tensor in rows(network.state_dict(), kind).values():
            tensor[0] += 0.5
        changed = (network(volume) != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]


@both_kinds
@pytest.mark.parametrize("decoder", sorted(DECODERS.keys() - {"unet"}))  # the hybrid stacks its channels
def test_each_study_is_segmented_for_itself(decoder, kind):
    network = segmenter(kind, decoder=decoder, drop_path=0.5).double()
    volume = studies_with([*MIXED, [], [0, 1, 2]]).double()
    with torch.no_grad():
        one_by_one = torch.cat([network.logits(study[None]) for study in volume])
        together = network.logits(volume)
    assert torch.allclose(together, one_by_one, rtol=0, atol=1e-9)
    distances = torch.cdist(together.flatten(1), together.flatten(1))
    assert (distances + torch.eye(6)).min() > 1e-2  # so that a swap would be seen


@both_kinds
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_segmenter_knows_as_many_contrasts_as_the_dataset_has(kind, channels):
    network = segmenter(kind, channels)
    every = list(range(channels))
    with torch.no_grad():
        logits = network(studies_with([every, every[-1:], []], channels=channels))
    assert logits.shape == (3, 2, *SIDES)
    assert logits.isfinite().all()


@few
@given(sides=unequal_sides, token=tokens, kind=kinds, present=st.lists(some_contrasts, min_size=2, max_size=3))
def test_a_segmenter_takes_any_volume_and_its_decoder_covers_whole_tokens(sides, token, kind, present):
    network = segmenter(kind, 4, token)
    volume = studies_with(present, sides, channels=4)
    with torch.no_grad():
        logits = network(volume)
        whole = network.decoder(network.encoder.encode(volume, network.taps))
    z, y, x = sides
    assert whole.shape == (len(present), 2, *padded(volume, token).shape[2:])
    assert torch.equal(logits, whole[:, :, :z, :y, :x])
    assert logits.isfinite().all()


@both_kinds
@pytest.mark.parametrize("present", [MIXED, [[1], [1]], [[0, 2], [0, 2]]], ids=["mixed", "one", "two"])
def test_all_parameters_learn_from_any_contrasts_and_a_reloaded_network_predicts_the_same(kind, present):
    network = segmenter(kind, drop_path=0.1).train()
    volume = studies_with(present)
    logits = network(volume)
    (logits * torch.randn(logits.shape, generator=seeded(1))).sum().backward()
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []
    found = set(itertools.chain(*present))
    for gradients in rows({name: p.grad for name, p in network.named_parameters()}, kind).values():
        assert {contrast for contrast in range(3) if gradients[contrast].any()} == found
    fresh = segmenter(kind, drop_path=0.1, seed=1)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    fresh.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(volume), network.eval()(volume))


@both_kinds
def test_an_absent_contrast_gets_no_gradient_and_all_others_do(kind):
    volume = studies_with(MIXED).requires_grad_()
    logits = segmenter(kind)(volume)
    (logits * torch.randn(logits.shape, generator=seeded(1))).sum().backward()
    assert [[c for c in range(3) if of_study[c].any()] for of_study in volume.grad] == MIXED


# on some processors the gradient of a 1 x 1 x 1 convolution has other strides than its weight; its values are the same
@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.usefixtures("one_process")
@both_kinds
def test_a_segmenter_trains_in_distributed_processes_whatever_contrasts_a_batch_has(kind):
    network = DistributedDataParallel(segmenter(kind, drop_path=0.1).train(), find_unused_parameters=False)
    optimizer = torch.optim.AdamW(network.parameters())
    for present in ([[1], [1]], MIXED, [[], [2]]):  # the next step finds parameters that one left out
        optimizer.zero_grad()
        network(studies_with(present)).square().mean().backward()
        optimizer.step()


@both_kinds
def test_a_pretrained_encoder_fits_the_segmenter(kind):
    network = Network(size="XS", token=TOKEN, adaptive=True, modality_vectors=kind)
    pretrained = build_autoencoder(network, 3, Pretraining(mask_ratio=0.5)).encoder.state_dict()
    segmenter(kind).encoder.load_state_dict(pretrained, strict=True)


# ---------- memory


def test_the_planner_counts_on_all_contrasts_of_all_studies(monkeypatch):
    """Both the encoder and the stem of the decoder are given them, and neither looks at voxels, which do not exist."""
    network = Network(size="XS", token=TOKEN, decoder="unetr", adaptive=True)
    grouped, split = [], []

    def recorded_groups(present: list[list[int]], device: torch.device) -> Iterator[Group]:
        grouped.append(present)
        return groups(present, device)

    def recorded_split(volume: torch.Tensor, present: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        split.append(present)
        return split_contrasts(volume, present)

    monkeypatch.setattr(adaptive, "groups", recorded_groups)
    monkeypatch.setattr(adaptive, "split_contrasts", recorded_split)
    assert finetuning_memory(network, SIDES, 3, 2, 4) > 0
    assert grouped == split == [[[0, 1, 2]] * 4]


@both_kinds
def test_the_voxels_tell_which_contrasts_there_are_unless_it_is_given(kind):
    network, volume = segmenter(kind), studies_with([*MIXED, []])
    with torch.no_grad():
        found, given = network.logits(volume), network.logits(volume, [*MIXED, [0]])
        other = network.logits(volume, [*MIXED, [1]])
    assert torch.equal(found, given)
    assert [torch.equal(a, b) for a, b in zip(found, other, strict=True)] == [True] * 4 + [False]


def test_a_forward_pass_reads_no_values_on_the_host():
    """A fake tensor has no values: reading one raises an error."""
    forget_positions()  # the cached tables are real tensors, and those made here are not
    try:
        with FakeTensorMode():
            network = build_segmenter(
                Network(size="XS", token=TOKEN, decoder="unetr", adaptive=True), 3, 2, drop_path=0.0
            )
            volume = torch.empty(4, 3, *SIDES)
            assert network.logits(volume, MIXED).shape == (4, 2, *SIDES)
            with pytest.raises(DataDependentOutputException):  # so this test can fail
                network.logits(volume)
    finally:
        forget_positions()


def test_a_rehearsal_leaves_nothing_behind():
    network = Network(size="XS", token=TOKEN, decoder="unetr", adaptive=True, modality_vectors="learned")
    volume = studies_with(MIXED)
    before, state = segmenter("learned")(volume), torch.random.get_rng_state()
    assert finetuning_memory(network, SIDES, 3, 2, 2) > 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(segmenter("learned")(volume), before)
