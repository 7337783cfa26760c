"""The trainers inside nnU-Net: the hybrid with its U-Net, the schedule per step, random seeds, new weights."""

import json
import math
import random
import re
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from conftest import SHAPE, Sharp, read_voxels
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.nn.parallel import DistributedDataParallel

from nnunet_vit_mae.networks.build import build_segmenter
from nnunet_vit_mae.nnunet.adamw import AdamWTrainer
from nnunet_vit_mae.nnunet.augmentation import BatchAugmentation
from nnunet_vit_mae.nnunet.plans import settings_for
from nnunet_vit_mae.nnunet.scheduled import ScheduledTrainer
from nnunet_vit_mae.nnunet.trainers import (
    nnUNetTrainerAMAEScratch,
    nnUNetTrainerBaseline,
    nnUNetTrainerBaselineAdamW,
    nnUNetTrainerViTScratch,
)
from nnunet_vit_mae.optimisation import warmup_cosine
from nnunet_vit_mae.presets import SIZES
from nnunet_vit_mae.settings import Network, Settings
from nnunet_vit_mae.storage.csv_tables import read_rows
from nnunet_vit_mae.tracking import METRICS
from nnunet_vit_mae.weights import read_encoder

pytestmark = pytest.mark.slow

DEPTH = SIZES["XS"].depth
LAYER_DECAY, LATER_DECAY = 0.5, 0.8
EPOCHS, ITERATIONS, WARMUP, LR = 2, 6, 0.5, 1e-3
INTERRUPTED = 75  # an exit code


def plan(workspace, name, flags="", **finetuning):
    """Write plans for a tiny network with these settings of fine-tuning."""
    recipe = workspace.root / f"{name}.recipe.json"
    recipe.write_text(json.dumps({"finetuning": {"batch_size": 2, **finetuning}}))
    workspace.call(*f"mae3d_plan -d 901 -o {name} --recipe {recipe} --size XS --token 4 {flags}".split())


def train(workspace, plans, trainer, *flags, fold=0, interrupted=False):
    """Train, up to the end of the first epoch if `interrupted`; return (rate, scale) of each parameter at each step."""
    steps, step, epoch_end = [], AdamWTrainer.train_step, AdamWTrainer.on_epoch_end

    def recording(self, batch):
        result = step(self, batch)
        names = {id(parameter): name for name, parameter in self.unwrapped.named_parameters()}
        groups = self.optimizer.param_groups
        steps.append({names[id(p)]: (group["lr"], group["lr_scale"]) for group in groups for p in group["params"]})
        return result

    def stopping(self):
        epoch_end(self)
        sys.exit(INTERRUPTED)

    command = f"nnUNetv2_train 901 3d_fullres {fold} -p {plans} -device cpu -tr {trainer}".split()
    with (
        mock.patch.object(AdamWTrainer, "train_step", recording),
        mock.patch.object(AdamWTrainer, "on_epoch_end", stopping if interrupted else epoch_end),
    ):
        workspace.call(*command, *flags, code=INTERRUPTED if interrupted else 0)
    return steps


def checkpoint_of(workspace, plans, trainer, *, fold=0, name="checkpoint_final.pth"):
    folder = workspace.results / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"
    return torch.load(folder / name, weights_only=False)


# ---------- the hybrid


@pytest.fixture(scope="module")
def hybrid(planned, tmp_path_factory):
    """The hybrid, trained at once in fold 0, and interrupted and continued in fold 1; with the rates of both.

    In fold 0 it augments on the device that trains.
    """
    workspace = planned.copied_to(tmp_path_factory.mktemp("hybrid"))
    schedule = {"epochs": EPOCHS, "iterations": ITERATIONS, "warmup": WARMUP, "lr": LR}
    plan(workspace, "Hybrid", "--decoder unet", augmentation="device", **schedule)
    workspace.call(*"mae3d_preprocess -d 901 -np 1".split())
    workspace.call(*"mae3d_pretrain -d 901 -p Hybrid --epochs 1 --batch_size 4 -device cpu".split())
    arguments = (workspace, "Hybrid", "nnUNetTrainerViTMAE")
    at_once = train(*arguments)
    plan(workspace, "Hybrid", "--decoder unet", **schedule)
    before = train(*arguments, fold=1, interrupted=True)
    after = train(*arguments, "--c", fold=1)
    return SimpleNamespace(workspace=workspace, at_once=at_once, before=before, after=after)


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_at_the_first_step_the_hybrid_is_nnunets_own_u_net(planned, deep_supervision):
    content = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
    block = {"network": {"size": "XS", "token": [4, 4, 4], "decoder": "unet"}}
    content["configurations"]["3d_fullres"]["vit_mae"] = block
    plans = PlansManager(content)
    configuration = plans.get_configuration("3d_fullres")
    hybrid, unet = (
        trainer.build_network_architecture(plans, configuration, 2, 2, deep_supervision)
        for trainer in (nnUNetTrainerViTScratch, nnUNetTrainer)
    )
    unet.load_state_dict(hybrid.decoder.unet.state_dict())
    volume = torch.randn(2, 2, *configuration.patch_size)
    with torch.no_grad():
        ours, theirs = hybrid(volume), unet(volume)
    assert isinstance(ours, list) == deep_supervision
    pairs = list(zip(ours, theirs, strict=True)) if deep_supervision else [(ours, theirs)]
    assert len(pairs) > deep_supervision
    for own, reference in pairs:
        assert torch.equal(own, reference)


