"""Test that studies packed into one sequence give what groups of them give, and how torch's kernel is called for it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import MIXED, SIDES, perturbed, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnunet_vit_mae.batch_transforms import resample_images
from nnunet_vit_mae.devices import on_device
from nnunet_vit_mae.networks import grouping, packing
from nnunet_vit_mae.networks.autoencoder import reconstruction_loss
from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.networks.grouping import groups
from nnunet_vit_mae.networks.masking import Masking, Masks
from nnunet_vit_mae.networks.packing import Lengths, Packing, packed_attention, packs
from nnunet_vit_mae.networks.transformer import Block, Transformer
from nnunet_vit_mae.presets import BLOCKS, POSITIONS
from nnunet_vit_mae.settings import Network, Pretraining

CPU = torch.device("cpu")
C, TOKEN, TOKENS = 3, (2, 4, 8), 24
IMAGES = sum(map(len, MIXED))

lengths = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


def packing_of(queries: list[int], keys: list[int]) -> Packing:
    return Packing(Lengths.of(queries, CPU), Lengths.of(keys, CPU))


def random_heads(queries: list[int], keys: list[int], width: int = 8) -> list[Tensor]:
    generator = seeded(sum(queries) + sum(keys))
    sizes = (sum(queries), sum(keys), sum(keys))
    return [torch.randn(1, 3, n, width, generator=generator, dtype=torch.float64, requires_grad=True) for n in sizes]


def masked_attention(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float) -> Tensor:
    """Attend by the formula, with all scores, of which those between different sequences are left out."""
    of_query, of_key = (torch.cat([torch.full((n,), number) for number, n in enumerate(own.tokens)]) for own in packing)
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(of_query[:, None] != of_key, -torch.inf)
    return scores.softmax(dim=3) @ value


def documented_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
) -> Tensor:
    """Do what the documentation of `varlen_attn` says, and insist on what it asks for."""
    assert all(part.is_contiguous() for part in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert min(max_q, max_k) > 0  # it says nothing of what has no tokens
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    own = []
    for i in range(len(cu_seq_q) - 1):
        q, (k, v) = query[cu_seq_q[i] : cu_seq_q[i + 1]], (p[cu_seq_k[i] : cu_seq_k[i + 1]] for p in (key, value))
        own.append(torch.einsum("hqk,khw->qhw", (torch.einsum("qhw,khw->hqk", q, k) * scale).softmax(dim=2), v))
    return torch.cat(own)


@pytest.fixture(params=["sequence by sequence", "by the kernel"])
def packed(request, monkeypatch) -> Iterator[list[int]]:
    """Pack as on a GPU; yields how many sequences each call of a kernel was given."""
    calls: list[int] = []

    def kernel(*parts, **options) -> Tensor:
        calls.append(len(parts[3]) - 1)
        return documented_kernel(*parts, **options)

    monkeypatch.setattr(grouping, "packs", lambda device: True)
    if request.param == "by the kernel":
        monkeypatch.setattr(packing, "_kernel_takes", lambda *_: True)
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    yield calls
    assert bool(calls) == (request.param == "by the kernel")


# ---------- attention


@settings(max_examples=20, deadline=None)
@given(pairs=lengths)
def test_each_sequence_attends_to_its_own_keys_alone(pairs):
    queries, keys = ([*own] for own in zip(*pairs, strict=True))
    heads, own = random_heads(queries, keys), packing_of(queries, keys)
    found, expected = packed_attention(*heads, own, scale=0.3), masked_attention(*heads, own, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((result * weights).sum(), heads) for result in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_the_kernel_is_given_what_its_documentation_asks_for(packed):
    queries, keys = [4, 1, 3], [2, 5, 1]
    heads, own = random_heads(queries, keys), packing_of(queries, keys)
    assert (own.queries.starts.tolist(), own.keys.starts.tolist()) == ([0, 4, 5, 8], [0, 2, 7, 8])
    found = packed_attention(*heads, own, scale=0.3)
    torch.testing.assert_close(found, masked_attention(*heads, own, 0.3), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("device", "dtype", "width", "expected"),
    [
        ("cuda", torch.bfloat16, 24, True),
        ("cuda", torch.bfloat16, 128, True),
        ("cuda", torch.bfloat16, 136, False),
        ("cuda", torch.bfloat16, 20, False),
        ("cuda", torch.float32, 24, False),
        ("cuda", torch.float16, 24, False),
        ("cpu", torch.bfloat16, 24, False),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_the_kernel_takes_padded_heads_in_bf16_on_a_gpu(monkeypatch, device, dtype, width, expected, installed):
    monkeypatch.setattr(packing, "has_kernel", lambda: installed)
    assert packing._kernel_takes(torch.device(device), dtype, width) == (expected and installed)


def test_batches_are_packed_where_autocast_gives_the_kernel_its_kind_of_numbers(monkeypatch):
    monkeypatch.setattr(packing, "has_kernel", lambda: True)
    found = {}
    for enabled in (True, False):
        for dtype in (torch.bfloat16, torch.float16):
            monkeypatch.setattr(torch, "is_autocast_enabled", lambda _, enabled=enabled: enabled)
            monkeypatch.setattr(torch, "get_autocast_dtype", lambda _, dtype=dtype: dtype)
            found[enabled, dtype] = packs(torch.device("cuda"))
            assert not packs(CPU)
    assert [case for case, packed in found.items() if packed] == [(True, torch.bfloat16)]


# ---------- groups


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("meta", True)])  # as Apple's
def test_only_cuda_copies_numbers_whose_memory_may_be_given_back_at_once(device, waits):
    copies = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                copies.append((kwargs or {}).get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Copies():
        on_device([0, 2], torch.device(device))
        resample_images(torch.ones(1, 1, 4, 4, 4, device=device), torch.eye(3, device=device)[None], (2, 2, 2))
    assert set(copies) == {not waits}


def test_only_studies_that_differ_in_their_numbers_of_contrasts_are_packed(monkeypatch):
    monkeypatch.setattr(grouping, "packs", lambda device: True)
    (alike,), (mixed,) = groups([[0, 2], [1, 2]], CPU), groups(MIXED, CPU)
    assert (alike.packed, mixed.packed) == (False, True)
    assert mixed.counts == [3, 1, 2, 2]
    assert mixed.studies.tolist() == [0, 1, 2, 3]
    assert mixed.images.tolist() == list(range(IMAGES))


# ---------- networks


def batch() -> tuple[Tensor, Masks]:
    generator = seeded()
    volume = torch.randn(len(MIXED), C, *SIDES, generator=generator, dtype=torch.float64)
    return volume, Masking(mask_ratio=0.6).draw(torch.rand(IMAGES, TOKENS, generator=generator))


def with_gradients(network: nn.Module, result: Tensor) -> list[Tensor]:
    """Return a result and the gradients of its weighted sum."""
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)
    return [result, *torch.autograd.grad((result * weights).sum(), [*network.parameters()], allow_unused=False)]


def compared(network: nn.Module, run, monkeypatch) -> None:
    """Compare what is computed packed, which has been decided, with what groups compute."""
    found = with_gradients(network, run(network))
    monkeypatch.setattr(grouping, "packs", lambda device: False)
    torch.testing.assert_close(found, with_gradients(network, run(network)), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_packed_autoencoder_is_that_of_groups(packed, monkeypatch, positions, decoder):
    torch.manual_seed(0)
    settings = Network(size="XS", token=TOKEN, adaptive=True, positions=positions)
    network = perturbed(build_autoencoder(settings, C, Pretraining(decoder=decoder, decoder_heads=4))).double()
    assert network.decoder.transformer.head_width % packing.KERNEL_WIDTH  # so that heads are padded
    volume, masks = batch()
    compared(network, lambda own: own(volume, masks, MIXED).patches, monkeypatch)
    assert set(packed) <= {len(MIXED)}


def test_a_packed_autoencoder_may_have_nothing_to_rebuild(packed):
    network = perturbed(
        build_autoencoder(Network(size="XS", token=TOKEN, adaptive=True), C, Pretraining(decoder="cross"))
    ).double()
    volume, masks = batch()
    empty = Masks(masks.visible, masks.hidden[:, :0], masks.counted[:, :0])
    loss = reconstruction_loss(network(volume, empty, MIXED), norm_pix=True)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_packed_segmenter_is_that_of_groups(packed, monkeypatch, blocks):
    torch.manual_seed(0)
    choices = {"adaptive": True, "modality_vectors": "learned", "positions": "both", "blocks": blocks}
    network = perturbed(
        build_segmenter(Network(size="XS", token=TOKEN, decoder="unetr", **choices), C, 2, drop_path=0.0)
    ).double()
    compared(network, lambda own: own.logits(batch()[0], MIXED), monkeypatch)


# ---------- drop path


@pytest.mark.parametrize("kind", BLOCKS)
def test_drop_path_leaves_branches_out_for_whole_sequences(kind):
    torch.manual_seed(0)
    tokens, own = [5, 1, 3, 2] * 4, packing_of([5, 1, 3, 2] * 4, [5, 1, 3, 2] * 4)
    dropping = Block(24, 3, drop_path=0.5, kind=kind).double()
    sequences = torch.randn(1, sum(tokens), 24, dtype=torch.float64)
    found = dropping(sequences, packing=own).split(tokens, dim=1)

    seen = set()
    for result, sequence in zip(found, sequences.split(tokens, dim=1), strict=True):
        whole = {}
        for attention, mlp in ((0, 0), (0, 2), (2, 0), (2, 2)):  # a branch that is kept counts twice
            middle = sequence + attention * dropping.attention_scale(
                dropping.attention(dropping.attention_norm(sequence))
            )
            whole[attention, mlp] = middle + mlp * dropping.mlp_scale(dropping.mlp(dropping.mlp_norm(middle)))
        kept = [case for case, expected in whole.items() if torch.allclose(result, expected, rtol=0, atol=1e-9)]
        assert len(kept) == 1
        seen |= set(kept)
    assert len(seen) > 1


def test_sequences_of_a_packed_transformer_do_not_see_one_another():
    torch.manual_seed(0)
    tokens, network = [4, 2, 5], Transformer(24, 2, 3, drop_path=0.9).double().eval()
    own = packing_of(tokens, tokens)
    sequences = torch.randn(1, sum(tokens), 24, dtype=torch.float64)
    changed = copy.deepcopy(sequences)
    changed[:, 4:6] += 1
    difference = (network(sequences, packing=own) - network(changed, packing=own)).abs().amax(dim=(0, 2)) > 0
    assert difference.tolist() == [False] * 4 + [True] * 2 + [False] * 5
