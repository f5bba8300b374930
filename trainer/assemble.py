"""Builds a training from a configuration: the accelerator, the rewards, the model."""

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType

from comfy_tdpo import arithmetic, compiling
from comfy_tdpo.models import load_model
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rewards import load_reward, load_rewards
from comfy_tdpo.rewards.gradients import check_functions
from comfy_tdpo.shapes import MODELS

from .config import TrainConfig
from .config.loadable import check_loadable
from .recommend.options import held_out_reward
from .run import RunFolder
from .run.tastes import weights_of
from .state import Watch
from .training import Training

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def assemble(
    config: TrainConfig,
    run: RunFolder,
    stop: threading.Event | None = None,
    watch: Watch = lambda phase, done, total: None,
    make_policy: Callable[[TrainConfig, torch.device], DiffusionPolicy] | None = None,
    cpu: bool = False,
) -> Training:
    """Load what `config` names and build the training from it.

    Args:
        make_policy: makes the policy from a model that the caller holds, instead of loading `config.model`.
        cpu: train on the CPU, even if there are other devices.

    Raises:
        ValueError: something it names cannot be loaded; nothing has been trained or written.
    """
    arithmetic.prepare(config.deterministic)  # before the first look at a GPU
    # accelerate's mixed precision is process-wide, so each policy sets its own.
    accelerator = Accelerator(cpu=cpu, log_with=check_trackers(config.output.trackers), project_dir=str(run.path))
    _check_processes(accelerator.num_processes)
    _check_not_sharded(accelerator.distributed_type)
    arithmetic.check(config.deterministic, accelerator.device)
    if config.compile:
        compiling.check(accelerator.device)
    how = (accelerator.device, config.reward_precision, weights_of(run, config))
    if config.output.recommend:
        held_out_reward(config)  # rather now than after the training
    if config.needs_gradient:
        check_functions(config.trained_on, config.algorithm)
    reward = load_rewards(config.rewards, *how, config.reward_scales)
    eval_rewards = {name: load_reward(name, *how) for name in config.measured}
    guards = {name: load_reward(name, *how) for name in config.guards}
    load = partial(load_policy, sharded=config.policy.shard and accelerator.num_processes > 1)
    policy = (make_policy or load)(config, accelerator.device)
    if config.compile:
        policy.compile()
    return Training(config, policy, reward, eval_rewards, run, accelerator, stop, watch, guards)


def _check_processes(found: int) -> None:
    """Raise ValueError for launched processes that are not connected: each would write to the same run."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != found:
        raise ValueError(
            f"got {launched} processes, of which accelerate connects {found}; expected one process, or a GPU for each: "
            "set ACCELERATE_USE_CPU=true to train with several processes without GPUs"
        )


def _check_not_sharded(kind: DistributedType) -> None:
    """Raise ValueError where accelerate is to shard the model, instead of policy.shard."""
    if kind in SHARDED:
        raise ValueError(
            f"got accelerate set to {kind.value}; expected processes that hold the whole model each: turn it off with "
            "accelerate config, or start with torchrun; if one GPU does not hold all weights, set policy.shard to true "
            "(see docs/many-gpus.md)"
        )


def check_trackers(names: list[str]) -> list[str] | None:
    """Accelerate silently drops a tracker whose package is missing; here that is an error."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"got tracker {name!r}; expected one of those installed here ({', '.join(available) or 'none'}): "
                "install its package, for example with pip install tensorboard"
            )
    return names or None


def load_policy(config: TrainConfig, device: torch.device, sharded: bool = False) -> DiffusionPolicy:
    """The policy that `config` describes, on `device`, or to be `sharded` over several."""
    loaded = load_model(model_source(config), DTYPES[config.precision], config.prediction_type)
    return DiffusionPolicy(loaded, **policy_settings(config, device), sharded=sharded)


def model_source(config: TrainConfig) -> str:
    """Where the model of `config` is; raises ValueError if only a ComfyUI graph has it."""
    check_loadable(config, "resume the run")
    return str(MODELS.get(config.model, config.model))


def policy_settings(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The settings of a DiffusionPolicy on `device`; the base model has the dtype DTYPES[config.precision]."""
    dtype = DTYPES[config.precision]
    return {
        "steps": config.steps,
        "guidance": config.guidance,
        "embedded_guidance": config.embedded_guidance,
        "resolution": config.resolution,
        "eval_steps": config.eval_steps,
        "eval_guidance": config.eval_guidance,
        "eval_resolution": config.eval_resolution,
        "settings": config.policy,
        "seed": config.seed,
        "process": config.process,
        "device": device,
        "autocast": None if dtype == torch.float32 else dtype,
    }
