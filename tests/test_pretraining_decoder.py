"""Test the options of the pre-training decoder, for stacked contrasts and for adaptive ones."""

import math

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks.autoencoder import Reconstruction, reconstruction_loss
from nnunet_vit_mae.networks.build import Autoencoder, build_autoencoder
from nnunet_vit_mae.networks.masking import Masks, count_rebuilt
from nnunet_vit_mae.networks.memory import pretraining_memory
from nnunet_vit_mae.networks.positions import Places
from nnunet_vit_mae.networks.tokenizer import patchify
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.pretraining.crops import MaskDrawing, Samples
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.pretraining.pictures import rebuild
from nnunet_vit_mae.settings import Network, Pretraining, count_visible

B, C, TOKEN, SHAPE, GRID = 3, 2, (2, 4, 8), (5, 11, 27), (3, 3, 4)  # the last tokens reach beyond the volume
TOKENS = math.prod(GRID)
AIR = slice(0, 2)  # along z: the first 12 tokens

few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 999)
both_kinds = pytest.mark.parametrize("adaptive", [False, True], ids=["stacked", "adaptive"])
both_decoders = pytest.mark.parametrize("decoder", ["self", "cross"])
FASTEST = {"decoder": "cross", "rebuilt_share": 0.25, "decoder_heads": 2, "skip_background": True}


def random_volume(seed: int = 0, samples: int = B) -> torch.Tensor:
    return torch.randn(samples, C, *SHAPE, generator=seeded(seed))


def noise_for(adaptive: bool, seed: int = 0, samples: int = B) -> torch.Tensor:
    return torch.rand(samples, 1, (C if adaptive else 1) * TOKENS, generator=seeded(seed + 1000))


def with_air(volume: torch.Tensor, level: float = -1.0) -> torch.Tensor:
    """Make all of the first sample air, and the first tokens along z of the second one."""
    volume = volume.clone()
    volume[0] = level
    volume[1, :, AIR] = level
    return volume


def protocol(**changes) -> Pretraining:
    return Pretraining(**{"mask_ratio": 0.6} | changes)


def autoencoder(adaptive: bool = False, positions: str = "both", **changes) -> Autoencoder:
    torch.manual_seed(0)
    network = Network(size="XS", token=TOKEN, adaptive=adaptive, positions=positions)
    return build_autoencoder(network, C, protocol(**changes))


def drawing(adaptive: bool = False, **changes) -> MaskDrawing:
    """Return how a run with these options draws its masks."""
    network = Network(size="XS", token=TOKEN, adaptive=adaptive)
    return PretrainingJob(
        files=[], channel_names=["T1", "FLAIR"], patch_size=SHAPE, spacing=(1, 1, 1), network=network,
        protocol=protocol(**changes),
    ).drawing  # fmt: skip


def all_inside(volume: torch.Tensor) -> torch.Tensor:
    """Return bounds of crops that lie in their volumes."""
    return torch.tensor([[0, side] for side in volume.shape[2:]]).expand(len(volume), 3, 2)


def masks_for(volume: torch.Tensor, seed: int = 0, *, adaptive: bool = False, **changes) -> Masks:
    """Return all masked tokens of the samples."""
    noise, none = noise_for(adaptive, seed, len(volume)), torch.zeros(len(volume), 3, dtype=torch.bool)
    return drawing(adaptive, **changes).draw(volume, all_inside(volume), none, noise)[0]


def trained(volume: torch.Tensor, seed: int = 0, *, adaptive: bool = False, **changes) -> Masks:
    """Return the masked tokens that a step of training rebuilds."""
    masks = masks_for(volume, seed, adaptive=adaptive, **changes)
    return drawing(adaptive, **changes).masking.rounds(masks)[0]


def loss_of(rebuilt: Reconstruction) -> torch.Tensor:
    return reconstruction_loss(rebuilt, norm_pix=True)


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
    network, losses = autoencoder(adaptive, positions="sine_cosine"), []
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for seed in range(3):
        volume = random_volume(seed)
        loss = loss_of(network(volume, trained(volume, seed, adaptive=adaptive)))
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
    network, inputs, volume = autoencoder(adaptive, decoder=decoder), [], random_volume()
    network.decoder.transformer.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given))
    rebuilt = network(volume, trained(volume, seed, adaptive=adaptive, mask_ratio=ratio, rebuilt_share=share))
    seen = count_visible(TOKENS, ratio)
    made = count_rebuilt(TOKENS - seen, share)
    assert rebuilt.patches.shape[:2] == rebuilt.targets.shape[:2] == (samples_of(adaptive), made)
    ((tokens, rotation, context, context_rotation, _),) = inputs
    assert rotation.shape[-3] == tokens.shape[1]
    per_sample = C if adaptive else 1
    if decoder == "cross":
        assert tokens.shape[:2] == (B, per_sample * made)
        assert context.shape[:2] == (B, per_sample * seen)
        assert context_rotation.shape[-3] == context.shape[1]
    else:
        assert tokens.shape[:2] == (B, per_sample * (seen + made))
        assert context is None


