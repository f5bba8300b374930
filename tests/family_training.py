"""A training of any family, on a folder with a tiny pipeline: two epochs, whole and stopped after the first."""

import math
from functools import partial
from pathlib import Path

import torch
from toy import lora_of, new_run, same, timeless, toy_training

from comfy_tdpo.models import load_model
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.settings import PolicySettings

SMALL = {"epochs": 2, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 3, "guidance": 3.0}
TRAININGS = [("tdpo-r", "lora"), ("ddpo-100", "lora"), ("draft", "lora"), ("tdpo-r", "full")]  # algorithm, train


def policy_of(
    folder: Path, resolution: str, ema: float, train: str, optimizer: str, dtype: torch.dtype, **settings
) -> DiffusionPolicy:
    trained = PolicySettings(ema=ema, train=train, optimizer=optimizer)
    return DiffusionPolicy(load_model(str(folder), dtype), resolution=resolution, settings=trained, **settings)


def check_training(folder: Path, resolution: str, tmp_path: Path, algorithm: str, train: str) -> None:
    """It trains, its metrics are finite, and it resumes to the last bit."""
    small = SMALL | {"algorithm": algorithm, "policy": {"train": train}}
    small |= {"kl": {"coefficient": 0.1}} if algorithm != "draft" else {"last_steps": 1}
    make = partial(policy_of, folder, resolution)
    whole = toy_training(new_run(tmp_path / "whole", **small), make)
    start = lora_of(whole)
    expected = list(whole.epochs())
    assert all(math.isfinite(value) for line in expected for value in line.values())
    if algorithm != "draft":
        assert [line["policy/ratio_drift"] for line in expected] == [0, 0]
        assert expected[1]["kl/nats"] > 0
    assert not same(start, lora_of(whole))
    run = new_run(tmp_path / "stopped", **small)
    epochs = toy_training(run, make).epochs()
    next(epochs)
    epochs.close()
    resumed = toy_training(run, make)
    list(resumed.epochs())
    assert timeless(run.metrics()) == timeless(expected) and same(lora_of(resumed), lora_of(whole))
