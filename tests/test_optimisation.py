"""The learning rate over the schedule and over the layers of a real segmenter, and a step of fine-tuning."""

import math
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import small_unet
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn import functional

from nnunet_vit_mae.networks.build import build_autoencoder, build_segmenter
from nnunet_vit_mae.nnunet.adamw import AdamWTrainer
from nnunet_vit_mae.nnunet.trainers import nnUNetTrainerViTScratch
from nnunet_vit_mae.optimisation import WarmupCosine, parameter_groups, set_learning_rate, warmup_cosine
from nnunet_vit_mae.presets import DECODERS, SIZES
from nnunet_vit_mae.settings import Network, Pretraining, Settings

DEPTH = SIZES["XS"].depth
DECAY = 0.7
STRIDES = [(1, 1, 1), (1, 2, 2)]  # of the hybrid's U-Net

shares = st.floats(0, 1)
warmups = st.floats(0.01, 0.95)


@pytest.fixture(scope="module", params=sorted(DECODERS))
def segmenter(request) -> nn.Module:
    network = Network(size="XS", token=(2, 4, 8), decoder=request.param)
    return build_segmenter(network, 2, 3, drop_path=0.1, unet=partial(small_unet, 2, 3, STRIDES))


@pytest.fixture(scope="module")
def groups(segmenter) -> list[dict]:
    return parameter_groups(segmenter.named_parameters(), weight_decay=0.05, layer_decay=DECAY, depth=DEPTH)


def group_of(groups: list[dict], parameter: nn.Parameter) -> dict:
    (found,) = [group for group in groups if any(p is parameter for p in group["params"])]
    return found


# ---------- schedule


@given(first=shares, second=shares, warmup=warmups)
def test_the_schedule_is_continuous(first, second, warmup):
    steepest = max(1 / warmup, math.pi / 2 / (1 - warmup))
    change = abs(warmup_cosine(first, warmup) - warmup_cosine(second, warmup))
    assert change <= steepest * abs(first - second) + 1e-9


@given(first=shares, second=shares, warmup=warmups)
def test_the_schedule_rises_up_to_the_warmup_and_falls_behind_it(first, second, warmup):
    early, late = sorted((first, second))
    if late <= warmup:
        assert warmup_cosine(early, warmup) <= warmup_cosine(late, warmup) + 1e-12
    if early >= warmup:
        assert warmup_cosine(early, warmup) >= warmup_cosine(late, warmup) - 1e-12


@given(progress=shares, warmup=warmups)
def test_the_schedule_stays_between_0_and_1(progress, warmup):
    assert 0 <= warmup_cosine(progress, warmup) <= 1


@given(warmup=warmups)
def test_the_schedule_starts_at_0_peaks_at_1_and_ends_at_0(warmup):
    assert warmup_cosine(0, warmup) == 0
    assert warmup_cosine(warmup, warmup) == 1
    assert warmup_cosine(1, warmup) == pytest.approx(0, abs=1e-12)


def test_without_warmup_the_schedule_starts_at_the_peak():
    assert warmup_cosine(0.0, 0.0) == 1


@pytest.mark.parametrize(("progress", "factor"), [(0.1, 0.5), (0.2, 1), (0.4, (1 + 0.5**0.5) / 2), (0.6, 0.5)])
def test_known_factors_of_the_schedule(progress, factor):
    assert warmup_cosine(progress, 0.2) == pytest.approx(factor)


# ---------- groups


def test_each_parameter_is_in_exactly_one_group(segmenter, groups):
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in segmenter.parameters())


