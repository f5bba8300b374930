"""Two processes train as one: real ones, joined by gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
import updating
from safetensors.torch import load_file

TESTS = Path(__file__).parent
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLACES = os.pathsep.join([str(TESTS.parent), str(TESTS)])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What updating.py keeps in two processes."""
    folder = tmp_path_factory.mktemp("two")
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": PLACES}
    command = [sys.executable, *LAUNCH, TESTS / "updating.py", folder]
    process = children.start(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        children.end(process)
    assert process.returncode == 0, out
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", updating.ALGORITHMS)
def test_the_gradients_of_an_update_are_those_of_one_process(place, tmp_path, algorithm):
    """Of the same eight pairs of samples and steps, four in each process."""
    one = updating.gradients(tmp_path / "one", algorithm)
    two = [load_file(place / f"{algorithm}-{rank}.safetensors") for rank in (0, 1)]
    assert all(torch.equal(two[0][name], two[1][name]) for name in one), "the processes stay the same"
    assert min(gradient.abs().max() for gradient in one.values()) > 1e-6
    for name, gradient in one.items():
        # sums of eight terms in another order, in float32
        torch.testing.assert_close(two[0][name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", updating.RUNS)
def test_a_few_epochs_are_those_of_one_process(place, tmp_path, name):
    """With guards, their levels, groups, the KL's controller, the critic's history and what the alarm sees."""
    one = updating.epochs(tmp_path / "one", name)
    two = [load_file(place / f"{name}-{rank}.safetensors") for rank in (0, 1)]
    assert one.keys() == two[0].keys() == two[1].keys()
    assert "epoch 3, overoptimisation/fall" in one, "the alarm has something to say"
    for key, value in one.items():
        assert torch.equal(two[0][key], two[1][key]), f"{key}: the processes stay the same"
        # float32 sums in another order, through nine updates: measured up to 2e-8 of a weight, 1e-4 of a metric
        torch.testing.assert_close(two[0][key], value, rtol=3e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
