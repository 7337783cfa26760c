"""Test that every benchmark can be imported, and that what it measures runs at a small scale."""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tracemalloc
import weakref
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from nnunet_vit_mae.calibration import cases as calibration_cases
from nnunet_vit_mae.calibration import temperature
from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.networks.memory import segmentation_loss
from nnunet_vit_mae.networks.tokenizer import padded, patchify
from nnunet_vit_mae.presets import POSITIONS
from nnunet_vit_mae.settings import Network, Pretraining, Settings

BENCHMARKS = sorted(file.stem for file in (Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_can_be_imported(name):
    assert import_module(name).__doc__


def test_steps_of_the_pretraining_decoder_run_with_all_options():
    benchmark = import_module("pretraining_decoder")
    for options in benchmark.OPTIONS.values():
        benchmark.step_of(options, "XS", 12, 4, 2)()


@pytest.mark.parametrize("kind", POSITIONS)
def test_a_step_runs_with_each_kind_of_positions(kind):
    benchmark = import_module("positions")
    benchmark.step_of(kind, "XS", 12, 4, 2, benchmark.torch.device("cpu"))()


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of MONAI
@pytest.mark.parametrize("name", ["default", "ours", "MONAI"])
def test_a_step_of_pretraining_runs_beside_monais(name):
    benchmark = import_module("pretraining_step")
    benchmark.step_of(name, benchmark.Case(24, 8, 2), "XS", benchmark.torch.device("cpu"))()


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of MONAI
@pytest.mark.parametrize("name", ["default", "MONAI"])
def test_a_step_beside_monais_runs_in_bf16_as_on_a_gpu(name):
    benchmark = import_module("pretraining_step")
    benchmark.step_of(name, benchmark.Case(24, 8, 2), "XS", benchmark.torch.device("cpu"), bf16=True)()


def test_contrasts_are_compared():
    arguments = argparse.Namespace(size="XS", side=16, token=8, batch=2, rounds=1)
    padding, ratio = import_module("contrasts").compare([2, 1], arguments)
    assert 0 < padding < 0.5
    assert ratio > 0


@pytest.mark.parametrize("run", ["groups", "packed"])
def test_a_step_of_studies_with_different_contrasts_runs_in_groups_and_packed(run):
    benchmark = import_module("contrasts")
    benchmark.step_of(run, [2, 1], "XS", 16, 8, 3, torch.device("cpu"))()


def test_growth_takes_a_step_for_tokens_and_one_for_contrasts():
    benchmark = import_module("growth")
    benchmark.step_of_tokens("XS", 0)()
    benchmark.step_of_contrasts("XS", 1)()


def test_growth_with_the_number_of_cases_is_printed(monkeypatch, capsys):
    benchmark = import_module("growth")
    monkeypatch.setattr(benchmark, "CASES", [10, 20])
    benchmark.cases()
    assert "| 20 |" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["mae3d_evaluate", "mae3d_calibrate"])
def test_a_case_with_many_labels_takes_no_volumes_of_floats(tmp_path, monkeypatch, command):
    """Both took 18 to 22 bytes per voxel; a softmax of ten labels has 44, and the distance of each voxel another 8."""
    benchmark, shape = import_module("case_memory"), (60, 88, 72)
    monkeypatch.setattr(calibration_cases, "VALUES_PER_BLOCK", 2**16)
    monkeypatch.setattr(temperature, "MOST", 2**9)
    benchmark.write_case(tmp_path, shape, 10, probabilities=True)
    tracemalloc.start()
    try:
        benchmark.WORK[command](tmp_path)
        assert tracemalloc.get_traced_memory()[1] / math.prod(shape) < 24
    finally:
        tracemalloc.stop()


def test_the_loader_yields_the_samples_of_a_batch(tmp_path):
    file = tmp_path / "case.b2nd"
    blosc2.asarray(np.ones((1, 9, 9, 9), dtype=np.float32), urlpath=str(file), mode="w")
    plan = SimpleNamespace(
        settings=Settings(network=Network(size="XS", token=(4, 4, 4)), pretraining=Pretraining(rotation=10.0)),
        channel_names=["CT"],
        configuration=SimpleNamespace(spacing=[2, 1, 1]),
    )
    batches = import_module("loader").our_batches(plan, [file], (8, 8, 8), crops=2, masks=3)
    assert next(batches) == 2 * 2 * 3  # of a batch of two volumes


def test_an_arm_whose_choice_an_ablation_would_not_read_is_refused():
    benchmark = import_module("ablation")
    benchmark.arm_of("free", {"finetuning": {"layer_decay": 1.0, "lr": 1e-3}}, Settings())
    with pytest.raises(UserError, match=r"The arm dice sets finetuning\.loss, which this benchmark does not read"):
        benchmark.arm_of("dice", {"finetuning": {"loss": "dice"}}, Settings())


class TestGPU:
    """What is to be measured on a GPU, here on a CPU at tiny sizes."""

    benchmark = import_module("gpu")

    @pytest.mark.slow
    def test_all_parts_run_and_a_second_run_measures_nothing_again(self, in_workspace, monkeypatch, tmp_path):
        # in a process of its own, for the checks of shapes in tests cannot be compiled
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        file = tmp_path / "gpu.jsonl"
        command = [sys.executable, "-W", "ignore", self.benchmark.__file__, "-o", file, "-d", "901"]
        command += ["--device", "cpu", "--smoke"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = self.benchmark.read(file)
        names = [part.name for part in self.benchmark.parts(smoke=True) if not part.missing()]
        assert [row["part"] for row in rows] == names
        assert all(row["cells"].get("volumes/s", 1.0) > 0 for row in rows)
        assert done.stdout.count("### ") == len({row["table"] for row in rows})

        self.benchmark.main(list(map(str, command[4:])))
        assert self.benchmark.read(file) == rows

    def test_parts_that_fail_are_named_and_the_others_are_kept(self, tmp_path, capsys):
        file = tmp_path / "gpu.jsonl"
        rows = [{"part": "first", "table": "A", "cells": {"volumes/s": 1234.5, "peak, GiB": None}}]
        file.write_text(json.dumps(rows[0]) + "\n")
        kinds = {"first": 1 / 0.5, "bad": None, "long": 1.0, "good": 2.0}
        parts = [
            self.benchmark.Part(name, "A", 1e9 if name == "long" else 1, lambda _, cell=cell: {"share": 1 / cell})
            for name, cell in kinds.items()
        ]
        bench = SimpleNamespace(knowing=lambda done: None)
        assert self.benchmark.measure(bench, parts, file, 100) == ["bad"]
        assert [row["part"] for row in self.benchmark.read(file)] == ["first", "good"]
        assert "long: left for another run" in capsys.readouterr().out

    def test_a_table_has_three_digits_and_dashes(self):
        rows = [
            {"part": "one", "table": "A", "cells": {"name": "x", "volumes/s": 1234.5, "share": 0.1234, "GiB": None}}
        ]
        assert self.benchmark.markdown(rows).splitlines()[-1] == "| x | 1,234 | 0.123 | - |"

    def test_the_work_of_a_step_is_counted_without_taking_it(self):
        benchmark, flops = import_module("pretraining_decoder"), import_module("measuring").flops
        one, two = (flops(lambda batch=batch: benchmark.step_of({}, "XS", 16, 4, batch)) for batch in (1, 2))
        assert two == 2 * one > 0


def test_a_step_of_size_s_starts_no_more_operations_than_it_did(monkeypatch):
    """Their number depends on the blocks alone, not on the tokens."""
    monkeypatch.setattr("nnunet_vit_mae.networks.precision.has_bf16", lambda _: True)  # as on a GPU
    step = import_module("pretraining_decoder").step_of({}, "S", 8, 4, 2)
    step()  # which makes what later ones keep
    counts = import_module("measuring").operations(step)
    assert counts["mm"] + counts["addmm"] == 3 * 83 - 1  # of the linear layers: nothing of the step is left out
    assert counts["_fused_adamw_"] == 1
    assert counts.total() <= 1390


def test_the_ablation_runs_on_a_packed_dataset(tmp_path, monkeypatch, capsys):
    benchmark, random = import_module("ablation"), np.random.default_rng(0)
    labels = np.zeros((4, 10, 18, 14), np.uint8)
    labels[:, 3:7, 5:9, 4:8] = 1
    np.savez_compressed(
        tmp_path / "packed.npz",
        volumes=random.normal(size=(5, 10, 18, 14)).astype(np.float16),
        labels=labels,
        sizes=np.array([[10, 18, 14]] * 3 + [[7, 16, 14]] * 2),
        patch=[8, 16, 12],
        strides=[[1, 1, 1], [2, 2, 2]],
        name="Dataset900_Noise",
    )
    common = {"network": {"size": "XS"}, "pretraining": {"batch_size": 2}, "finetuning": {"batch_size": 2}}
    arms = {
        "unet": {},
        "SGD": {"optimizer": "SGD"},
        "ViT": {"network": {"token": [4, 4, 4], "decoder": "mae"}},
        "ensemble": {"members": ["unet", "ViT"]},
        "twins": {"members": ["unet", "twin"]},
        "twin": {"seed": 0},
    }
    (tmp_path / "arms.json").write_text(json.dumps({"common": common, "arms": {**arms, "unused": {"network": {}}}}))
    cases = "--seeds 1 --labelled 1 --development 1 --tested 2"
    flags = f"{cases} --steps 1 --pretraining_steps 0 2 3 --device cpu --unet_width 4"
    command = f"ablation.py packed.npz --arms arms.json -o results.jsonl {flags} --only {' '.join(arms)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command.split())
    for _ in range(2):  # the second time nothing is left to do
        benchmark.main()
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(entry["arm"], entry["steps"]) for entry in entries] == [
        ("unet", 0), ("SGD", 0), ("ViT", 0), ("ensemble", 0), ("twins", 0), ("twin", 0),
        ("ViT", 2), ("ensemble", 2), ("ViT", 3), ("ensemble", 3),
    ]  # fmt: skip
    assert entries[4]["dice"] == entries[5]["dice"] == entries[0]["dice"]  # nothing differs between them
    assert all(0 <= entry[key] <= 1 for entry in entries for key in ("dice", "calibrated_dice"))
    assert all(entry[key] >= 0 for entry in entries for key in ("volume_error", "calibrated_volume_error"))
    assert all((entry["loss"] > 0) == (entry["arm"] == "ViT") for entry in entries[6:])
    monkeypatch.setattr("sys.argv", [*command.split(), "Unet"])
    with pytest.raises(UserError, match=r"arms\.json has no arm 'Unet'"):
        benchmark.main()
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", "ablation.py --table results.jsonl".split())
    benchmark.main()
    rows = [row.split(" | ")[1:3] for row in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["SGD", "0"], ["ViT", "0"], ["ViT", "2"], ["ViT", "3"], ["ensemble", "0"], ["ensemble", "2"], ["ensemble", "3"],
        ["twin", "0"], ["twins", "0"], ["unet", "0"],
    ]  # fmt: skip


def test_the_gain_of_another_pre_training_is_over_the_same_random_weights(capsys):
    entries = [
        {"dataset": "Dataset900_Noise", "arm": arm, "seed": seed, "steps": steps, "dice": dice}
        for arm, steps, values in (("ViT", 0, (0.5, 0.6)), ("ViT, pre-training mirrored along z", 9, (0.7, 0.6)))
        for seed, dice in enumerate(values)
    ]
    import_module("ablation").print_table(entries)
    *_, untrained, trained = capsys.readouterr().out.splitlines()
    assert "+" not in untrained
    assert "| +0.100 |" in trained


@pytest.mark.parametrize(("visible", "hidden", "expected"), [(13, 26, (8, 24)), (5, 8, (5, 8)), (16, 0, (16, 0))])
def test_batches_on_a_gpu_have_one_of_few_numbers_of_tokens(visible, hidden, expected):
    benchmark = import_module("ablation")
    order = torch.arange(visible + hidden).repeat(3, 1)
    masks = benchmark.Masks(order[:, :visible], order[:, visible:], torch.ones(3, hidden, dtype=torch.bool))
    few = benchmark.in_few_shapes(masks, 8)
    assert tuple(part.shape[1] for part in few[:2]) == expected
    assert few.counted.shape == few.hidden.shape
    assert few.hidden.tolist() == order[:, visible : visible + expected[1]].tolist()


@given(inside=arrays(bool, (2, 7)), token=st.integers(1, 4), other=arrays(bool, (2, 5)))
@settings(max_examples=30, deadline=None)
def test_tokens_are_covered_that_hold_a_voxel_of_the_volume(inside, token, other):
    found = import_module("packed").covered([inside, other, other], (token, 2, 5))
    voxels = torch.from_numpy(inside[:, :, None, None] & other[:, None, :, None] & other[:, None, None, :])
    expected = patchify(padded(voxels[:, None].float(), (token, 2, 5)), (token, 2, 5)).amax(dim=(2, 3)) > 0
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("block", [{"optimizer": "sgd"}, {"optimizer": "SGD", "network": {"size": "XS"}}])
def test_an_arm_with_an_optimizer_that_it_would_not_get_is_refused(block):
    benchmark = import_module("ablation")
    for taken in ({}, {"optimizer": "SGD"}, {"optimizer": "AdamW", "network": {}}):
        benchmark.arm_of("taken", taken, Settings())
    with pytest.raises(UserError, match="The arm refused has the optimiser"):
        benchmark.arm_of("refused", block, Settings())


@pytest.mark.parametrize(("block", "kind", "peak"), [({"optimizer": "SGD"}, "SGD", 1e-2), ({}, "AdamW", 3e-4)])
def test_an_arm_learns_by_the_optimizer_that_it_names(block, kind, peak):
    benchmark, network = import_module("ablation"), nn.Linear(2, 3)
    descent = benchmark.descent_of(network, benchmark.arm_of("arm", block, Settings()), pretrained=False)
    assert type(descent.optimizer).__name__ == kind
    assert max(map(descent.rate, np.linspace(0, 1, 101))) == pytest.approx(peak)
    assert descent.rate(1.0) == pytest.approx(0)
    descent.step(network, network(torch.ones(1, 2)).square().sum(), 0.0 if kind == "SGD" else 0.05)
    assert descent.optimizer.param_groups[0]["lr"] == pytest.approx(peak)


def test_sgd_has_nnunets_weights_of_resolutions():
    loss, target = import_module("ablation").nnunet_loss, torch.zeros(2, 4, 8, 6, dtype=torch.long)
    logits = [torch.randn(2, 3, 4 >> level, 8 >> level, 6 >> level) for level in range(3)]
    parts = [segmentation_loss(part, torch.zeros(2, *part.shape[2:], dtype=torch.long)) for part in logits]
    torch.testing.assert_close(loss(logits, target), (parts[0] * 2 + parts[1]) / 3)
    torch.testing.assert_close(loss(logits[:1], target), parts[0])


def test_the_time_of_a_command_is_divided_by_what_it_was_spent_on():
    imports = "_find_and_load (<frozen importlib._bootstrap>:1360)"
    samples = [
        f"process 1;<module> (mae3d_quantify:8);{imports} 30",
        "process 1;run (a.py:1);Module._call_impl (torch/nn/modules/module.py:9);linear (torch/nn/functional.py:1) 10",
        "process 2;run_case_npy (default_preprocessor.py:1);resample_data_or_seg_to_shape (resampling.py:2) 4",
        "process 2;export_prediction_from_logits (e.py:3);resample_data_or_seg_to_shape (resampling.py:2) 6",
        "process 1;main (quantify.py:1);sorted (quantify.py:4) 2",
    ]
    assert import_module("shares").seconds_by_kind(samples) == {
        "imports": 1.5,
        "network": 0.5,
        "preprocessing of images": 0.2,
        "resampling and writing of predictions": 0.3,
        "all else": 0.1,
    }


def test_calibration_gives_the_volumes_that_a_timid_network_misses():
    """Its probabilities are right in their order but a third of what they should be."""
    quality = import_module("quality")

    def case(seed: int):
        labels = np.random.default_rng(seed).integers(0, 2, (9, 8, 7))
        foreground = np.where(labels == 1, 0.3, 0.1)
        return quality.Predicted(np.stack([1 - foreground, foreground]), labels)

    known = [case(seed) for seed in range(4)]
    shifts, cutoffs = quality.fitted_shifts(known, classes=2), quality.risk_cutoffs(known, classes=2)
    full = next(one for one in map(case, range(4, 99)) if one.labels.sum() > cutoffs[0][-1])
    assert quality.quality_of([full], [0.0], cutoffs) == quality.Quality(0.0, 1.0, 0.0)
    assert quality.quality_of([full], shifts, cutoffs) == quality.Quality(1.0, 0.0, 1.0)
    assert math.isnan(quality.quality_of([full], shifts, quality.risk_cutoffs(known[:1], classes=2)).risk_groups)


def test_recorded_steps_share_their_memory_and_those_of_an_earlier_network_are_gone(monkeypatch):
    pools, alive, handles = [], [], iter("ab")

    def record(module, examples, *, pool, **_):
        def repeat(*arguments):  # as of torch before 2.15: the module holds what holds the module
            return type(module).forward(module, *arguments)

        module.forward = repeat
        pools.append(pool)
        alive.append(sum(earlier() is not None for earlier in recorded))
        recorded.append(weakref.ref(module))
        return module

    recorded: list = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    for _ in range(2):
        repeated = import_module("graphs").Repeated(nn.Linear(2, 1), torch.device("cuda"))
        for length in (3, 4, 3):
            assert repeated(torch.ones(length, 2)).shape == (length, 1)
        del repeated
    assert pools == ["a", "a", "b", "b"]
    assert alive == [0, 1, 0, 1]


def test_windows_of_a_network_that_sees_voxels_give_its_probabilities():
    quality = import_module("quality")
    labels = torch.zeros(1, 9, 12, 7, dtype=torch.uint8)
    labels[0, 2:5] = 1
    volumes = torch.randn(labels.shape).half()
    packed = import_module("packed").Packed("noise", volumes, labels, np.array([[9, 11, 7]]), (4, 6, 8), [])
    predicted = quality.predict(packed, lambda volume: torch.cat([torch.zeros_like(volume), volume], dim=1), 0)
    expected = volumes[0, :, :11].float().sigmoid().numpy()
    np.testing.assert_allclose(predicted.probabilities, np.stack([1 - expected, expected]), rtol=1e-5)
    assert np.array_equal(predicted.labels, labels[0, :, :11])


def test_the_probe_finds_what_tokens_tell():
    benchmark = import_module("ablation")

    class Told:  # each token's vector holds the class's share of it, among others
        def eval(self): ...

        def encode(self, image, taps):
            tokens = patchify(image, (4, 4, 4)).mean(dim=3)[..., 0]
            return SimpleNamespace(tokens=torch.stack([tokens, torch.rand_like(tokens)], dim=2))

    labels = torch.from_numpy(np.random.default_rng(0).random((4, 8, 16, 12)) < 0.3).byte()
    sizes = np.array([labels.shape[1:]] * 4)
    packed = import_module("packed").Packed("noise", labels.half(), labels, sizes, (8, 16, 12), [])
    split = benchmark.Split([0, 1], [], [2, 3], [])
    settings = Settings.from_dict({"network": {"token": [4, 4, 4]}})
    assert benchmark.probe_of(packed, Told(), settings, split) > 0.99
    shuffled = dataclasses.replace(packed, volumes=torch.rand(labels.shape).half())
    assert benchmark.probe_of(shuffled, Told(), settings, split) < 0.1