def test_vectors_have_no_weight_decay_and_all_else_has(segmenter, groups):
    for parameter in segmenter.parameters():
        assert group_of(groups, parameter)["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.05)


def test_biases_and_norms_have_no_weight_decay(segmenter, groups):
    names = {name for name, p in segmenter.named_parameters() if group_of(groups, p)["weight_decay"] == 0}
    assert {name for name, _ in segmenter.named_parameters() if name.endswith("bias") or "norm" in name} <= names


def test_each_block_learns_more_slowly_than_the_one_behind_it(segmenter, groups):
    for name, parameter in segmenter.named_parameters():
        block = re.match(r"encoder\.transformer\.blocks\.(\d+)\.", name)
        if block:
            assert group_of(groups, parameter)["lr_scale"] == pytest.approx(DECAY ** (DEPTH - int(block[1])))


def test_the_tokenizer_learns_most_slowly(segmenter, groups):
    (scale,) = {group_of(groups, parameter)["lr_scale"] for parameter in segmenter.encoder.tokenizer.parameters()}
    assert scale == pytest.approx(DECAY ** (DEPTH + 1))
    assert scale == min(group["lr_scale"] for group in groups)


def test_the_decoder_and_the_last_norm_learn_at_the_full_rate(segmenter, groups):
    behind = [*segmenter.decoder.parameters(), *segmenter.encoder.transformer.norm.parameters()]
    assert {group_of(groups, parameter)["lr_scale"] for parameter in behind} == {1.0}


def test_each_group_knows_whether_it_is_in_the_encoder(segmenter, groups):
    for name, parameter in segmenter.named_parameters():
        assert group_of(groups, parameter)["pretrained"] == name.startswith("encoder.")


@pytest.mark.parametrize("depth", [0, 1, DEPTH])
@pytest.mark.parametrize("layer_decay", [DECAY, 1.0])
def test_the_first_group_is_the_decoder_at_the_full_rate(segmenter, layer_decay, depth):
    grouped = parameter_groups(segmenter.named_parameters(), weight_decay=0.1, layer_decay=layer_decay, depth=depth)
    first, in_decoder = grouped[0], {id(parameter) for parameter in segmenter.decoder.parameters()}
    assert first["lr_scale"] == 1
    assert not first["pretrained"]
    assert {id(parameter) for parameter in first["params"]} <= in_decoder
    for group in grouped:
        assert len({id(parameter) in in_decoder for parameter in group["params"]}) == 1


@given(
    layer_decay=st.floats(0.1, 1),
    depth=st.integers(0, DEPTH),
    names=st.permutations(
        ["encoder.tokenizer.w", "encoder.transformer.blocks.0.w", "encoder.transformer.norm", "head"]
    ),
    dimensions=st.integers(1, 3),
)
def test_the_first_group_is_the_head_in_whatever_order_the_parameters_come(layer_decay, depth, names, dimensions):
    named = {name: nn.Parameter(torch.zeros([2] * dimensions)) for name in names}
    first, *others = parameter_groups(named.items(), weight_decay=0.1, layer_decay=layer_decay, depth=depth)
    assert (first["lr_scale"], first["pretrained"]) == (1, False)
    assert [id(parameter) for parameter in first["params"]] == [id(named["head"])]
    assert all(group["pretrained"] for group in others)


def test_without_layer_decay_all_learn_at_one_rate_in_two_groups():
    network = build_autoencoder(Network(size="XS", token=(2, 4, 8)), 2, Pretraining(mask_ratio=0.5))
    groups = parameter_groups(network.named_parameters(), weight_decay=0.05)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))


def test_the_mask_token_has_no_weight_decay():
    network = build_autoencoder(Network(size="XS", token=(2, 4, 8)), 2, Pretraining(mask_ratio=0.5))
    groups = parameter_groups(network.named_parameters(), weight_decay=0.05)
    assert group_of(groups, network.mask_token)["weight_decay"] == 0


def test_the_learning_rate_of_each_group_is_scaled(groups):
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=1.0)
    for lr in (0.5, 0.02):  # from the scale each time, not from the rate before
        set_learning_rate(optimizer, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr * group["lr_scale"] for group in groups]
    assert optimizer.param_groups[0]["lr"] == 0.02


# ---------- freezing


def adamw(network: nn.Module, *, fused: bool = False, layer_decay: float = DECAY) -> torch.optim.Optimizer:
    groups = parameter_groups(network.named_parameters(), weight_decay=0.05, layer_decay=layer_decay, depth=DEPTH)
    return torch.optim.AdamW(groups, lr=1.0, fused=fused)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def small_segmenter(decoder: str) -> nn.Module:
    torch.manual_seed(0)
    network = Network(size="XS", token=(1, 2, 4), decoder=decoder)
    return build_segmenter(network, 1, 2, drop_path=0.1, unet=partial(small_unet, 1, 2, STRIDES))


