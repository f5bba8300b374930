"""A process, family, reward and method can each be added from outside with one registry line, and used in training."""

import threading
from pathlib import Path

import pytest
import torch
from toy import timeless

from comfy_tdpo.methods import ALGORITHMS, Algorithm
from comfy_tdpo.models import FAMILIES
from comfy_tdpo.process import PROCESSES, make_process
from comfy_tdpo.rewards import REWARDS
from comfy_tdpo.trainer.assemble import assemble
from comfy_tdpo.trainer.config import make_config, plain_values, validate
from comfy_tdpo.trainer.run import RunFolder

PLUGIN = "toy_plugins"
SETTINGS = {
    "model": "blobs:1",
    "rewards": {"darkness": 1.0},
    "eval_rewards": [],
    "prompts": "shapes",
    "epochs": 4,
    "samples_per_epoch": 32,
    "samples_per_update": 16,
    "micro_batch": 8,
    "steps": 6,
    "guidance": 1.0,
    "resolution": 8,
    "precision": "fp32",
    "overoptimisation": {"reward": None},
    "policy": {"lr": 2e-2, "max_grad_norm": 1.0},
    "output": {"grid_images": 1},
}


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    """A line in each registry."""
    monkeypatch.setitem(PROCESSES, "quiet-end", f"{PLUGIN}:make_quiet_end")
    monkeypatch.setitem(REWARDS, "darkness", f"{PLUGIN}:Darkness")
    monkeypatch.setitem(
        ALGORITHMS, "through", Algorithm(f"{PLUGIN}:ThroughSampling", f"{PLUGIN}:Settings", "through sampling")
    )
    families = dict(FAMILIES)
    FAMILIES.clear()  # the first that recognizes a model loads it
    FAMILIES.update({"blobs": f"{PLUGIN}:FAMILY"} | families)
    yield
    FAMILIES.clear()
    FAMILIES.update(families)


def train(path: Path, stop_after: int | None = None, **overrides) -> list[dict]:
    """The metrics of a run, new or resumed; with `stop_after`, stopped in mid-epoch after that many updates."""
    run = RunFolder(path)
    if not (path / "config.toml").exists():
        run.create(make_config("shapes", overrides=SETTINGS | overrides))
    stop, updates = threading.Event(), 0

    def watch(phase: str, done: float, total: int) -> None:
        nonlocal updates
        updates += phase == "training" and float(done).is_integer()
        if updates == stop_after:
            stop.set()

    training = assemble(run.config, run, stop, watch, cpu=True)
    list(training.epochs())
    return run.metrics()


@pytest.mark.parametrize("algorithm", ["ddpo-100", "tdpo-r", "through"])
def test_what_is_added_trains(tmp_path, algorithm):
    metrics = train(tmp_path / "run", algorithm=algorithm, process="quiet-end")
    assert len(metrics) == 4 and all("eval" not in key for key in metrics[0])
    rewards = [line["reward/darkness/mean"] for line in metrics]
    assert rewards[-1] > rewards[0]


def test_the_gradient_goes_through_every_step(tmp_path):
    """Nearly black after four epochs; samples of one policy differ by about 0.02 in their mean."""
    rewards = [line["reward/darkness/mean"] for line in train(tmp_path / "run", algorithm="through")]
    assert rewards[-1] - rewards[0] > 0.3


def test_a_method_that_samples_in_its_updates_resumes_to_the_last_bit(tmp_path):
    whole = train(tmp_path / "whole", algorithm="through")
    train(tmp_path / "stopped", stop_after=4, algorithm="through")  # before the second update of the second epoch
    assert len(RunFolder(tmp_path / "stopped").metrics()) == 1
    assert timeless(train(tmp_path / "stopped")) == timeless(whole)
    weights = [(tmp_path / name / "lora" / "latest.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert weights[0] == weights[1]


def test_an_update_that_runs_out_of_memory_keeps_no_sample_twice(tmp_path, monkeypatch):
    from toy_plugins import Darkness

    score, calls = Darkness.score, 0

    def scarce(self, images, prompts):
        nonlocal calls
        calls += 1
        if calls == 2:  # the second micro-batch of the first update
            raise torch.OutOfMemoryError
        return score(self, images, prompts)

    monkeypatch.setattr(Darkness, "score", scarce)
    (metrics,) = train(tmp_path / "run", algorithm="through", epochs=1)
    assert metrics["through/samples"] == SETTINGS["samples_per_epoch"]


def test_steps_without_noise_are_sampled_and_not_trained(tmp_path):
    from comfy_tdpo.models import load_model

    process = make_process("quiet-end", load_model("blobs:1", torch.float32).scheduler, 6, torch.device("cpu"))
    assert process.stochastic.tolist() == [True] * 4 + [False] * 2
    train(tmp_path / "run", algorithm="ddpo-100", process="quiet-end", epochs=1)
    run = RunFolder(tmp_path / "run")
    assert all(value == value for value in run.metrics()[0].values()), "no step without a density makes a NaN"


def test_a_methods_settings_are_its_own(tmp_path):
    config = make_config("shapes", overrides=SETTINGS | {"algorithm": "through", "through": {"weight": 2.0}})
    assert config.through.weight == 2.0
    assert validate(plain_values(config)) == config
    assert "critic" not in plain_values(config)
    with pytest.raises(ValueError, match="critic"):
        make_config("shapes", overrides=SETTINGS | {"algorithm": "through", "critic": {"lr": 1e-3}})
    with pytest.raises(ValueError, match="through"):
        make_config("shapes", overrides=SETTINGS | {"through": {"weight": 2.0}})


def test_a_graphs_critic_is_for_methods_that_have_one():
    """Whatever their names are."""
    from comfy_tdpo.nodes.runs.reward_choice import RewardChoice
    from comfy_tdpo.nodes.runs.settings import Wanted

    critic = {"critic": {"lr": 1e-3}, "neurons": {"every": 2}}
    reward = RewardChoice({"darkness": 1.0})
    with pytest.raises(ValueError, match="got a critic for through, which has none; disconnect"):
        Wanted("blobs:1", "shapes", reward, algorithm="through", critic=critic).config()


def test_help_lists_what_was_added(capsys):
    from comfy_tdpo.trainer.__main__ import main

    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("quiet-end", "darkness", "--through.weight"))
