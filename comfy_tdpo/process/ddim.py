"""DDIM with eta = 1 (arXiv 2010.02502, Eq. 12 and 16) as a Gaussian process.

Deviations from diffusers' DDIMScheduler:
- each step ends at the next step's timestep, whereas diffusers subtracts a fixed distance. The last step ends at
  timestep 0 whatever `set_alpha_to_one` says, as in the authors' code, so that it keeps its variance and has a
  log-probability;
- "linspace" spaces timesteps as diffusers' multistep solvers do (DPM-Solver, UniPC, DEIS). DDIM's own linspace includes
  timestep 0, and a step from there has no noise;
- "trailing" gives the requested number of timesteps. In some cases, such as 61 steps, diffusers rounds to one more.

Shapes: T denoising steps.
"""

from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .flow_schedule import FlowSchedule
from .gaussian import TableProcess


def make_ddim(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> TableProcess:
    """DDIM with eta = 1 over `steps` steps of the model's own noise schedule, on `device`.

    Raises:
        ValueError: the schedule does not have that many steps, or one of them has no noise.
    """
    process = ddim_tables(scheduler, steps, device)
    if not process.stochastic.all():
        config, position = scheduler.config, int(process.stochastic.int().argmin())
        remedy = f"choose at most {config.num_train_timesteps // 2} steps"
        if config.timestep_spacing == "leading" and config.steps_offset == 0:
            remedy = "set steps_offset to 1 in the model's scheduler_config.json (it is 0)"
        raise ValueError(
            f"got a schedule whose step {position + 1} of {steps} has no noise, so its log-probability does not "
            f"exist; expected sigma > 0 at every step: {remedy}"
        )
    return process


def ddim_tables(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> TableProcess:
    """The same, but steps without noise are allowed."""
    check_discrete(scheduler)
    config = scheduler.config
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"got {steps} denoising steps; expected 1 to {config.num_train_timesteps}")
    timesteps = spaced_timesteps(scheduler, steps)
    if timesteps.max() >= config.num_train_timesteps:
        raise ValueError(
            f"got {steps} denoising steps, which with steps_offset {config.steps_offset} start beyond the "
            f"{config.num_train_timesteps} timesteps the model was trained on; expected fewer"
        )
    following = torch.cat([timesteps[1:], torch.zeros(1, dtype=torch.int64)])
    alpha_bar, alpha_bar_prev = scheduler.alphas_cumprod[timesteps], scheduler.alphas_cumprod[following]
    if alpha_bar.min() <= 0 and config.prediction_type == "epsilon":
        raise ValueError(
            f"got prediction_type epsilon on a schedule with zero terminal SNR (rescale_betas_zero_snr): at timestep "
            f"{timesteps[0]} the latent is pure noise, and predicting that noise gives no image; expected "
            "prediction_type v_prediction: set it if the model was trained that way; otherwise set "
            "rescale_betas_zero_snr to false or timestep_spacing to leading in the model's scheduler_config.json"
        )
    sigma = step_sigma(alpha_bar, alpha_bar_prev)
    return TableProcess(
        times=timesteps.to(device),
        signal=alpha_bar.sqrt().to(device),
        noise=(1 - alpha_bar).sqrt().to(device),
        next_signal=alpha_bar_prev.sqrt().to(device),
        kappa=(1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt().to(device),
        sigma=sigma.to(device),
        prediction_type=config.prediction_type,
    )


def check_discrete(scheduler: Any) -> None:
    """Raise ValueError if the model's schedule is one of flow matching."""
    if isinstance(scheduler, FlowSchedule):
        raise ValueError(
            "got a process for discrete noise levels and a model of flow matching; expected flow-ddim, flow-sde or "
            "cps: choose another process, or none for the model's own"
        )


def spaced_timesteps(scheduler: DDIMScheduler, steps: int) -> Tensor:
    """The timesteps, int64 (T,), from noisy to clean, spaced by the scheduler's `timestep_spacing`."""
    config = scheduler.config
    if config.timestep_spacing == "linspace":
        points = np.linspace(0, config.num_train_timesteps - 1, steps + 1).round()[:0:-1]
        return torch.from_numpy(points.astype(np.int64))
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.cpu().long()[:steps]


def step_sigma(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """sigma_k of Eq. 2 at eta = 1 (DDIM, Eq. 16 of arXiv 2010.02502)."""
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    return variance.clamp(min=0).sqrt()
