"""A training small enough for a test: a tiny random policy and a simple reward."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tint import TintModel
from torch import Tensor

from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.trainer.assemble import DTYPES
from comfy_tdpo.trainer.config import TrainConfig, config_class, make_config
from comfy_tdpo.trainer.run import EpochMetrics, RunFolder
from comfy_tdpo.trainer.training import Training

SETTINGS = {
    "algorithm": "tdpo-r",
    "epochs": 3,
    "samples_per_epoch": 8,
    "samples_per_update": 4,
    "micro_batch": 2,
    "steps": 3,
    "eval_rewards": [],
    "neurons": {"every": 2},
    "moments": {"min_count": 2},
    "overoptimisation": {"reward": None},
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


class Contrast(Brightness):
    """The deviation of an image's pixels; a guard."""

    name = "contrast"

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.std(dim=(1, 2, 3))


def toy_config(**overrides) -> TrainConfig:
    """The preset `shapes` at toy size, as far as the algorithm has these settings; `overrides` are nested values."""
    known = config_class(overrides.get("algorithm", SETTINGS["algorithm"])).model_fields
    merged = {name: value for name, value in SETTINGS.items() if name in known}
    for name, value in overrides.items():
        merged[name] = merged.get(name, {}) | value if isinstance(value, dict) else value
    return make_config(overrides=merged)


def new_run(path: Path, **overrides) -> RunFolder:
    return RunFolder(path).create(toy_config(**overrides))


def toy_training(
    run: RunFolder, make_policy, stop=None, watch=lambda phase, done, total: None, held_out=None
) -> Training:
    config = run.config
    policy = make_policy(
        steps=config.steps,
        guidance=config.guidance,
        eval_steps=config.eval_steps,
        eval_guidance=config.eval_guidance,
        seed=config.seed,
        ema=config.policy.ema,
        train=config.policy.train,
        optimizer=config.policy.optimizer,
        dtype=DTYPES[config.precision],
        autocast=None if config.precision == "fp32" else DTYPES[config.precision],
    )
    reward = Brightness()
    guards = dict(
        list({"contrast": Contrast(), "again": reward}.items())[: len(config.guards)]
    )  # not in order of names
    held_out = {"again": reward} if held_out is None else held_out
    return Training(config, policy, reward, held_out, run, Accelerator(cpu=True), stop, watch, guards)


def fast_training(
    run: RunFolder, reward=None, *, guards=None, trained=False, stop=None, watch=lambda phase, done, total: None
) -> Training:
    """A training whose model has one layer; `trained` gives it a LoRA that is not zero."""
    policy = DiffusionPolicy(TintModel(), steps=run.config.steps, guidance=1.0, resolution=8)
    if trained:
        for i, parameter in enumerate(policy.parameters):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return Training(run.config, policy, reward or Brightness(), {}, run, Accelerator(cpu=True), stop, watch, guards)


def drifts(training: Training) -> list[float]:
    """The ratio drift reported after the first update of sampled trajectories, and after the second."""
    found = []
    for group in training.method.groups(1)[:2]:
        training.method.update(group)
        training.context.progress.updates += 1
        found.append(training.context.progress.maxima["policy/ratio_drift"].item())
    return found


def timeless(metrics: list[EpochMetrics]) -> list[EpochMetrics]:
    """The metrics but for what depends on the machine's mood."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in metrics]


def lora_of(training: Training) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in training.policy.parameters]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
