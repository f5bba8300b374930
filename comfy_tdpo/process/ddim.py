"""DDIM with eta = 1 (arXiv 2010.02502, Eq. 12 and 16) as a Gaussian process.

Deviations from diffusers' DDIMScheduler: the step before the first training timestep is timestep 0 whatever
`set_alpha_to_one` says, so that the last step keeps its variance and its log-probability exists, as in the authors'
code.
"""

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .gaussian import TableProcess


def make_ddim(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> TableProcess:
    """DDIM with eta = 1 over `steps` steps of the model's own noise schedule, on `device`.

    Raises:
        ValueError: the schedule does not have that many steps, or one of them is without noise.
    """
    process = ddim_tables(scheduler, steps, device)
    if not process.stochastic.all():
        position = int(process.stochastic.int().argmin())
        raise ValueError(
            f"got a schedule whose step {position + 1} of {steps} has no noise, so that its log-probability does not "
            "exist; expected sigma > 0 everywhere: set steps_offset to 1 in the model's scheduler_config.json (it is "
            f"{scheduler.config.steps_offset}) or choose other steps"
        )
    return process


def ddim_tables(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> TableProcess:
    """The same, with steps that have no noise where the schedule has such."""
    config = scheduler.config
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"got {steps} denoising steps; expected 1 to {config.num_train_timesteps}")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.cpu().long()
    if timesteps.max() >= config.num_train_timesteps:
        raise ValueError(
            f"got {steps} denoising steps, which with steps_offset {config.steps_offset} begin beyond the "
            f"{config.num_train_timesteps} the model was trained on; expected fewer"
        )
    previous = (timesteps - config.num_train_timesteps // steps).clamp(min=0)
    alpha_bar, alpha_bar_prev = scheduler.alphas_cumprod[timesteps], scheduler.alphas_cumprod[previous]
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


def step_sigma(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """sigma_k of Eq. 2 at eta = 1 (DDIM, Eq. 16 of arXiv 2010.02502)."""
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    return variance.clamp(min=0).sqrt()
