"""What is tested of every family, on a folder with a tiny pipeline: a training of two epochs, and from the first to the
second once more; and that diffusers loads the LoRA."""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toy import lora_of, new_run, same, timeless, toy_training

from comfy_tdpo.models import DiffusionModel, Trainable, denoiser_name, load_model
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.settings import PolicySettings
from comfy_tdpo.trainer.run import RunFolder
from comfy_tdpo.trainer.run.loras import network_of

SMALL = {"epochs": 2, "samples_per_epoch": 4, "samples_per_update": 2, "steps": 3, "guidance": 3.0}
TRAININGS = [("tdpo-r", "lora"), ("ddpo-100", "lora"), ("draft", "lora"), ("tdpo-r", "full")]  # algorithm, train


def policy_of(
    folder: Path, resolution: int | str, ema: float, train: str, optimizer: str, dtype: torch.dtype, **settings
) -> DiffusionPolicy:
    trained = PolicySettings(ema=ema, train=train, optimizer=optimizer)
    return DiffusionPolicy(load_model(str(folder), dtype), resolution=resolution, settings=trained, **settings)


def check_training(folder: Path, resolution: int | str, tmp_path: Path, algorithm: str, train: str) -> None:
    """It trains, its metrics are finite, and it resumes to the last bit."""
    small = SMALL | {"algorithm": algorithm, "policy": {"train": train}}
    small |= {"kl": {"coefficient": 0.1}} if algorithm != "draft" else {"last_steps": 1}
    make = partial(policy_of, folder, resolution)
    run = new_run(tmp_path / "whole", **small)
    whole = toy_training(run, make)
    start = lora_of(whole)
    epochs = whole.epochs()
    expected = [next(epochs)]
    shutil.copytree(run.path, tmp_path / "stopped")
    expected += epochs
    assert all(math.isfinite(value) for line in expected for value in line.values())
    if algorithm != "draft":
        assert [line["policy/ratio_drift"] for line in expected] == [0, 0]
        assert expected[1]["kl/nats"] > 0
    assert not same(start, lora_of(whole))
    assert (folder / network_of(run.latest_lora)).is_dir()  # where the denoiser of a pipeline is
    stopped = RunFolder(tmp_path / "stopped")
    resumed = toy_training(stopped, make)
    assert len(list(resumed.epochs())) == 1
    assert timeless(stopped.metrics()) == timeless(expected) and same(lora_of(resumed), lora_of(whole))


def trained_lora(model: DiffusionModel, **settings: Any) -> Trainable:
    """A LoRA on the model that changes much."""
    lora, generator = model.adapt(PolicySettings(rank=4, **settings), seed=0), torch.Generator().manual_seed(0)
    for name, parameter in lora.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return lora


@torch.no_grad()
def check_lora_in_diffusers(
    model: DiffusionModel,
    pipeline: Any,
    latents: Tensor,
    times: Tensor,
    prompts: list[str],
    path: Path,
    **settings: Any,
) -> None:
    """The whole `pipeline` of the same weights predicts as the trained model once it has loaded the file."""
    lora = trained_lora(model, alpha=7.0, **settings)
    lora.export(path, {})
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    network = getattr(pipeline, denoiser_name(model))
    loaded = {name for name, _ in network.named_parameters() if "lora_" in name}
    assert len(loaded) == len(lora.parameters)
    inputs = latents, times, model.encode(prompts)
    expected = model.denoise(*inputs)
    with lora.reference():
        base = model.denoise(*inputs)
    model.network = network
    # float32: outputs near 1; alpha is multiplied in at another place, 6e-8 a layer
    torch.testing.assert_close(model.denoise(*inputs), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2, "the LoRA must make a difference"
