"""A training small enough for a test: a tiny random policy and a simple reward."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from comfy_tdpo.trainer.config import TrainConfig, make_config
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder
from comfy_tdpo.trainer.training import Training

SETTINGS = {
    "epochs": 3,
    "samples_per_epoch": 8,
    "samples_per_update": 4,
    "micro_batch": 2,
    "steps": 3,
    "eval_rewards": [],
    "neurons": {"every": 2},
    "moments": {"min_count": 2},
    "output": {"grid_images": 2, "samples_every": 2},
}


class Brightness:
    """The mean of an image; its encoder is the image itself, averaged down."""

    name = "brightness"
    embed_dim = 48
    differentiable = True

    def embed(self, images: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(images, 4).flatten(1), dim=-1)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3))

    def check_prompts(self, prompts: list[str]) -> None:
        pass


def toy_config(**overrides) -> TrainConfig:
    """The preset `shapes` at toy size; `overrides` are nested values."""
    merged = dict(SETTINGS)
    for name, value in overrides.items():
        merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    return make_config(overrides=merged)


def new_run(path: Path, **overrides) -> RunFolder:
    return RunFolder(path).create(toy_config(**overrides))


def toy_training(run: RunFolder, make_policy, stop=None, watch=lambda phase, done, total: None) -> Training:
    config = run.config
    policy = make_policy(
        steps=config.steps,
        guidance=config.guidance,
        eval_guidance=config.eval_guidance,
        seed=config.seed,
        ema=config.policy.ema,
    )
    reward = Brightness()
    return Training(config, policy, reward, {"again": reward}, run, Accelerator(cpu=True), stop, watch)


def timeless(metrics: list[EpochMetrics]) -> list[EpochMetrics]:
    """The metrics but for what depends on the machine's mood."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in metrics]


def lora_of(training: Training) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in training.policy.parameters]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
