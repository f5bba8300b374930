"""Sampling with gradients through some of the steps.

Shapes: B samples, T denoising steps, C H W latent.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...models.conditioning import Conditioning
from ...policy import DiffusionPolicy
from ...process import Step
from ...swapping import brought

TakeStep = Callable[[Tensor, Tensor, Conditioning], Step]  # as DiffusionPolicy.step


class Drawn(NamedTuple):
    """What B trajectories end in, and the clean latents predicted at the last step with gradient of each; (B, C, H, W)
    each. Samples without such a step have zeros there."""

    final: Tensor
    clean: Tensor


def draw(
    policy: DiffusionPolicy,
    take_step: TakeStep,
    prompts: list[str],
    noise: Tensor,
    with_gradient: Tensor,
    check: Callable[[], None] = lambda: None,
) -> Drawn:
    """Trajectories driven by `noise`, (B, T + 1, C, H, W), with a graph of the steps `with_gradient`, bool (B, T).

    A step without gradient gives constants. `take_step` is `policy.step`, or the same with less memory; `check` is
    called before each step.
    """
    conditioning = policy.encode_prompts(prompts)
    latents = policy.process.initial(noise[:, 0])
    clean = torch.zeros_like(latents)
    for k, graded in enumerate(with_gradient.cpu().unbind(1)):  # where finding its rows waits for nothing
        check()
        rows, parts = [brought(part.nonzero()[:, 0], policy.device) for part in (graded, ~graded)], []
        for part, enabled in zip(rows, (True, False), strict=True):
            if len(part):
                positions = torch.full((len(part),), k, device=policy.device)
                with torch.set_grad_enabled(enabled):
                    mean, sigma, predicted = take_step(latents[part], positions, conditioning[part])
                    parts.append((mean + sigma * noise[part, k + 1], predicted))
        back = torch.cat(rows).argsort()
        latents, predicted = (torch.cat(both)[back] for both in zip(*parts, strict=True))
        clean = torch.where(brought(graded, policy.device).view(-1, 1, 1, 1), predicted, clean)
    return Drawn(latents, clean)
