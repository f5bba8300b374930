"""Processes of flow-matching models, whose network predicts v = eps - x_0 of x_t = (1 - t) x_0 + t eps.

A step goes from the noise level t to s < t. The last one, s = 0, ends in the predicted clean latent, without noise. So
it has no density, and policy gradients train the T - 1 steps before it.

Deviations:
- the levels are those of ComfyUI's scheduler "simple" and of FLUX.1's pipeline. SD 3's pipeline in diffusers shifts
  them twice and ends on t = 0.009 before 0: the step onto it would drown the others;
- Flow-GRPO gives its last step noise, which stays in the image; CPS's own code leaves the normaliser out of the
  density.

Shapes: T denoising steps. Tables are computed in float64 on the CPU.
"""

import math

import torch
from torch import Tensor

from .flow_schedule import DynamicShift, FlowSchedule
from .gaussian import TableProcess

SDE_LEVEL = 0.7  # a of Flow-GRPO's code for SD 3.5
CPS_LEVEL = 0.7  # of 0.5 to 0.9 in use; here its sigmas are within a fifth of flow DDIM's


def make_flow_ddim(
    schedule: FlowSchedule, steps: int, device: torch.device | str = "cpu", eta: float = 1.0
) -> TableProcess:
    """DDIM (arXiv 2010.02502, Eq. 12 and 16) for signal 1 - t and noise t; eta 0 is Euler's method.

    Raises:
        ValueError: the model's schedule is none of flow matching.
    """
    t, s = noise_levels(schedule, steps)
    sigma = eta * s * (1 - ((1 - t) * s / ((1 - s) * t)) ** 2).sqrt()
    return _tables(schedule, t, s, sigma, (s**2 - sigma**2).sqrt(), device)


def make_cps(
    schedule: FlowSchedule, steps: int, device: torch.device | str = "cpu", level: float = CPS_LEVEL
) -> TableProcess:
    """Coefficients-preserving sampling (arXiv 2509.05952); level 0 is Euler's method.

    Raises:
        ValueError: the model's schedule is none of flow matching.
    """
    t, s = noise_levels(schedule, steps)
    angle = level * math.pi / 2
    return _tables(schedule, t, s, s * math.sin(angle), s * math.cos(angle), device)


def make_flow_sde(
    schedule: FlowSchedule, steps: int, device: torch.device | str = "cpu", level: float = SDE_LEVEL
) -> TableProcess:
    """The stochastic differential equation of Flow-GRPO (arXiv 2505.05470); level 0 is Euler's method.

    Raises:
        ValueError: the model's schedule is none of flow matching.
    """
    t, s = noise_levels(schedule, steps)
    signal = 1 - t
    signal[0] = 1 - s[0]  # 0 otherwise: as in the authors' code
    beta = level * (t / signal).sqrt()
    sigma, kappa = beta * (t - s).sqrt(), s - beta**2 * (t - s) / (2 * t)
    sigma[-1] = kappa[-1] = 0
    return _tables(schedule, t, s, sigma, kappa, device)


def noise_levels(schedule: FlowSchedule, steps: int) -> tuple[Tensor, Tensor]:
    """The levels t from which the steps go, and s to which, float64 (T,)."""
    if not isinstance(schedule, FlowSchedule):
        raise ValueError(
            "got a process for flow matching and a model with discrete noise levels; expected ddim, few-steps or lcm: "
            "choose another process, or none for the model's own"
        )
    assert not isinstance(schedule.shift, DynamicShift), "make_process is given the size of the latents"
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    levels = schedule.shift * u / (1 + (schedule.shift - 1) * u)
    return levels[:-1], levels[1:]


def _tables(
    schedule: FlowSchedule, t: Tensor, s: Tensor, sigma: Tensor, kappa: Tensor, device: torch.device | str
) -> TableProcess:
    tables = {
        "times": t * schedule.timesteps,
        "signal": 1 - t,
        "noise": t,
        "next_signal": 1 - s,
        "kappa": kappa,
        "sigma": sigma,
    }
    on_device = {name: table.float().to(device) for name, table in tables.items()}
    return TableProcess(**on_device, prediction_type="flow_prediction")
