"""From rewards to temporal rewards (arXiv 2402.08552, Eq. 5-7).

Shapes: B samples, T denoising steps. With several processes, every tensor here holds the samples of all of them.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..exact import exact


def beside(values: Tensor, scores: Tensor) -> Tensor:
    """One value for each of B samples, shaped so that it counts for all of a sample's scores, (B, ...)."""
    return values.view(-1, *[1] * (scores.ndim - 1))


class Standard(NamedTuple):
    """What each sample's reward is compared with and divided by, (B,) each, float64 on the CPU."""

    mean: Tensor
    std: Tensor

    def __call__(self, scores: Tensor) -> Tensor:
        """`scores`, (B, ...), normalised; float32."""
        normalised = (exact(scores) - beside(self.mean, scores)) / beside(self.std, scores)
        return normalised.float().to(scores.device)


class RewardMoments:
    """Normalises rewards by the mean and standard deviation of each prompt's recent rewards.

    Until a prompt has `min_count` rewards in its buffer of `buffer_size`, the batch's moments are used. The new rewards
    are added before the moments are computed. (As in DDPO, arXiv 2305.13301, and the authors' running_moments.py.)
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16):
        self.buffer_size, self.min_count = buffer_size, min_count
        self._buffers: dict[str, deque[float]] = {}

    def add(self, prompts: list[str], rewards: Tensor) -> Standard:
        """Add `rewards`, (B,), to the buffers and return what they are normalised by."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch = _moments(rewards.tolist())
        moments = {prompt: self._prompt_moments(prompt) or batch for prompt in set(prompts)}
        mean, std = torch.tensor([moments[prompt] for prompt in prompts], dtype=torch.float64).unbind(1)
        return Standard(mean, std + 1e-6)

    def _prompt_moments(self, prompt: str) -> tuple[float, float] | None:
        buffer = self._buffers[prompt]
        return _moments(list(buffer)) if len(buffer) >= self.min_count else None

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}


def _moments(values: list[float]) -> tuple[float, float]:
    data = torch.tensor(values, dtype=torch.float64)
    return data.mean().item(), data.std(correction=0).item()


def standard_of(rewards: Tensor) -> Standard:
    """What `rewards`, (B,), are normalised by if all of them count alike: their mean and standard deviation."""
    values = exact(rewards)
    mean, std = values.mean(), values.std(correction=0) + 1e-6
    return Standard(mean.expand(len(values)), std.expand(len(values)))


def returns(rewards: Tensor, penalties: Tensor, gamma: float = 1.0) -> Tensor:
    """G_k of Eq. 5, (B, T): discounted sums, from step k on, of the reward, (B,), at the last step minus the penalties,
    (B, T)."""
    step_rewards = -penalties
    step_rewards[:, -1] += rewards
    result = torch.empty_like(step_rewards)
    following = torch.zeros_like(rewards)
    for k in reversed(range(step_rewards.shape[1])):
        following = step_rewards[:, k] + gamma * following
        result[:, k] = following
    return result


def returns_with_later_kl(rewards: Tensor, penalties: Tensor, gamma: float = 1.0) -> Tensor:
    """G_k, (B, T), for a loss that includes each step's own exact KL: only the penalties of steps after k count.

    Their mean over the samples at step k is subtracted as a baseline. Without it, the many steps that follow an early k
    would lower the returns of all samples there alike.
    """
    later = returns(torch.zeros_like(rewards), penalties, gamma) + penalties
    return returns(rewards, torch.zeros_like(penalties), gamma) + later - later.mean(0)


def temporal_rewards(
    returns: Tensor,
    residuals: Tensor,
    trained: Tensor | slice = slice(None),
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
    known: Tensor | slice = slice(None),
) -> tuple[Tensor, Tensor]:
    """T_k = G_k - R_phi(x_k, c) of Eq. 6, normalised over all samples and `trained` steps, (B, T), and the std divided
    by.

    trained: which steps are trained, bool (T,).
    gae_lambda: 1 for T_k as in the paper, less for generalised advantage estimation, over the steps `known` to the
    critic, bool (T,).
    """
    raw = returns - residuals
    if gae_lambda < 1:
        steps = torch.arange(raw.shape[1])[known].tolist()
        raw[:, known] = generalised_advantages(raw[:, known], gamma, gae_lambda, steps)
    counting = raw[:, trained].contiguous()  # indexing may transpose it, and sums depend on the order
    std = counting.std(correction=0) + 1e-8
    return (raw - counting.mean()) / std, std


def generalised_advantages(errors: Tensor, gamma: float, gae_lambda: float, steps: Sequence[int]) -> Tensor:
    """Generalised advantage estimation (arXiv 1506.02438), (B, K), from a critic's errors e_k = G_k - V_k, (B, K), at K
    increasing `steps`.

    With rewards r_k = G_k - gamma G_{k+1}, the temporal difference r_k + gamma V_{k+1} - V_k is e_k - gamma e_{k+1};
    the advantage is the sum of those from k on, with weights (gamma lambda)^j. Where `steps` leave out some, it goes
    from one of them to the next: gamma counts for every step in between, lambda once.
    """
    discounts = [*(gamma ** (after - before) for before, after in pairwise(steps)), 0.0]
    result = torch.empty_like(errors)
    following = next_error = torch.zeros_like(errors[:, 0])
    for k in reversed(range(errors.shape[1])):
        difference = errors[:, k] - discounts[k] * next_error
        following = difference + discounts[k] * gae_lambda * following
        result[:, k], next_error = following, errors[:, k]
    return result
