"""DRaFT-K and DRaFT-LV (arXiv 2309.17400): the reward's gradient through the last K steps, or through the last step
alone, repeated on noised copies of each image.

Shapes: B samples, T denoising steps, n copies, C H W latent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...randomness import Coordinates, generator_at
from .direct_gradient import DirectGradient


class Draft(DirectGradient):
    """A Method."""

    def scored(self, prompts: list[str], seeds: Sequence[Coordinates]) -> tuple[Tensor, Tensor]:
        steps = len(self.policy.process)
        graded = 0 if self.config.renoised else self.config.last_steps
        with_gradient = (torch.arange(steps) >= steps - graded).expand(len(prompts), steps)
        final, _ = self.draw(prompts, seeds, with_gradient)
        return final, self._last_steps(final, prompts, seeds) if self.config.renoised else final

    def _last_steps(self, final: Tensor, prompts: list[str], seeds: Sequence[Coordinates]) -> Tensor:
        """DRaFT-LV: the last step from each of n noised copies of B finished latents, (n B, C, H, W)."""
        policy, copies = self.policy, self.config.renoised
        shape = (copies, 2, *policy.latent_shape)
        draws = [torch.randn(shape, generator=generator_at(*seed, "renoised")) for seed in seeds]
        noise = torch.stack(draws, dim=1).to(policy.device)  # (n, B, 2, C, H, W)
        before, during = noise.flatten(0, 1).unbind(1)
        last = torch.full((len(before),), len(policy.process) - 1, device=policy.device)
        latents = policy.process.noised(final.repeat(copies, 1, 1, 1), before, last)
        mean, sigma, _ = self.take_step(latents, last, policy.encode_prompts(prompts * copies))
        return mean + sigma * during

    def loss(self, rewards: Tensor) -> Tensor:
        return -rewards
