"""Test that every benchmark can be imported, and that what it measures runs at a small scale."""

import argparse
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest

from nnunet_vit_mae.errors import UserError
from nnunet_vit_mae.settings import Finetuning, Network, Pretraining

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
@pytest.mark.parametrize("name", ["ours", "MONAI"])
def test_a_step_of_pretraining_runs_beside_monais(name):
    benchmark = import_module("pretraining_step")
    benchmark.step_of(name, benchmark.Case(24, 8, 2), "XS", benchmark.torch.device("cpu"))()


def test_contrasts_are_compared():
    arguments = argparse.Namespace(size="XS", side=16, token=8, batch=2, rounds=1)
    padding, ratio = import_module("contrasts").compare([2, 1], arguments)
    assert 0 < padding < 0.5
    assert ratio > 0


def test_growth_takes_a_step_for_tokens_and_one_for_contrasts():
    benchmark = import_module("growth")
    benchmark.step_of_tokens("XS", 0)()
    benchmark.step_of_contrasts("XS", 1)()


def test_growth_with_the_number_of_cases_is_printed(monkeypatch, capsys):
    benchmark = import_module("growth")
    monkeypatch.setattr(benchmark, "CASES", [10, 20])
    benchmark.cases()
    assert "| 20 |" in capsys.readouterr().out


def test_the_loader_yields_the_samples_of_a_batch(tmp_path):
    file = tmp_path / "case.b2nd"
    blosc2.asarray(np.ones((1, 9, 9, 9), dtype=np.float32), urlpath=str(file), mode="w")
    settings = SimpleNamespace(network=Network(size="XS", token=(4, 4, 4)), pretraining=Pretraining())
    batches = import_module("loader").our_batches(
        SimpleNamespace(settings=settings), [file], (8, 8, 8), crops=2, masks=3
    )
    assert next(batches) == 2 * 2 * 3  # of a batch of two volumes


def test_an_arm_whose_choice_an_ablation_would_not_read_is_refused():
    benchmark = import_module("ablation")
    benchmark.refuse_ignored("free", Finetuning(layer_decay=1.0, freeze_epochs=3, lr=1e-3))
    with pytest.raises(UserError, match=r"The arm dice sets finetuning\.loss, which this benchmark does not read"):
        benchmark.refuse_ignored("dice", Finetuning(loss="dice"))
