"""Test that torch.compile makes one graph of forward pass and loss; no compiler and no GPU is needed to know it.

And that pre-training uses it as the settings say: the same losses, and the same names in what is saved.
"""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, cast

import compiled_graphs
import pytest
import torch

from nnunet_vit_mae.pretraining import loss
from nnunet_vit_mae.pretraining.job import PretrainingJob
from nnunet_vit_mae.settings import Network, Pretraining


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", Path(compiled_graphs.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture
def graphs(outcome) -> dict[str, int]:
    return outcome["graphs"]


@pytest.mark.parametrize("name", sorted(compiled_graphs.CASES.keys() - {"branching", "numbers of tokens"}))
def test_forward_pass_and_loss_are_one_graph_for_all_batches_of_a_shape(graphs, name):
    assert graphs[name] == 1


def test_a_branch_on_a_value_is_not_one_graph(graphs):
    assert graphs["branching"] == 0  # so the others can fail


def test_any_number_of_tokens_takes_no_more_than_a_second_graph(graphs):
    assert graphs["numbers of tokens"] == 2


def test_a_step_on_a_gpu_computes_nothing_on_the_cpu(outcome):
    """Of such a graph torch would make no CUDA graph, and say nothing."""
    assert outcome["on the host"] == []


def test_a_run_that_goes_on_compiled_has_the_losses_and_the_names_of_an_eager_one(outcome):
    eager, other = outcome["runs"]["eager"], outcome["runs"]["resumed"]
    assert other["losses"] == pytest.approx(eager["losses"], rel=1e-5)
    assert other["names"] == eager["names"]
    assert eager["graphs"] == 0
    assert other["graphs"] == 2  # for one number of tokens, and for any other
    assert "compiled in" in other["log"]
    assert "continuing after epoch 1" in other["log"]


def test_without_a_compiler_a_run_goes_on_and_says_so_in_one_line(outcome):
    eager, without = outcome["runs"]["eager"], outcome["runs"]["without a compiler"]
    assert without["losses"] == eager["losses"]
    assert without["log"].count("cannot be compiled here, so steps take longer (Cannot find a compiler)") == 1
    assert len(without["log"].splitlines()) == len(eager["log"].splitlines()) + 1


def test_without_a_compiler_a_run_that_has_to_be_compiled_is_refused(outcome):
    assert outcome["runs"]["refused"]["error"] == (
        "pretraining.compile is on, but the network cannot be compiled here (Cannot find a compiler): set it to auto."
    )


def test_what_a_compiler_that_failed_has_made_is_given_back_at_once(monkeypatch):
    """Of a GPU whose memory was too small for compiling, the eager steps need all."""
    made = []

    def step(*_):
        activations = torch.ones(3)
        made.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(loss, "_pays", lambda *_: True)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    monkeypatch.setattr(loss, "loss_of_step", step)
    job, module, example = job_of(Network(size="XS")), cast(Any, torch.nn.Linear(1, 1)), cast(Any, lambda: None)
    gc.disable()
    try:
        found = loss.compiled_where_it_pays(module, job, 0, torch.device("cpu"), example)
    finally:
        gc.enable()
    assert found is module
    assert [activations() for activations in made] == [None]


@pytest.mark.parametrize(
    ("device", "epoch", "changes", "pays"),
    [
        ("cuda", 0, {}, True),
        ("cuda", 1, {}, False),  # too few steps are left
        ("cpu", 0, {}, False),
        ("cpu", 0, {"compile": "on"}, True),
        ("cuda", 0, {"compile": "off"}, False),
        ("cpu", loss.LEAST_STEPS, {"compile": "on"}, False),  # nothing is left to do
    ],
)
def test_what_is_compiled_by_itself(device, epoch, changes, pays):
    job = job_of(Network(size="XS"), **changes)
    assert loss._pays(job, epoch, torch.device(device)) == pays


def test_networks_for_each_contrast_on_its_own_are_not_compiled():
    assert not loss._pays(job_of(Network(size="XS", adaptive=True)), 0, torch.device("cuda"))


def job_of(network: Network, **protocol: Any) -> PretrainingJob:
    return PretrainingJob(
        files=[Path("case.b2nd")],
        channel_names=["CT"],
        patch_size=(8, 8, 8),
        spacing=(1.0, 1.0, 1.0),
        network=network,
        protocol=Pretraining(epochs=loss.LEAST_STEPS, **protocol),
    )