def test_mask_tokens_and_their_context_know_where_they_are():
    decoder, inputs = autoencoder(decoder="cross").decoder, []
    decoder.transformer.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given))
    encoded, positions, mask_tokens = (torch.randn(B, *shape) for shape in ((5, 96), (12, 48), (7, 48)))
    turns = decoder.places((3, 2, 2), torch.device("cpu")).rotation
    decoder(encoded, Places(positions, turns), mask_tokens)
    ((tokens, rotation, context, context_rotation, _),) = inputs
    assert torch.equal(tokens, mask_tokens + positions[:, 5:])
    assert torch.equal(context, decoder.embed(encoded) + positions[:, :5])
    assert torch.equal(rotation, turns[5:])
    assert torch.equal(context_rotation, turns[:5])


@both_kinds
@both_decoders
def test_a_token_is_rebuilt_for_itself_by_cross_attention_alone(adaptive, decoder):
    network, volume = autoencoder(adaptive, decoder=decoder), random_volume()
    some, every = (trained(volume, adaptive=adaptive, rebuilt_share=share) for share in (0.25, 1.0))
    count = some.hidden.shape[1]
    assert torch.equal(some.hidden, every.hidden[:, :count])
    with torch.no_grad():
        few, all_of_them = network(volume, some).patches, network(volume, every).patches
    assert torch.allclose(few, all_of_them[:, :count], atol=1e-5) == (decoder == "cross")


@both_kinds
@both_decoders
@few
@given(seed=seeds, place=st.integers(0, TOKENS - 1))
def test_a_hidden_token_changes_no_prediction_and_the_loss_only_if_it_is_rebuilt(adaptive, decoder, seed, place):
    network, volume = autoencoder(adaptive, decoder=decoder), random_volume()
    masks = trained(volume, seed, adaptive=adaptive, rebuilt_share=0.4)
    z, y, x = (slice(i * s, (i + 1) * s) for i, s in zip(np.unravel_index(place, GRID), TOKEN, strict=True))
    other = volume.clone()
    other[1, 0, z, y, x] += 4.0
    with torch.no_grad():
        first, second = network(volume, masks), network(other, masks)
    row = C if adaptive else 1  # the second sample's first channel
    losses = [reconstruction_loss(first._replace(targets=r.targets), norm_pix=False) for r in (first, second)]
    assert torch.equal(first.patches, second.patches) == (place not in masks.visible[row])
    assert torch.equal(*losses) == (place not in masks.hidden[row])


# ---------- background tokens


@both_kinds
@both_decoders
def test_air_is_neither_visible_nor_rebuilt_nor_in_the_loss(adaptive, decoder):
    network, air = autoencoder(adaptive, decoder=decoder), random_volume(samples=1)
    brighter = air.clone()
    air[:, :, AIR], brighter[:, :, AIR] = -1.0, 9.0
    masks, other = (masks_for(volume, adaptive=adaptive, skip_background=True) for volume in (air, brighter))
    assert all(torch.equal(a, b) for a, b in zip(masks, other, strict=True))
    assert min(masks.visible.min(), masks.hidden.min()) >= 12
    with torch.no_grad():
        first, second = network(air, masks), network(brighter, masks)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both_kinds
def test_the_loss_is_the_mean_over_the_rebuilt_tokens_with_content(adaptive):
    network, volume = autoencoder(adaptive), with_air(random_volume())
    masks = masks_for(volume, adaptive=adaptive, skip_background=True)
    with torch.no_grad():
        rebuilt = network(volume, masks)
    images = volume.flatten(0, 1)[:, None] if adaptive else volume
    patches, errors = patchify(images, TOKEN), []
    inside = patchify(torch.ones_like(images), TOKEN).bool()
    for sample, hidden in enumerate(masks.hidden.tolist()):
        for row, token in enumerate(hidden):
            within = inside[sample, token]
            if token not in hidden[:row] and patches[sample, token][within].unique().numel() > 1:
                errors.append((rebuilt.patches[sample, row] - patches[sample, token])[within])
    expected = torch.cat(errors).square().mean()
    assert torch.allclose(reconstruction_loss(rebuilt, norm_pix=False), expected, rtol=1e-5)
    everything = rebuilt._replace(counted=torch.ones_like(rebuilt.counted))
    assert not torch.allclose(reconstruction_loss(everything, norm_pix=False), expected, rtol=1e-2)


