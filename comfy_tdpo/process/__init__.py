"""Processes: how a model's output becomes a Gaussian denoising step, and their registry.

Shapes: B batch, T denoising steps, C H W latent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..registry import entry, look_up
from .flow_schedule import FlowSchedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Step(NamedTuple):
    """One step p(x_{k+1} | x_k, c) = N(mean, std^2), float32: mean and clean (B, C, H, W), std (B, 1, 1, 1).

    clean: the clean latent predicted by the model.
    """

    mean: Tensor
    std: Tensor
    clean: Tensor


class Process(Protocol):
    """The T steps from noise to a clean latent.

    times: (T,) on the policy's device; the denoiser's time input at each step.
    sigma: (T,) on the policy's device; the std of each step.
    mean_by_noise: (T,) on the policy's device; d mean / d eps, the step's mean by the predicted noise at a given x_k.
    sensitivity: (T,) on the policy's device; |d mean / d output| / sigma, how far a step's mean moves with the model's
        output, in units of its noise; infinite for steps without noise.
    stochastic: (T,) bool on the CPU; True for steps that have a density. The others are sampled but not trained.
    """

    times: Tensor
    sigma: Tensor
    mean_by_noise: Tensor
    sensitivity: Tensor
    stochastic: Tensor

    def __len__(self) -> int: ...

    def initial(self, noise: Tensor) -> Tensor:
        """The latent x_0 that sampling starts from, given standard normal `noise`; both (B, C, H, W)."""
        ...

    def noised(self, clean: Tensor, noise: Tensor, positions: Tensor) -> Tensor:
        """The latent x_k at positions k, int64 (B,), of a clean latent with standard normal `noise`; (B, C, H, W)."""
        ...

    def step(self, output: Tensor, latents: Tensor, positions: Tensor) -> Step:
        """The step from `latents` x_k at `positions` k, int64 (B,), given the model's (guided) `output`."""
        ...


MakeProcess = Callable[[Any, int, "torch.device"], Process]  # (the model's noise schedule, T, device)

# name -> "module:attribute", where the attribute is a MakeProcess.
PROCESSES = {
    "ddim": "comfy_tdpo.process.ddim:make_ddim",
    "few-steps": "comfy_tdpo.process.few_steps:make_few_steps",
    "lcm": "comfy_tdpo.process.few_steps:make_lcm",
    "flow-ddim": "comfy_tdpo.process.flow:make_flow_ddim",
    "flow-sde": "comfy_tdpo.process.flow:make_flow_sde",
    "cps": "comfy_tdpo.process.flow:make_cps",
}


def make_process(
    name: str, scheduler: Any, steps: int, device: torch.device, size: tuple[int, int] | None = None
) -> Process:
    """The process `name` over `steps` steps of the model's own noise schedule `scheduler`.

    size: H and W of the latents; only a schedule that depends on them needs it.

    Raises:
        ValueError: there is no such process, or it does not support this schedule or number of steps.
    """
    if isinstance(scheduler, FlowSchedule) and size:
        scheduler = scheduler.at(*size)
    return look_up(entry(PROCESSES, "process", name))(scheduler, steps, device)