@pytest.mark.parametrize("layer_decay", [DECAY, 1.0])
def test_a_frozen_encoder_has_a_rate_of_0_and_the_rest_its_own(segmenter, layer_decay):
    optimizer = adamw(segmenter, layer_decay=layer_decay)
    set_learning_rate(optimizer, 0.5, freeze_pretrained=True)
    for name, parameter in segmenter.named_parameters():
        assert group_of(optimizer.param_groups, parameter)["lr"] == (0 if name.startswith("encoder.") else 0.5)
    assert group_of(optimizer.param_groups, segmenter.encoder.transformer.norm.weight)["lr"] == 0
    assert optimizer.param_groups[0]["lr"] == 0.5
    set_learning_rate(optimizer, 0.5)
    assert rates(optimizer) == [0.5 * group["lr_scale"] for group in optimizer.param_groups]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_nothing_frozen_moves_by_a_bit_while_all_of_the_decoder_does(decoder, fused):
    network = small_segmenter(decoder)
    optimizer = adamw(network, fused=fused)
    volume = torch.randn(2, 1, 2, 4, 8)

    def moved_by_steps(*, freeze_pretrained: bool) -> set[str]:
        set_learning_rate(optimizer, 0.01, freeze_pretrained=freeze_pretrained)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            network(volume).square().mean().backward()
            optimizer.step()
        now = {name: parameter.detach() for name, parameter in network.named_parameters()}
        return {name for name in now if now[name].numpy().tobytes() != before[name].numpy().tobytes()}

    everything = {name for name, _ in network.named_parameters()}
    in_decoder = {name for name in everything if name.startswith("decoder.")}
    assert moved_by_steps(freeze_pretrained=True) == in_decoder
    assert moved_by_steps(freeze_pretrained=False) == everything
    assert moved_by_steps(freeze_pretrained=True) == in_decoder  # with moments from the steps before


@pytest.mark.parametrize("freeze_epochs", [0, 1, 3, 7, 20])
def test_the_first_epochs_freeze_the_encoder_and_change_nothing_else(freeze_epochs):
    optimizer = adamw(small_segmenter("mae"))
    frozen = WarmupCosine(optimizer, 0.02, warmup=0.3, epochs=7, steps_per_epoch=3, freeze_epochs=freeze_epochs)
    free = WarmupCosine(optimizer, 0.02, warmup=0.3, epochs=7, steps_per_epoch=3)
    in_encoder = [group["pretrained"] for group in optimizer.param_groups]
    for epoch in range(7):
        free.step(epoch)
        expected = rates(optimizer)
        assert min(expected) > 0
        frozen.step(epoch)
        if epoch < freeze_epochs:
            expected = [0 if inside else rate for inside, rate in zip(in_encoder, expected, strict=True)]
        assert rates(optimizer) == expected


