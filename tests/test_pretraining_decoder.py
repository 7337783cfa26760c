"""The options of the pre-training decoder, for one series of tokens and for one of each contrast."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks.autoencoder import Reconstruction, reconstruction_loss
from nnunet_vit_mae.networks.build import Autoencoder, build_autoencoder
from nnunet_vit_mae.networks.masking import count_rebuilt, count_visible
from nnunet_vit_mae.networks.memory import pretraining_memory
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.presets import SIZES, Network, Pretraining
from nnunet_vit_mae.pretraining.pictures import rebuild

B, C, TOKEN, SHAPE, GRID = 3, 2, (2, 4, 8), (5, 11, 27), (3, 3, 4)  # the last tokens reach beyond the volume
TOKENS = math.prod(GRID)
AIR = slice(0, 2)  # along z: the first 12 tokens

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 999)
both_kinds = pytest.mark.parametrize("adaptive", [False, True], ids=["stacked", "adaptive"])
both_decoders = pytest.mark.parametrize("decoder", ["self", "cross"])
FASTEST = {"decoder": "cross", "rebuilt_share": 0.25, "decoder_heads": 2, "skip_background": True}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_volume(seed: int = 0, samples: int = B) -> torch.Tensor:
    return torch.randn(samples, C, *SHAPE, generator=seeded(seed))


def noise_for(adaptive: bool, seed: int = 0, samples: int = B) -> torch.Tensor:
    return torch.rand(samples, (C if adaptive else 1) * TOKENS, generator=seeded(seed + 1000))


def with_air(volume: torch.Tensor, level: float = -1.0) -> torch.Tensor:
    """The first sample all air, of the second one the first tokens along z."""
    volume = volume.clone()
    volume[0] = level
    volume[1, :, AIR] = level
    return volume


def protocol(**changes) -> Pretraining:
    return Pretraining(**{"mask_ratio": 0.6} | changes)


def autoencoder(adaptive: bool = False, **changes) -> Autoencoder:
    torch.manual_seed(0)
    return build_autoencoder(Network(size="XS", token=TOKEN, adaptive=adaptive), C, protocol(**changes))


def loss_of(network: Autoencoder, volume: torch.Tensor, rebuilt: Reconstruction, **switches) -> torch.Tensor:
    return reconstruction_loss(network.targets(volume), rebuilt, TOKEN, **{"norm_pix": True} | switches)


def samples_of(adaptive: bool) -> int:
    return B * C if adaptive else B


# ---------- the defaults


@pytest.mark.parametrize(
    ("adaptive", "expected"),
    [
        (False, [1.260799527168274, 1.1711769104003906, 1.1432133913040161]),
        (True, [1.3639180660247803, 1.1737804412841797, 1.1150444746017456]),
    ],
)
def test_the_default_protocol_gives_the_losses_that_it_gave_before_there_were_options(adaptive, expected):
    network, losses = autoencoder(adaptive), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for seed in range(3):
        volume = random_volume(seed)
        loss = loss_of(network, volume, network(volume, noise_for(adaptive, seed)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-3)  # processors round differently, and Adam makes more of it


# ---------- parameters


@both_kinds
@pytest.mark.parametrize("options", [{"decoder": "cross"}, {"decoder_heads": 2}, FASTEST])
def test_no_option_changes_what_a_checkpoint_holds(adaptive, options):
    plain, other = autoencoder(adaptive), autoencoder(adaptive, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert plain.state_dict().keys() == other.state_dict().keys()


@pytest.mark.parametrize(("heads", "expected"), [(0, SIZES["XS"].decoder_heads), (2, 2), (16, 16)])
def test_the_decoder_has_the_chosen_heads_and_the_encoder_its_own(heads, expected):
    network = autoencoder(decoder_heads=heads)
    assert {block.attention.heads for block in network.decoder.transformer.blocks} == {expected}
    assert {block.attention.heads for block in network.encoder.transformer.blocks} == {SIZES["XS"].heads}


# ---------- what goes through the decoder


@both_kinds
@both_decoders
@few
@given(ratio=st.floats(0.05, 0.95), share=st.floats(0.05, 1), seed=seeds)
def test_only_what_is_rebuilt_enters_the_decoder(adaptive, decoder, ratio, share, seed):
    network, found = autoencoder(adaptive, mask_ratio=ratio, decoder=decoder, rebuilt_share=share), []
    network.decoder.transformer.blocks[0].register_forward_pre_hook(lambda _, given: found.append(given))
    rebuilt = network(random_volume(), noise_for(adaptive, seed))
    seen = count_visible(TOKENS, ratio)
    made = count_rebuilt(TOKENS - seen, share)
    assert rebuilt.visible.shape == (samples_of(adaptive), seen)
    assert rebuilt.hidden.shape == (samples_of(adaptive), made)
    assert rebuilt.patches.shape[:2] == rebuilt.hidden.shape
    ((tokens, context),) = found
    per_sample = C if adaptive else 1
    if decoder == "cross":
        assert tokens.shape[:2] == (B, per_sample * made)
        assert context.shape[:2] == (B, per_sample * seen)
    else:
        assert tokens.shape[:2] == (B, per_sample * (seen + made))
        assert context is None


def test_blanks_and_their_context_know_where_they_are():
    decoder, found = autoencoder(decoder="cross").decoder, []
    decoder.transformer.blocks[0].register_forward_pre_hook(lambda _, given: found.append(given))
    encoded, positions, blanks = (torch.randn(B, *shape) for shape in ((5, 96), (12, 48), (7, 48)))
    decoder(encoded, positions, blanks)
    ((tokens, context),) = found
    assert torch.equal(tokens, blanks + positions[:, 5:])
    assert torch.equal(context, decoder.embed(encoded) + positions[:, :5])


@both_kinds
@both_decoders
def test_a_token_is_rebuilt_for_itself_by_cross_attention_alone(adaptive, decoder):
    volume, noise = random_volume(), noise_for(adaptive)
    with torch.no_grad():
        some, every = (autoencoder(adaptive, decoder=decoder, rebuilt_share=s)(volume, noise) for s in (0.25, 1.0))
    count = some.hidden.shape[1]
    assert torch.equal(some.hidden, every.hidden[:, :count])
    assert torch.allclose(some.patches, every.patches[:, :count], atol=1e-5) == (decoder == "cross")


@both_kinds
@both_decoders
def test_everything_is_rebuilt_as_many_tokens_at_a_time_as_in_training(adaptive, decoder):
    network, volume, noise = (
        autoencoder(adaptive, decoder=decoder, rebuilt_share=0.3),
        random_volume(),
        noise_for(adaptive),
    )
    with torch.no_grad():
        once, every = network(volume, noise), network(volume, noise, everything=True)
    count = once.hidden.shape[1]
    assert torch.equal(once.patches, every.patches[:, :count])
    assert torch.equal(once.hidden, every.hidden[:, :count])
    assert torch.equal(
        torch.cat([every.visible, every.hidden], 1).sort(1).values,
        torch.arange(TOKENS).expand(samples_of(adaptive), -1),
    )


@both_kinds
@both_decoders
@few
@given(seed=seeds, place=st.integers(0, TOKENS - 1))
def test_a_hidden_token_changes_no_prediction_and_the_loss_only_if_it_is_rebuilt(adaptive, decoder, seed, place):
    network, volume, noise = (
        autoencoder(adaptive, decoder=decoder, rebuilt_share=0.4),
        random_volume(),
        noise_for(adaptive, seed),
    )
    with torch.no_grad():
        first = network(volume, noise)
        z, y, x = (slice(i * s, (i + 1) * s) for i, s in zip(np.unravel_index(place, GRID), TOKEN, strict=True))
        other = volume.clone()
        other[1, 0, z, y, x] += 4.0
        second = network(other, noise)
    row = C if adaptive else 1  # the second sample's first channel
    losses = [loss_of(network, v, first, norm_pix=False) for v in (volume, other)]
    assert torch.equal(first.patches, second.patches) == (place not in first.visible[row])
    assert torch.equal(*losses) == (place not in first.hidden[row])


# ---------- flat tokens


@both_kinds
@both_decoders
def test_air_is_neither_seen_nor_rebuilt_nor_in_the_loss(adaptive, decoder):
    network = autoencoder(adaptive, decoder=decoder, skip_background=True)
    noise, air = noise_for(adaptive, samples=1), random_volume(samples=1)
    brighter = air.clone()
    air[:, :, AIR], brighter[:, :, AIR] = -1.0, 9.0
    with torch.no_grad():
        first, second = network(air, noise), network(brighter, noise)
    assert torch.equal(first.patches, second.patches)
    assert min(first.visible.min(), first.hidden.min()) >= 12
    losses = [loss_of(network, v, first, norm_pix=False, skip_background=True) for v in (air, brighter)]
    assert torch.equal(*losses)


@both_kinds
def test_the_loss_is_the_mean_over_the_rebuilt_tokens_with_content(adaptive):
    network, volume = autoencoder(adaptive, skip_background=True), with_air(random_volume())
    with torch.no_grad():
        rebuilt = network(volume, noise_for(adaptive))
    targets = network.targets(volume)
    patches, errors = patchify(targets, TOKEN), []
    inside = patchify(torch.ones_like(targets), TOKEN).bool()
    for sample, hidden in enumerate(rebuilt.hidden.tolist()):
        for row, token in enumerate(hidden):
            within = inside[sample, token]
            if patches[sample, token][within].unique().numel() > 1:
                errors.append((rebuilt.patches[sample, row] - patches[sample, token])[within])
    expected = torch.cat(errors).square().mean()
    counted = loss_of(network, volume, rebuilt, norm_pix=False, skip_background=True)
    assert torch.allclose(counted, expected, rtol=1e-5)
    assert not torch.allclose(loss_of(network, volume, rebuilt, norm_pix=False), expected, rtol=1e-2)


@both_kinds
@both_decoders
@pytest.mark.parametrize("volume", [torch.zeros(B, C, *SHAPE), with_air(random_volume())], ids=["nothing", "some"])
def test_crops_of_air_give_finite_losses_and_gradients(adaptive, decoder, volume):
    network = autoencoder(adaptive, decoder=decoder, rebuilt_share=0.25, skip_background=True)
    loss = loss_of(network, volume, network(volume, noise_for(adaptive)), skip_background=True)
    loss.backward()
    assert loss.isfinite()
    assert (loss.item() == 0) == (not volume.any())
    unused = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []


# ---------- learning, memory, pictures


@both_kinds
@pytest.mark.parametrize(
    "options", [{"decoder": "cross"}, {"rebuilt_share": 0.25}, FASTEST], ids=["cross", "share", "all"]
)
def test_every_parameter_gets_a_gradient(adaptive, options):
    network, volume = autoencoder(adaptive, **options), random_volume()
    loss_of(network, volume, network(volume, noise_for(adaptive))).backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.usefixtures("one_process")
@both_kinds
def test_an_autoencoder_trains_in_distributed_processes_whatever_is_flat(adaptive):
    network = DistributedDataParallel(autoencoder(adaptive, **FASTEST), find_unused_parameters=False)
    optimizer = torch.optim.AdamW(network.parameters())
    for volume in (random_volume(), torch.zeros(B, C, *SHAPE), with_air(random_volume())):
        optimizer.zero_grad()
        loss_of(network.module, volume, network(volume, noise_for(adaptive)), skip_background=True).backward()
        optimizer.step()


@both_kinds
@pytest.mark.parametrize("options", [{"decoder": "cross"}, FASTEST], ids=["cross", "all"])
def test_a_batch_can_be_overfitted(adaptive, options):
    network, volume, noise = autoencoder(adaptive, **options), random_volume(), noise_for(adaptive)
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=2e-3), []
    for _ in range(200):
        loss = loss_of(network, volume, network(volume, noise), skip_background=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@both_kinds
def test_the_planner_sees_that_fewer_tokens_take_less_memory(adaptive):
    network = Network(size="XS", token=TOKEN, adaptive=adaptive)

    def memory(**options) -> int:
        return pretraining_memory(network, protocol(**options), (25, 44, 54), C, 4)

    plain = memory()
    assert memory(rebuilt_share=0.25) < memory(rebuilt_share=0.5) < plain
    assert memory(decoder="cross", rebuilt_share=0.25) < memory(decoder="cross") < plain
    assert memory(skip_background=True) >= plain  # the largest step is one in which nothing is flat


@both_kinds
@both_decoders
@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_picture_shows_all_that_was_hidden_and_leaves_blank_what_took_no_part(adaptive, decoder, norm_pix):
    network = autoencoder(adaptive, decoder=decoder, rebuilt_share=0.25, skip_background=True)
    volume, noise = random_volume(samples=1), noise_for(adaptive, samples=1)
    volume[:, :, AIR] = -1.0
    original, masked, rebuilt = rebuild(network, volume, noise, norm_pix=norm_pix)
    assert np.array_equal(original, volume[0].numpy())
    assert np.isnan(rebuilt[:, AIR]).all()
    assert np.isfinite(rebuilt[:, AIR.stop :]).all()
    seen = np.isfinite(masked)
    assert np.array_equal(rebuilt[seen], original[seen])
    assert not seen[:, AIR].any()
    assert not (rebuilt[:, AIR.stop :] == original[:, AIR.stop :])[~seen[:, AIR.stop :]].any()
