"""What can be said of a run before its folder is made, without loading anything large.

The training checks all this again on its own thread, where its errors come late: the folder is there by then, and in
the background nobody waits for them.
"""

from typing import Any

import torch

from comfy_tdpo.methods.window import trained_steps
from comfy_tdpo.process import make_process
from comfy_tdpo.resolution import check_multiple
from comfy_tdpo.rewards import has_encoder, load_reward, reward_class
from comfy_tdpo.rewards.remote import is_remote
from comfy_tdpo.tastes.names import is_taste

from ...trainer.assemble import check_trackers
from ...trainer.config import TrainConfig
from ...trainer.recommend.options import held_out_reward
from ...trainer.training import check_warmup

CPU = torch.device("cpu")


def check_run(config: TrainConfig, prompts: list[str], scheduler: Any, process: str, factor: int) -> None:
    """Raise ValueError if a run of `config` could not start.

    scheduler, process: of the model; factor: pixels for each element of a latent.
    """
    check_trackers(config.output.trackers)
    if config.output.recommend:
        held_out_reward(config)
    _check_rewards(config, prompts)
    check_multiple(config.resolution, factor)
    check_multiple(config.drawn_with["resolution"], factor, "eval_resolution")
    _check_steps(config, scheduler, process)


def _check_rewards(config: TrainConfig, prompts: list[str]) -> None:
    """Rewards without files are loaded and asked; the others accept all prompts, or are other programs."""
    with torch.inference_mode(False):
        for name in {*config.trained_on, *config.measured, *config.guards}:
            if not is_taste(name) and not is_remote(name) and not reward_class(name).sources:
                load_reward(name, CPU, weights=config.reward_weights).check_prompts(prompts)
    if getattr(config, "favour_diversity", False) and not any(map(has_encoder, config.trained_on)):
        raise ValueError(
            f"got favour_diversity with reward {' + '.join(config.trained_on)!r}, which has no image encoder; expected "
            "a training reward that has one: choose another, or set favour_diversity to false"
        )


def _check_steps(config: TrainConfig, scheduler: Any, process: str) -> None:
    """The steps of the process, which of them are trained, and whether the updates suffice for the warm-up."""
    made, _ = (
        make_process(config.process or process, scheduler, steps, CPU)
        for steps in (config.steps, config.drawn_with["steps"])
    )
    updates = config.samples_per_epoch // config.samples_per_update
    if hasattr(config.policy, "train_share"):
        trained = int(trained_steps(config.policy, made.stochastic, config.seed, epoch=1).sum())
        updates *= trained if getattr(config, "updates", "timestep") == "timestep" else 1
    check_warmup(config, updates)