@pytest.mark.parametrize(("step", "rate"), [((0, 0), 0.125), ((0, 1), 0.25), ((1, 0), 0.5), ((3, 0), 0.25)])
def test_known_rates_of_steps(step, rate):
    """Warm-up and cosine go on within an epoch: here five epochs of three steps, with four steps of warm-up."""
    optimizer = adamw(small_segmenter("mae"))
    WarmupCosine(optimizer, 0.5, warmup=0.25, epochs=5, steps_per_epoch=3).step(*step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@given(epochs=st.integers(1, 30), steps=st.integers(1, 30), warmup=st.floats(0.01, 0.5))
def test_a_short_schedule_warms_up_too(epochs, steps, warmup):
    """The first step has the smallest rate of the warm-up, whatever the number of epochs; no step has a rate of 0."""
    parameters = [("head", nn.Parameter(torch.zeros(2)))]
    optimizer = torch.optim.AdamW(parameter_groups(parameters, weight_decay=0.05))
    schedule = WarmupCosine(optimizer, 1.0, warmup=warmup, epochs=epochs, steps_per_epoch=steps)
    found = []
    for epoch in range(epochs):
        for step in range(steps):
            schedule.step(epoch, step)
            found.append(rates(optimizer)[0])
    total = epochs * steps
    assert found == [warmup_cosine((number + 1) / (total + 1), warmup) for number in range(total)]
    assert min(found) > 0


def test_new_weights_learn_at_the_full_rate_and_are_not_frozen():
    """A tokenizer that no encoder has brought: neither layer-wise decay nor freezing touches it."""
    network = small_segmenter("mae")
    names = {name for name, _ in network.named_parameters() if name.startswith("encoder.transformer.")}
    groups = parameter_groups(
        network.named_parameters(), weight_decay=0.05, layer_decay=DECAY, depth=DEPTH, pretrained=names
    )
    optimizer = torch.optim.AdamW(groups)
    set_learning_rate(optimizer, 0.5, freeze_pretrained=True)
    for name, parameter in network.named_parameters():
        assert group_of(optimizer.param_groups, parameter)["lr"] == (0 if name in names else 0.5)
    set_learning_rate(optimizer, 0.5)
    assert group_of(optimizer.param_groups, network.encoder.tokenizer.projection.weight)["lr"] == 0.5
    block = network.encoder.transformer.blocks[0].mlp[0].weight
    assert group_of(optimizer.param_groups, block)["lr"] == pytest.approx(0.5 * DECAY**DEPTH)


def test_a_new_tokenizer_beside_positions_and_registers_that_an_encoder_brings_is_new_as_a_whole():
    chosen = Network(size="XS", token=(2, 4, 8), learned_positions=(2, 2, 2), register_tokens=2, decoder="mae")
    network = build_segmenter(chosen, 1, 2)
    names = {name for name, _ in network.named_parameters() if name.startswith("encoder.")}
    brought = {name for name in names if not name.startswith("encoder.tokenizer.")}
    groups, groups_of_a_run_that_goes_on = (
        parameter_groups(
            network.named_parameters(), weight_decay=0.05, layer_decay=DECAY, depth=DEPTH, pretrained=pretrained
        )
        for pretrained in (brought, ())
    )
    for name, parameter in network.named_parameters():
        assert group_of(groups, parameter)["pretrained"] == (name in brought)
    assert group_of(groups, network.encoder.tokenizer.projection.bias)["lr_scale"] == 1
    assert group_of(groups, network.encoder.register_tokens)["lr_scale"] == pytest.approx(DECAY ** (DEPTH + 1))
    sizes = [[len(group["params"]) for group in own] for own in (groups, groups_of_a_run_that_goes_on)]
    assert sizes[0] == sizes[1]  # it learns from the checkpoint what was brought


@given(epochs=st.lists(st.integers(0, 9), min_size=1, max_size=5), freeze_epochs=st.integers(0, 10))
def test_an_epochs_rates_do_not_depend_on_those_before(epochs, freeze_epochs):
    def schedule() -> WarmupCosine:
        parameters = [("encoder.tokenizer.w", nn.Parameter(torch.zeros(2))), ("head", nn.Parameter(torch.zeros(2)))]
        groups = parameter_groups(parameters, weight_decay=0.05, layer_decay=DECAY, depth=DEPTH)
        return WarmupCosine(
            torch.optim.AdamW(groups), 0.1, warmup=0.2, epochs=10, steps_per_epoch=4, freeze_epochs=freeze_epochs
        )

    late, fresh = schedule(), schedule()
    for epoch in epochs:
        late.step(epoch)
    fresh.step(epochs[-1])
    assert rates(late.optimizer) == rates(fresh.optimizer)
    assert (rates(late.optimizer)[1] == 0) == (epochs[-1] < freeze_epochs)


# ---------- a step of fine-tuning


def test_a_step_clips_the_gradients_of_all_that_moves_and_of_nothing_else():
    """Those of a frozen encoder would leave less for the rest."""
    encoder, head = nn.Linear(4, 3), nn.Linear(3, 2)
    groups = [{"params": [*part.parameters()], "lr": rate} for part, rate in ((encoder, 0.0), (head, 1e-9))]
    trainer = SimpleNamespace(
        settings=Settings.from_dict({"finetuning": {"gradient_clip": 0.01}}),
        optimizer=torch.optim.SGD(groups),
        lr_scheduler=SimpleNamespace(step=lambda *_: None),
        current_epoch=0,
        steps_done=0,
        augment=None,
        norms=[],
        loss=functional.mse_loss,
        logits=lambda volume: head(encoder(volume)),
        _on_device=lambda part: part,
    )
    AdamWTrainer.take_step(trainer, {"data": 100 * torch.ones(5, 4), "target": torch.zeros(5, 2)})
    frozen, moving = (torch.cat([p.grad.flatten() for p in part.parameters()]).norm() for part in (encoder, head))
    assert moving.item() == pytest.approx(0.01, rel=1e-3)
    assert frozen > 1
    assert trainer.norms[0] > 1


@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize(("loss", "weight"), [("dice", 0), ("dice_ce", 1)])
def test_a_loss_of_dice_alone_has_no_cross_entropy(monkeypatch, supervised, loss, weight):
    whole = nn.Module()
    whole.weight_ce = 1
    built = DeepSupervisionWrapper(whole, [1.0]) if supervised else whole
    monkeypatch.setattr(nnUNetTrainer, "_build_loss", lambda _: built)
    trainer = object.__new__(nnUNetTrainerViTScratch)
    trainer.settings = Settings.from_dict({"finetuning": {"loss": loss}})
    assert trainer._build_loss() is built
    assert whole.weight_ce == weight
