"""Test that torch.compile makes one graph of forward pass and loss; no compiler and no GPU is needed to know it."""

import json
import subprocess
import sys
from pathlib import Path

import compiled_graphs
import pytest


@pytest.fixture(scope="module")
def graphs() -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", Path(compiled_graphs.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(compiled_graphs.CASES.keys() - {"branching"}))
def test_forward_pass_and_loss_are_one_graph_for_all_batches_of_a_shape(graphs, name):
    assert graphs[name] == 1


def test_a_branch_on_a_value_is_not_one_graph(graphs):
    assert graphs["branching"] == 0  # so the others can fail