@both_kinds
def test_masks_are_those_of_the_crop_after_its_flips(adaptive):
    volume, options = with_air(random_volume()), drawing(adaptive, skip_background=True)
    noise, none, inside = noise_for(adaptive), torch.zeros(B, 3, dtype=torch.bool), all_inside(volume)
    flips = torch.tensor([[False, True, True], [True, False, True], [True, True, True]])
    flipped = torch.stack([
        crop.flip([axis + 1 for axis in range(3) if flip[axis]]) for crop, flip in zip(volume, flips, strict=True)
    ])  # fmt: skip
    masks, expected = options.draw(volume, inside, flips, noise)[0], options.draw(flipped, inside, none, noise)[0]
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))
    unflipped = options.draw(volume, inside, none, noise)[0]
    assert not torch.equal(masks.visible, unflipped.visible)


@both_kinds
@both_decoders
@pytest.mark.parametrize("volume", [torch.zeros(B, C, *SHAPE), with_air(random_volume())], ids=["nothing", "some"])
def test_crops_of_air_give_finite_losses_and_gradients(adaptive, decoder, volume):
    network = autoencoder(adaptive, decoder=decoder)
    loss = loss_of(network(volume, trained(volume, adaptive=adaptive, rebuilt_share=0.25, skip_background=True)))
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
    loss_of(network(volume, trained(volume, adaptive=adaptive, **options))).backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@pytest.mark.usefixtures("one_process")
@both_kinds
def test_an_autoencoder_trains_in_distributed_processes_whatever_is_background(adaptive):
    network = DistributedDataParallel(autoencoder(adaptive, **FASTEST), find_unused_parameters=False)
    optimizer = torch.optim.AdamW(network.parameters())
    for volume in (random_volume(), torch.zeros(B, C, *SHAPE), with_air(random_volume())):
        optimizer.zero_grad()
        loss_of(network(volume, trained(volume, adaptive=adaptive, **FASTEST))).backward()
        optimizer.step()


@pytest.mark.parametrize(("adaptive", "options"), [(False, {"rebuilt_share": 0.25}), (True, FASTEST)])
def test_a_batch_can_be_overfitted(adaptive, options):
    network, volume = autoencoder(adaptive, **options), random_volume(samples=1)
    masks = trained(volume, adaptive=adaptive, **options)
    optimizer, losses = torch.optim.AdamW(network.parameters(), lr=4e-3), []
    for _ in range(100):
        loss = loss_of(network(volume, masks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@both_kinds
def test_the_planner_sees_that_fewer_tokens_take_less_memory(adaptive):
    network = Network(size="XS", token=TOKEN, adaptive=adaptive)

    def memory(**options) -> int:
        return pretraining_memory(network, protocol(**options), (25, 32, 38), C, 2)

    assert memory(decoder="cross", rebuilt_share=0.25) < memory(rebuilt_share=0.25) < memory()


@both_kinds
@both_decoders
@pytest.mark.parametrize("norm_pix", [True, False])
def test_a_picture_shows_all_that_was_hidden_and_leaves_blank_what_took_no_part(adaptive, decoder, norm_pix):
    network, options = autoencoder(adaptive, decoder=decoder), {"rebuilt_share": 0.25, "skip_background": True}
    volume = random_volume(samples=1)
    volume[:, :, AIR] = -1.0
    masks, masking = masks_for(volume, adaptive=adaptive, **options), drawing(adaptive, **options).masking
    original, masked, rebuilt = rebuild(network, masking, Samples(volume, masks, [[0, 1]]), norm_pix=norm_pix)
    assert np.array_equal(original, volume[0].numpy())
    assert np.isnan(rebuilt[:, AIR]).all()
    assert np.isfinite(rebuilt[:, AIR.stop :]).all()
    seen = np.isfinite(masked)
    assert np.array_equal(rebuilt[seen], original[seen])
    assert not seen[:, AIR].any()
    assert not (rebuilt[:, AIR.stop :] == original[:, AIR.stop :])[~seen[:, AIR.stop :]].any()


@both_kinds
def test_a_picture_rebuilds_as_many_tokens_at_a_time_as_a_step(adaptive):
    """In self-attention a prediction depends on what is rebuilt with it."""
    network, volume = autoencoder(adaptive), random_volume(samples=1)
    masks, masking = masks_for(volume, adaptive=adaptive), drawing(adaptive, rebuilt_share=0.3).masking
    _, _, rebuilt = rebuild(network, masking, Samples(volume, masks, [[0, 1]]), norm_pix=False)
    places = patchify(torch.from_numpy(rebuilt)[None], TOKEN)
    for part in masking.rounds(masks):
        with torch.no_grad():
            patches = network(volume, part).patches * patchify(torch.ones_like(volume), TOKEN)[0, part.hidden, :1]
        for image, (hidden, predicted) in enumerate(zip(part.hidden, patches, strict=True)):
            shown = places[0, hidden, image : image + 1] if adaptive else places[0, hidden]
            assert torch.equal(shown, predicted)
