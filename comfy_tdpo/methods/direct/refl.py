"""ReFL (arXiv 2304.05977): the reward's gradient through one of the last steps, at the clean image predicted there.

Deviations: the images are drawn to the end, without gradient, so that the metrics are of finished images; the
pre-training loss, which the authors' code for Stable Diffusion 1.x lacks too, is left out.

Shapes: B samples, T denoising steps, C H W latent.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...randomness import Coordinates, generator_at
from .direct_gradient import DirectGradient

CAP_OF_IMAGEREWARD = 2.0


class Refl(DirectGradient):
    """A Method."""

    def scored(self, prompts: list[str], seeds: Sequence[Coordinates]) -> tuple[Tensor, Tensor]:
        steps = len(self.policy.process)
        generators = [generator_at(*seed, "step") for seed in seeds]
        chosen = torch.tensor([drawn_step(self.config.earliest, steps, generator) for generator in generators])
        return self.draw(prompts, seeds, torch.arange(steps) == chosen[:, None])

    @property
    def cap(self) -> float:
        cap = self.config.reward_cap
        if cap == "auto":
            cap = CAP_OF_IMAGEREWARD if self.config.trained_on == ["imagereward"] else None
        return math.inf if cap is None else cap

    def loss(self, rewards: Tensor) -> Tensor:
        return -rewards if math.isinf(self.cap) else (self.cap - rewards).relu()

    def report(self, rewards: Tensor) -> None:
        if not math.isinf(self.cap):
            capped = (rewards >= self.cap).float().sum()
            self.context.add("policy/capped_rewards", capped / self.samples_per_update)


def drawn_step(earliest: float, steps: int, generator: torch.Generator) -> int:
    """The step with gradient: uniform from the fraction `earliest` of the `steps` to the last, which always counts."""
    first = min(round(earliest * steps), steps - 1)
    return first + int(torch.randint(steps - first, (1,), generator=generator))
