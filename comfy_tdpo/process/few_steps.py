"""Processes for distilled models, which draw an image in 4 to 8 steps: SD-Turbo, SDXL-Turbo, Lightning, Hyper-SD, LCM.

Their steps are evenly spaced from the last timestep on ("trailing"), on which such models were distilled, whatever
spacing the model's own schedule has. The last step ends in the predicted clean latent, without noise. So it has no
density, and policy gradients train the T - 1 steps before it; methods that back-propagate the reward train it too. With
noise, as in DDIM, its little sigma would let it drown the others: at T = 4, in units of its sigma, it moves the latent
ten times as far.

Shapes: T denoising steps.
"""

from dataclasses import replace

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from .ddim import check_discrete, ddim_tables
from .gaussian import TableProcess


def make_few_steps(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> TableProcess:
    """DDIM with eta = 1, which at these timesteps is the ancestral Euler method that Turbo models are sampled with.

    Raises:
        ValueError: the schedule does not have that many steps.
    """
    check_discrete(scheduler)
    trailing = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    process = ddim_tables(trailing, steps, device)
    return replace(
        process,
        next_signal=_with_last(process.next_signal, 1),
        kappa=_with_last(process.kappa, 0),
        sigma=_with_last(process.sigma, 0),
    )


def make_lcm(scheduler: DDIMScheduler, steps: int, device: torch.device | str = "cpu") -> TableProcess:
    """Multistep sampling of latent consistency models (arXiv 2310.04378): each step adds all noise to the clean latent
    anew, x_{k+1} = a_s x_0 + b_s noise.

    Deviation: x_0 is what the model predicts; c_skip and c_out, which are 0 and 1 to 1e-5 from timestep 16 on, are left
    out.

    Raises:
        ValueError: the schedule does not have that many steps.
    """
    process = make_few_steps(scheduler, steps, device)
    sigma = _with_last(process.noise.roll(-1), 0)  # b_s of a step is b_t of the next
    return replace(
        process,
        next_signal=_with_last(process.signal.roll(-1), 1),
        kappa=torch.zeros_like(process.kappa),
        sigma=sigma,
    )


def _with_last(table: Tensor, value: float) -> Tensor:
    """A copy of `table` with another last entry."""
    table = table.clone()
    table[-1] = value
    return table