@pytest.mark.parametrize("trainer", [nnUNetTrainerViTScratch, nnUNetTrainerAMAEScratch])
def test_a_model_keeps_its_settings_whatever_a_later_default_is(planned, tmp_path, monkeypatch, trainer):
    for name, root in {"raw": planned.root, "preprocessed": planned.root, "results": tmp_path}.items():
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))  # a trainer makes its folder at once
    content = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text())
    description = json.loads((planned.preprocessed / "dataset.json").read_text())
    model = trainer(content | {"continue_training": False}, "3d_fullres", 0, description, torch.device("cpu"))
    monkeypatch.setattr("nnunet_vit_mae.nnunet.plans.default_settings", lambda *_, **__: Settings())
    plans = PlansManager(json.loads(json.dumps(model.plans_manager.plans)))
    assert settings_for(plans.get_configuration("3d_fullres"), 2, adaptive=trainer.adaptive) == model.settings
    assert model.settings != Settings()


@pytest.mark.parametrize("labels", [{"background": 0, "lesion": 1}, {"background": 0, "whole": [1, 2], "core": 2}])
@pytest.mark.parametrize("prior", [0.02, 0.0])
@pytest.mark.parametrize("trainer", [nnUNetTrainerViTScratch, nnUNetTrainerBaselineAdamW])
def test_training_starts_by_holding_most_voxels_for_background(planned, tmp_path, monkeypatch, labels, prior, trainer):
    for name, root in {"raw": planned.root, "preprocessed": planned.root, "results": tmp_path}.items():
        monkeypatch.setenv(f"nnUNet_{name}", str(root / name))
    content = json.loads((planned.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    content["configurations"]["3d_fullres"]["vit_mae"] = {
        "network": {"size": "XS", "token": [4, 4, 4]}, "finetuning": {"foreground_prior": prior},
    }  # fmt: skip
    description = json.loads((planned.preprocessed / "dataset.json").read_text()) | {"labels": labels}
    regions = len(labels) > 2
    description |= {"regions_class_order": [1, 2]} if regions else {}
    model = trainer(content, "3d_fullres", 0, description, torch.device("cpu"))
    model.initialize()
    for layer in model.last_layers:
        bias = layer.bias.detach()
        found = bias.sigmoid()[0] if regions else bias.softmax(dim=0)[1]
        assert (found.item() == pytest.approx(0.02)) == bool(prior)


def test_the_hybrid_learns_to_use_the_vit_and_the_vit_learns(hybrid):
    weights = checkpoint_of(hybrid.workspace, "Hybrid", "nnUNetTrainerViTMAE")["network_weights"]
    assert weights["decoder.projection.weight"].any()  # it starts at zero
    file = hybrid.workspace.results / "mae3d_pretrain__Hybrid__3d_fullres" / "fold_all" / "encoder.safetensors"
    tensors, _ = read_encoder(file)
    assert all(not torch.equal(weights[f"encoder.{name}"], tensor) for name, tensor in tensors.items())


def test_augmentation_on_the_device_gives_targets_of_all_resolutions():
    transform = DownsampleSegForDSTransform([[1, 1, 1], [0.5, 1, 0.5], [0.25, 0.5, 0.25]])
    augment = BatchAugmentation(ComposeTransforms([transform]), [0, 1], contrast_dropout=0)
    segmentation = torch.randint(0, 2, (3, 1, 8, 8, 12), dtype=torch.int16)
    _, targets = augment(torch.randn(3, 2, 8, 8, 12), segmentation)
    samples = [transform(segmentation=sample)["segmentation"] for sample in segmentation]
    assert [tuple(target.shape[2:]) for target in targets] == [(8, 8, 12), (4, 8, 6), (2, 4, 3)]
    for target, expected in zip(targets, zip(*samples, strict=True), strict=True):
        assert torch.equal(target, torch.stack(expected))


def test_nnunet_predicts_with_the_hybrid(hybrid, tmp_path):
    images = hybrid.workspace.raw / "imagesTs"
    model = "-d 901 -c 3d_fullres -f 1 -p Hybrid -device cpu -tr nnUNetTrainerViTMAE"
    hybrid.workspace.call(*f"nnUNetv2_predict -i {images} -o {tmp_path} {model}".split())
    for case in ("test_0", "test_1"):
        assert read_voxels(tmp_path / f"{case}.nii.gz").shape == SHAPE


# ---------- the schedule


def test_nnunets_u_net_learns_as_the_vit_does_whatever_vit_the_plans_have(hybrid):
    workspace, schedule = hybrid.workspace, {"epochs": EPOCHS, "iterations": ITERATIONS, "warmup": WARMUP, "lr": LR}
    arguments = (workspace, "UNet", "nnUNetTrainerBaselineAdamW")
    plan(workspace, "UNet", "--decoder unet", **schedule)
    before = train(*arguments, interrupted=True)
    plan(workspace, "UNet", "--decoder mae", **schedule)
    after = train(*arguments, "--c")
    of_new_weights = [{step["decoder.projection.weight"]} for step in hybrid.at_once]
    assert [set(step.values()) for step in before + after] == of_new_weights
    plans = json.loads((workspace.preprocessed / "nnUNetPlans.json").read_text())
    configuration = PlansManager(plans).get_configuration("3d_fullres")
    unet = nnUNetTrainer.build_network_architecture(PlansManager(plans), configuration, 2, 2, True)
    unet.load_state_dict(checkpoint_of(*arguments)["network_weights"])


def test_the_warm_up_is_per_step(hybrid):
    rates = [step["decoder.projection.weight"][0] for step in hybrid.at_once]
    total = EPOCHS * ITERATIONS
    assert rates == pytest.approx([LR * warmup_cosine((n + 1) / (total + 1), WARMUP) for n in range(total)])
    assert 0 < rates[0] < 0.2 * LR
    assert max(rates) > 0.9 * LR


def test_a_continued_run_has_the_rates_of_one_at_once(hybrid):
    assert (len(hybrid.before), len(hybrid.after)) == (ITERATIONS, ITERATIONS)
    assert hybrid.before + hybrid.after == hybrid.at_once
    checkpoint = checkpoint_of(hybrid.workspace, "Hybrid", "nnUNetTrainerViTMAE", fold=1)
    assert len(checkpoint["logging"]["train_losses"]) == EPOCHS


# ---------- what does not come from the encoder


@pytest.fixture(scope="module")
def moved(planned, tmp_path_factory):
    """An adaptive encoder in a network that stacks its channels, interrupted and continued with another decay."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("moved"))
    finetuning = {"epochs": 2, "iterations": 1, "layer_decay": LAYER_DECAY, "freeze_epochs": 1}
    plan(workspace, "Moved", "--decoder mae", **finetuning)
    workspace.call(*"mae3d_preprocess -d 901 -np 1".split())
    workspace.call(*"mae3d_pretrain -d 901 -p Moved --adaptive --epochs 1 --batch_size 4 -device cpu".split())
    file = workspace.results / "mae3d_pretrain__Moved__3d_fullres" / "fold_all" / "encoder.safetensors"
    brought = {f"encoder.{name}": t for name, t in read_encoder(file)[0].items() if not name.startswith("tokenizer.")}
    arguments = (workspace, "Moved", "nnUNetTrainerViTMAE")
    (frozen,) = train(*arguments, interrupted=True)
    weights = checkpoint_of(*arguments, name="checkpoint_best.pth")["network_weights"]
    plan(workspace, "Moved", "--decoder mae", **finetuning | {"layer_decay": LATER_DECAY})
    (free,) = train(*arguments, "--c")
    return SimpleNamespace(brought=brought, frozen=frozen, weights=weights, free=free)


def test_a_new_tokenizer_learns_at_the_full_rate_and_the_blocks_at_their_own(moved):
    assert {scale for name, (_, scale) in moved.frozen.items() if name not in moved.brought} == {1.0}
    assert {name for name in moved.frozen if name.startswith("encoder.tokenizer.")}.isdisjoint(moved.brought)
    for name, (_, scale) in moved.frozen.items():
        if name.startswith("encoder.transformer.blocks."):
            assert scale == LAYER_DECAY ** (DEPTH - int(name.split(".")[3]))


def test_freezing_holds_what_the_encoder_brought_and_nothing_else(moved):
    assert {name for name, (rate, _) in moved.frozen.items() if rate == 0} == set(moved.brought)
    assert all(torch.equal(moved.weights[name], tensor) for name, tensor in moved.brought.items())


def test_a_continued_run_scales_what_the_encoder_brought_by_the_plans_and_ends_the_freezing(moved):
    for name, (_, scale) in moved.free.items():
        assert math.log(scale, LATER_DECAY) == pytest.approx(math.log(moved.frozen[name][1], LAYER_DECAY))
    peak = moved.free["encoder.tokenizer.projection.weight"][0]
    assert peak > 0
    assert all(rate == pytest.approx(peak * scale) for rate, scale in moved.free.values())


# ---------- a batch of one


@pytest.mark.parametrize("trainer", [nnUNetTrainerBaseline, nnUNetTrainerViTScratch])
@pytest.mark.parametrize(("batch_size", "with_foreground"), [(1, 33), (2, 50)])
def test_a_third_of_the_samples_has_foreground_in_a_batch_of_one_too(
    in_workspace, monkeypatch, trainer, batch_size, with_foreground
):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    content = json.loads((in_workspace.preprocessed / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    network = {"size": "XS", "token": [4, 4, 4], "decoder": "mae"}
    content["configurations"]["3d_fullres"]["vit_mae"] = {"network": network}
    content["configurations"]["3d_fullres"]["batch_size"] = batch_size
    description = json.loads((in_workspace.preprocessed / "dataset.json").read_text())
    model = trainer(content, "3d_fullres", 0, description, torch.device("cpu"))
    model.initialize()
    np.random.seed(0)  # noqa: NPY002 (nnU-Net draws from numpy's global generator)
    for loader in model.get_dataloaders():
        forced = [loader.data_loader.get_do_oversample(number) for _ in range(500) for number in range(batch_size)]
        assert 100 * np.mean(forced) == pytest.approx(with_foreground, abs=7)


# ---------- a training in the place of an earlier one


def test_a_killed_training_goes_on_though_an_earlier_one_ended_in_its_folder(planned, tmp_path):
    workspace, arguments = planned.copied_to(tmp_path), ("Again", "nnUNetTrainerViTScratch")
    plan(workspace, "Again", "--decoder mae", epochs=2, iterations=1, seed=1)
    train(workspace, *arguments)
    earlier = checkpoint_of(workspace, *arguments)
    plan(workspace, "Again", "--decoder mae", epochs=2, iterations=1, seed=2)
    train(workspace, *arguments, interrupted=True)
    assert len(train(workspace, *arguments, "--c")) == 1
    folder = workspace.results / "nnUNetTrainerViTScratch__Again__3d_fullres" / "fold_0"
    (moved,) = folder.glob("checkpoint_final_until_*.pth")
    assert str(torch.load(moved, weights_only=False)["logging"]) == str(earlier["logging"])
    losses = checkpoint_of(workspace, *arguments)["logging"]["train_losses"]
    assert len(losses) == 2
    assert set(losses).isdisjoint(earlier["logging"]["train_losses"])


def test_a_training_that_ended_is_made_longer_in_several_runs(planned, tmp_path):
    workspace, arguments = planned.copied_to(tmp_path), ("Longer", "nnUNetTrainerViTScratch")
    settings = {"iterations": 1, "seed": 1, "weight_decay": 0.05}
    plan(workspace, "Longer", "--decoder mae", epochs=1, **settings)
    train(workspace, *arguments)
    plan(workspace, "Longer", "--decoder mae", epochs=3, **settings | {"weight_decay": 0.2})
    for interrupted in (True, False):
        assert len(train(workspace, *arguments, "--c", interrupted=interrupted)) == 1
    checkpoint = checkpoint_of(workspace, *arguments)
    assert len(checkpoint["logging"]["train_losses"]) == 3
    assert {group["weight_decay"] for group in checkpoint["optimizer_state"]["param_groups"]} == {0.0, 0.2}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
def test_the_network_is_found_in_what_nnunet_wraps_around_it_on_gpus(compiled, distributed):
    network = build_segmenter(Network(size="XS", token=(4, 4, 4), decoder="mae"), 1, 2)
    wrapped = torch.compile(network) if compiled else network
    wrapped = DistributedDataParallel(wrapped) if distributed else wrapped
    assert (wrapped is network) == (not compiled and not distributed)
    assert AdamWTrainer.unwrapped.fget(SimpleNamespace(network=wrapped)) is network


# ---------- random seeds, and training that diverges

TRAINERS = [nnUNetTrainerViTScratch, nnUNetTrainerBaseline]


def training(trainer):
    return f"nnUNetv2_train 901 3d_fullres 0 -p Seeded -device cpu -tr {trainer.__name__}".split()


def losses_of(workspace, trainer, *flags, seed=1):
    """Train for two epochs of two steps, and return all losses."""
    plan(workspace, "Seeded", epochs=2, iterations=2, contrast_dropout=0.3, seed=seed)
    workspace.call(*training(trainer), *flags)
    logging = checkpoint_of(workspace, "Seeded", trainer.__name__)["logging"]
    return logging["train_losses"] + logging["val_losses"]


def interrupt(workspace, trainer):
    """Train, and stop after the first epoch."""
    epoch_end = trainer.on_epoch_end

    def stopping(self):
        epoch_end(self)
        sys.exit(INTERRUPTED)

    plan(workspace, "Seeded", epochs=2, iterations=2, contrast_dropout=0.3, seed=1)
    with mock.patch.object(trainer, "on_epoch_end", stopping):
        workspace.call(*training(trainer), code=INTERRUPTED)


def refusal(workspace, trainer, spoil):
    """Train, and spoil the second step of the second epoch; return the error.

    The checkpoints are those of the first epoch, then.
    """
    take_step = trainer.take_step

    def spoiled(self, batch):
        if self.current_epoch == 1 and len(self.losses) == 1:
            spoil(self, batch)
        return take_step(self, batch)

    plan(workspace, "Seeded", epochs=2, iterations=2, contrast_dropout=0.3, seed=1)
    with mock.patch.object(trainer, "take_step", spoiled):
        error = workspace.call(*training(trainer), code=2).stderr
    assert "Traceback" not in error
    checkpoint = checkpoint_of(workspace, "Seeded", trainer.__name__, name="checkpoint_best.pth")
    assert checkpoint["current_epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint["network_weights"].values())
    latest = checkpoint_of(workspace, "Seeded", trainer.__name__, name="checkpoint_latest.pth")
    assert str(latest["network_weights"]) == str(checkpoint["network_weights"])
    assert f"Error: {error.rpartition('Error: ')[2].strip()}" in logs_of(workspace, trainer)[-1].read_text()
    return error


def logs_of(workspace, trainer):
    folder = workspace.results / f"{trainer.__name__}__Seeded__3d_fullres" / "fold_0"
    return sorted(folder.glob("training_log_*.txt"))


@pytest.fixture(scope="module", params=TRAINERS, ids=lambda trainer: trainer.__name__)
def seeded(request, planned, tmp_path_factory):
    """A run with seed 1, at once."""
    workspace = planned.copied_to(tmp_path_factory.mktemp("seeded"))
    losses = losses_of(workspace, request.param)
    return SimpleNamespace(workspace=workspace, trainer=request.param, losses=losses)


def test_the_same_seed_gives_the_same_losses_to_the_digit_though_interrupted(seeded, planned, tmp_path):
    workspace = planned.copied_to(tmp_path)
    interrupt(workspace, seeded.trainer)
    table = logs_of(workspace, seeded.trainer)[0].with_name("metrics.csv")
    table.write_text(table.read_text() + table.read_text().splitlines()[1].replace("0,", "1,", 1) + "\n")  # cut off
    assert losses_of(workspace, seeded.trainer, "--c") == seeded.losses
    rows = read_rows(table)
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert [float(row[name]) for name in ("train_losses", "val_losses") for row in rows] == seeded.losses


def test_the_table_has_what_nnunet_logs_and_how_the_steps_went(seeded):
    (log,) = logs_of(seeded.workspace, seeded.trainer)
    rows = read_rows(log.with_name("metrics.csv"))
    assert [*rows[0]] == ["epoch", *METRICS, "dice_per_class_or_region/class_1"]
    logging = checkpoint_of(seeded.workspace, "Seeded", seeded.trainer.__name__)["logging"]
    for name in set(METRICS) & set(logging):
        assert [float(row[name]) for row in rows] == pytest.approx(logging[name], nan_ok=True), name
    for row in rows:
        assert 0 < float(row["gradient_norms"]) <= float(row["gradient_norms_max"])
        assert 0 <= float(row["waiting_share"]) < 1
        assert 0 < 2 * float(row["seconds_per_step"]) < float(row["seconds_per_epoch"])


def test_another_seed_gives_other_losses(seeded, planned, tmp_path):
    workspace = planned.copied_to(tmp_path)
    assert set(losses_of(workspace, seeded.trainer, seed=2)).isdisjoint(seeded.losses)


def test_seeds_differ_between_processes_and_epochs(seeded):
    drawn = set()
    trainer = SimpleNamespace(seed=1, local_rank=0)
    for trainer.local_rank, *place in [(0,), (1,), (0, 1), (1, 1), (0, 2)]:
        ScheduledTrainer._seed_random_numbers(trainer, *place)
        drawn |= {random.random(), np.random.random(), torch.rand(()).item()}  # noqa: NPY002
    assert len(drawn) == 15


def test_the_gradient_norm_is_in_the_log_of_each_epoch(seeded):
    (log,) = logs_of(seeded.workspace, seeded.trainer)
    norms = re.findall(r"gradient norm(?: \(clipped to 12\))? (\S+), at most (\S+)", log.read_text())
    assert len(norms) == 2
    assert all(0 < float(mean) <= float(most) for mean, most in norms)


def test_a_loss_that_is_nan_stops_a_training_and_the_last_good_state_is_gone_on_from(seeded, planned, tmp_path):
    workspace, names = planned.copied_to(tmp_path), []

    def spoil(self, batch):
        batch["data"][0, 0, 3, 4, 5] = torch.nan
        names.extend(batch["keys"])

    error = refusal(workspace, seeded.trainer, spoil)
    assert f"The loss is nan in step 2 of epoch 1, whose batch is of {', '.join(dict.fromkeys(names))}; " in error
    assert f"voxels of {names[0]} are NaN or infinite" in error
    assert losses_of(workspace, seeded.trainer, "--c") == seeded.losses


def with_loss(change):
    """Spoil a step by a change of its loss."""

    def spoil(self, batch):
        loss = self.loss
        self.loss = lambda *arguments: change(loss(*arguments))

    return spoil


@pytest.mark.parametrize("every_step", [False, True])
def test_a_step_that_fp16_overflows_in_is_skipped_but_not_all_steps_of_an_epoch(planned, tmp_path, every_step):
    workspace, take_step = planned.copied_to(tmp_path), nnUNetTrainerBaseline.take_step

    def overflowing(self, batch):
        self.grad_scaler = self.grad_scaler or torch.amp.GradScaler("cpu", init_scale=1.0)  # as on a GPU
        loss, spoiled = self.loss, every_step or not self.losses
        with mock.patch.object(self, "loss", lambda *arguments: loss(*arguments) * (math.nan if spoiled else 1.0)):
            return take_step(self, batch)

    plan(workspace, "Seeded", epochs=1, iterations=2)
    with mock.patch.object(nnUNetTrainerBaseline, "take_step", overflowing):
        error = workspace.call(*training(nnUNetTrainerBaseline), code=2 if every_step else 0).stderr
    assert ("The loss is nan in step 1 of epoch 0" in error) == every_step
    assert ("; 1 steps skipped" in logs_of(workspace, nnUNetTrainerBaseline)[-1].read_text()) != every_step


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_gradient_without_end_stops_a_training_though_its_loss_is_good(planned, tmp_path, trainer):
    error = refusal(planned.copied_to(tmp_path), trainer, with_loss(Sharp.apply))
    assert re.search(r"The gradient norm is (nan|inf) in step 2 of epoch 1, whose batch is of train_\d", error)


def test_a_loss_that_explodes_stops_a_training(planned, tmp_path):
    error = refusal(planned.copied_to(tmp_path), nnUNetTrainerViTScratch, with_loss(lambda loss: loss + 1e5))
    assert re.search(r"has grown to \S+, most of all in step 2 of epoch 1, whose batch is of train_\d", error)
