"""Which denoising steps an epoch trains: a window of the steps, or a share of those in it, drawn anew for each epoch;
and in which order.

Steps outside are sampled like the others, with noise. (MixGRPO and Flow-GRPO-Fast sample them without noise, so that
only the noise of trained steps decides about the reward; here the sampled distribution is the same for every window.)

Shapes: T denoising steps, N rows.
"""

import torch
from torch import Tensor

from ..randomness import generator_at
from .sections import CriticSettings, SteppedPolicySettings


def window(settings: SteppedPolicySettings, stochastic: Tensor) -> Tensor:
    """The steps that may be trained, bool (T,): those in the window that are `stochastic`, bool (T,).

    Raises:
        ValueError: there are none.
    """
    if not stochastic.any():
        raise ValueError(
            f"got {len(stochastic)} denoising steps, of which none has noise; expected one that has, since only such "
            "steps can be trained: raise steps"
        )
    bounds = settings.bounds(len(stochastic))
    inside = torch.zeros_like(stochastic)
    inside[bounds.start : bounds.stop] = True
    if not (inside & stochastic).any():
        raise ValueError(
            f"got policy.train_from {settings.train_from:g} and policy.train_until {settings.train_until:g}, a window "
            f"without noise: only steps {_numbers(stochastic)} of {len(stochastic)} have any; expected a window with "
            "at least one of them: widen it"
        )
    return inside & stochastic


def trained_steps(settings: SteppedPolicySettings, stochastic: Tensor, seed: int, epoch: int) -> Tensor:
    """The steps that `epoch` trains, bool (T,): the same for all samples and processes, equally many in each epoch."""
    allowed = window(settings, stochastic)
    if settings.train_share == 1:
        return allowed
    (steps,) = allowed.nonzero(as_tuple=True)
    count = max(1, round(settings.train_share * len(steps)))
    drawn = torch.randperm(len(steps), generator=generator_at(seed, "trained steps", epoch))[:count]
    trained = torch.zeros_like(allowed)
    trained[steps[drawn]] = True
    return trained


def steps_read(critic: CriticSettings, settings: SteppedPolicySettings, stochastic: Tensor) -> int:
    """How many of the T steps a critic reads, the first ones: all, or with a history those up to and including the one
    after the last trained step."""
    if not critic.history:
        return len(stochastic)
    return min(len(stochastic), int(window(settings, stochastic).nonzero().max()) + 2)


def update_order(
    settings: SteppedPolicySettings, trained: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The order of an epoch's updates: of `count` rows, int64 (N,), and of the K `trained` steps, bool (T,), of each,
    (N, K)."""
    rows = torch.randperm(count, generator=generator)
    (numbers,) = trained.nonzero(as_tuple=True)
    steps = numbers.repeat(count, 1)
    if settings.timestep_order == "shuffled":
        steps = steps.gather(1, torch.rand(steps.shape, generator=generator).argsort(dim=1))
    return rows, steps


def _numbers(steps: Tensor) -> str:
    return ", ".join(str(k + 1) for k in steps.nonzero().flatten().tolist())
