"""AlignProp (arXiv 2310.03739): the reward's gradient through the last steps, whose number is random.

Shapes: B samples, T denoising steps, C H W latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...randomness import Coordinates, generator_at
from .direct_gradient import DirectGradient
from .settings import TruncationSettings


class AlignProp(DirectGradient):
    """A Method."""

    def scored(self, prompts: list[str], seeds: Sequence[Coordinates]) -> tuple[Tensor, Tensor]:
        steps = len(self.policy.process)
        generators = [generator_at(*seed, "truncation") for seed in seeds]
        first = torch.tensor([first_step(self.config.truncation, steps, generator) for generator in generators])
        with_gradient = torch.arange(steps) >= first[:, None]  # (B, T)
        graded = with_gradient.sum().to(self.policy.device)
        self.context.add("policy/steps_with_gradient", graded / self.samples_per_update)
        final, _ = self.draw(prompts, seeds, with_gradient)
        return final, final

    def loss(self, rewards: Tensor) -> Tensor:
        target = self.config.reward_target
        return -rewards if target is None else (target - rewards).abs()


def first_step(settings: TruncationSettings, steps: int, generator: torch.Generator) -> int:
    """b: the first step with gradient, of 0 ... `steps` - 1.

    From a normal distribution, it is rounded towards 0 and drawn again until it is neither the first step nor beyond
    the last. (Drawn uniformly, the authors' may also be beyond the last, so that nothing is learned.)
    """
    if settings.first == "fixed":
        return steps - settings.last_steps
    if settings.first == "uniform":
        return int(torch.randint(steps, (1,), generator=generator))
    while True:
        drawn = int(steps * (settings.mean + settings.std * torch.randn(1, generator=generator).item()))
        if 1 <= drawn <= steps - 1:
            return drawn
