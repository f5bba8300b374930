"""From a configuration to a training: the accelerator, the rewards, the model."""

import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from comfy_tdpo.models.components import load_components
from comfy_tdpo.policy import DiffusionPolicy
from comfy_tdpo.rewards import encoder_name, load_reward, load_rewards
from comfy_tdpo.shapes import WORLD

from .config import TrainConfig
from .run import RunFolder
from .state import Watch
from .training import Training

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def assemble(
    config: TrainConfig,
    run: RunFolder,
    stop: threading.Event | None = None,
    watch: Watch = lambda phase, done, total: None,
    make_policy: Callable[[TrainConfig, torch.device], DiffusionPolicy] | None = None,
    cpu: bool = False,
) -> Training:
    """Load what `config` names and put it together.

    Args:
        make_policy: makes the policy where it is not `config.model` that is trained, but what the caller holds.
        cpu: train there, whatever other devices there are.

    Raises:
        ValueError: something it names cannot be had; nothing was trained or written.
    """
    # Precision is the policy's own: accelerate's would be one for all runs of a process.
    accelerator = Accelerator(cpu=cpu, log_with=_trackers(config.output.trackers), project_dir=str(run.path))
    _check_processes(accelerator.num_processes)
    how = (accelerator.device, config.reward_precision, config.reward_weights)
    reward = load_rewards(config.rewards, *how, config.reward_scales)
    eval_rewards = {name: load_reward(name, *how) for name in config.eval_rewards}
    policy = (make_policy or load_policy)(config, accelerator.device)
    training = Training(config, policy, reward, eval_rewards, run, accelerator, stop, watch)
    if training.encoder is not None:
        logger.info("the critic reads images by the encoder of %s", encoder_name(training.encoder))
    return training


def _check_processes(found: int) -> None:
    """A launcher's processes that do not know of each other would all write to one run."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != found:
        raise ValueError(
            f"got {launched} processes of which accelerate joins {found}; expected one, or a GPU for each: set "
            "ACCELERATE_USE_CPU=true to have them train together without GPUs"
        )


def _trackers(names: list[str]) -> list[str] | None:
    """Accelerate drops a tracker whose package is missing without a word; here that is an error."""
    available = [str(tracker) for tracker in get_available_trackers()]
    for name in names:
        if name not in available:
            raise ValueError(
                f"got tracker {name!r}; expected one of those installed here ({', '.join(available) or 'none'}): "
                "install its package, as pip install tensorboard"
            )
    return names or None


def load_policy(config: TrainConfig, device: torch.device) -> DiffusionPolicy:
    """The policy that `config` describes, on `device`."""
    if config.model.startswith("comfyui:"):
        raise ValueError(f"got {config.model!r}, a MODEL of ComfyUI's, which only its own graph has: go on there")
    model = str(WORLD / "pipeline") if config.model == "shapes" else config.model
    components = load_components(model, DTYPES[config.precision], config.prediction_type)
    return DiffusionPolicy.from_components(components, **policy_settings(config, device))


def policy_settings(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """The settings of a DiffusionPolicy on `device` as `config` has them; the base model comes in DTYPES."""
    dtype = DTYPES[config.precision]
    return {
        "steps": config.steps,
        "guidance": config.guidance,
        "resolution": config.resolution,
        "rank": config.policy.rank,
        "alpha": config.policy.alpha,
        "targets": config.policy.targets,
        "seed": config.seed,
        "device": device,
        "autocast": None if dtype == torch.float32 else dtype,
        "gradient_checkpointing": config.policy.gradient_checkpointing,
    }
