"""Rehearses the phases of an epoch with zeros, so that their memory can be measured before the first sample."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .memory.counting import kept_bytes
from .models.conditioning import Conditioning
from .policy import DiffusionPolicy
from .rewards import RewardModel
from .rewards.networks import needed, networks_of, unneeded


class Rehearsal:
    """What MemoryBudget measures: each phase with a given number of rows, whose results are discarded.

    Args:
        prompt: that all rows have; rewards: those that score the images. Only rewards that have networks are called.
        gradients: whether the rewards are back-propagated through the decoder.
    """

    def __init__(self, policy: DiffusionPolicy, prompt: str, rewards: Iterable[RewardModel], gradients: bool = False):
        self.policy, self.prompt, self.gradients = policy, prompt, gradients
        self.rewards = [reward for reward in rewards if networks_of(reward)]

    @property
    def checkpointing(self) -> bool:
        return self.policy.checkpointing

    def turn_on_checkpointing(self) -> None:
        self.policy.turn_on_checkpointing()

    def with_rewards(self) -> AbstractContextManager[None]:
        return needed(self.rewards)

    def updating(self) -> AbstractContextManager[None]:
        return nullcontext() if self.gradients else unneeded(self.rewards)

    @torch.no_grad()
    def sample(self, rows: int) -> None:
        """One step, beside the noise, the latents and the clean latents of all steps, which are copied at the end."""
        steps = len(self.policy.process)
        path = torch.empty(rows, 5 * steps + 2, *self.policy.latent_shape, device=self.policy.device)
        self._step(rows)
        del path

    def train(self, rows: int) -> None:
        try:
            with torch.enable_grad():
                self._step(rows).sum().backward()
        finally:
            for parameter in self.policy.parameters:
                parameter.grad = None

    def kept(self) -> int:
        networks = self.policy.model.networks.values()
        with torch.enable_grad():
            return kept_bytes(lambda: self._step(1), [weight for net in networks for weight in net.parameters()])

    @torch.no_grad()
    def score(self, rows: int) -> None:
        images = self._images(rows)
        with self.with_rewards():
            for reward in self.rewards:
                reward.score(images, [self.prompt] * rows)

    def decode(self, rows: int) -> None:
        with torch.set_grad_enabled(self.gradients), self.with_rewards():
            images = self.policy.decode(self._latents(rows).requires_grad_(self.gradients))
            if self.gradients:
                sum(
                    (reward.score(images, [self.prompt] * rows).sum() for reward in self.rewards), images.sum()
                ).backward()

    def _step(self, rows: int) -> Tensor:
        """The mean of a step of `rows` samples."""
        policy = self.policy
        positions = torch.zeros(rows, dtype=torch.long, device=policy.device)
        return policy.step(self._latents(rows), positions, self._conditioning(rows)).mean

    def _conditioning(self, rows: int) -> Conditioning:
        return self.policy.encode_prompts([self.prompt]).expand(rows)

    def _latents(self, rows: int) -> Tensor:
        return torch.zeros(rows, *self.policy.latent_shape, device=self.policy.device)

    def _images(self, rows: int) -> Tensor:
        _, *sides = self.policy.latent_shape
        factor = self.policy.model.decode.factor
        return torch.zeros(rows, 3, *(factor * side for side in sides), device=self.policy.device)
