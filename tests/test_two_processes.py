"""Two processes train as one: real ones, joined by gloo on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import updating
from safetensors.torch import load_file

TESTS = Path(__file__).parent
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PLACES = os.pathsep.join([str(TESTS.parent), str(TESTS)])


@pytest.mark.slow
def test_the_gradients_of_an_update_are_those_of_one_process(tmp_path, start):
    """Of the same eight pairs of samples and steps, four in each process."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": PLACES}
    command = [sys.executable, *LAUNCH, TESTS / "updating.py", tmp_path]
    process = start(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    for algorithm in updating.ALGORITHMS:
        one = updating.gradients(tmp_path / "one", algorithm)
        two = [load_file(tmp_path / f"{algorithm}-{rank}.safetensors") for rank in (0, 1)]
        assert all(torch.equal(two[0][name], two[1][name]) for name in one), "the processes stay the same"
        assert min(gradient.abs().max() for gradient in one.values()) > 1e-6
        for name, gradient in one.items():
            # sums of eight terms in another order, in float32
            torch.testing.assert_close(two[0][name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())
