"""Two processes train as one: real ones, joined by gloo on the CPU. PROCESSES=4 makes it four."""

import os
import signal
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import children
import ending
import pytest
import torch
import updating
from accelerate import Accelerator
from safetensors.torch import load_file

from comfy_tdpo.trainer.assemble import SHARDED, _check_not_sharded
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.checkpoint import load_latest

TESTS = Path(__file__).parent
PROCESSES = int(os.environ.get("PROCESSES", "2"))
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
PLACES = os.pathsep.join([str(TESTS.parent), str(TESTS)])


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What updating.py keeps in several processes."""
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
    """Of the same eight pairs of samples and steps, as many in each process."""
    one = updating.gradients(tmp_path / "one", algorithm)
    several = [load_file(place / f"{algorithm}-{rank}.safetensors") for rank in range(PROCESSES)]
    assert all(torch.equal(other[name], several[0][name]) for other in several for name in one), "they stay the same"
    assert min(gradient.abs().max() for gradient in one.values()) > 1e-6
    for name, gradient in one.items():
        # sums of eight terms in another order, in float32
        torch.testing.assert_close(several[0][name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", updating.RUNS)
def test_a_few_epochs_are_those_of_one_process(place, tmp_path, name):
    """With guards, their levels, groups, the KL's controller, the critic's history and what the alarm sees."""
    one = updating.epochs(tmp_path / "one", name)
    several = [load_file(place / f"{name}-{rank}.safetensors") for rank in range(PROCESSES)]
    assert all(other.keys() == one.keys() for other in several)
    assert "epoch 3, overoptimisation/fall" in one, "the alarm has something to say"
    for key, value in one.items():
        assert all(torch.equal(other[key], several[0][key]) for other in several), f"{key}: the processes stay the same"
        # float32 sums in another order, through nine updates: measured up to 2e-8 of a weight, 1e-4 of a metric
        torch.testing.assert_close(
            several[0][key], value, rtol=3e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("kind", SHARDED)
def test_a_model_that_accelerate_would_shard_is_refused(kind):
    with pytest.raises(ValueError, match=f"got accelerate set to {kind.value}; expected processes that hold the whole"):
        _check_not_sharded(kind)


# --- how they end


@pytest.fixture
def launch(start):
    """Starts ending.py in two processes without a launcher that looks after them."""

    def launch(folder: Path, mode: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": PLACES}
        env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, TESTS / "ending.py", folder, mode]
        return [start(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **out) for rank in ("0", "1")]

    return launch


@pytest.mark.slow
def test_one_that_stops_or_fails_takes_the_other_along_and_all_is_saved(tmp_path, launch, caplog):
    """What is saved resumes to the bit, and on another number of processes up to rounding."""
    one = Accelerator(cpu=True)
    for name in ending.RESUMED:
        list(ending.start(ending.new(tmp_path / "whole" / name, one, name)).epochs())
    ending.begin(tmp_path / "begun by one", one)
    for process in launch(tmp_path, "stop"):
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out
    ending.finish(tmp_path / "begun by several")
    assert "while sampling with processes 2, and resumes with 1: epoch 1 starts over" in caplog.text
    for folder, name, moment in product(("begun by one", "begun by several"), ending.RESUMED, ending.MOMENTS):
        expected = load_file(RunFolder.open(tmp_path / "whole" / name).latest_lora)
        found = load_file(RunFolder.open(tmp_path / folder / name / moment).latest_lora)
        for key, weight in expected.items():
            # as in the epochs above
            torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-6, msg=f"{folder}, {name}, {moment}")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has neither signal")
@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("killed", "the connection to another process is lost"),
        ("frozen", "process 1 has shown no sign of life for 4 s"),
        ("hanging", "process 1 has made no progress for 4 s"),
    ],
)
def test_one_that_is_gone_takes_the_other_along(mode, sentence, tmp_path, launch):
    first, last = launch(tmp_path, mode)
    out, _ = first.communicate(timeout=150)
    assert first.returncode == 1 and sentence in out, out
    run = RunFolder.open(tmp_path / "run")
    _, state = load_latest(run.checkpoints)  # raises an error if it is damaged
    assert state["epoch"] == len(run.metrics()) > 0
    if mode == "frozen":
        last.send_signal(signal.SIGCONT)
    if mode != "killed":
        out, _ = last.communicate(timeout=30)
        assert last.returncode == 1 and (mode == "frozen" or f"{sentence} (raise --hang-limit" in out), out
        assert mode == "frozen" or "it is in hang, line" in out
