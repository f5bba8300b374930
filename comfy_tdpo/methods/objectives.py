"""The clipped objectives of the policy and the critic (arXiv 2402.08552, Eq. 8-10), as pure functions of tensors."""

import torch
from torch import Tensor


def policy_loss(ratio: Tensor, temporal_rewards: Tensor, clip_range: float) -> Tensor:
    """Eq. 8, negated because it is minimised: the clipped surrogate of each sample, (B,)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-temporal_rewards * ratio, -temporal_rewards * clipped)


def critic_loss(residuals: Tensor, old_residuals: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Eq. 10: the clipped squared error of each sample, (B,), in squared units of the normalised reward."""
    clipped = old_residuals + (residuals - old_residuals).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((residuals - returns) ** 2, (clipped - returns) ** 2)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(old || new) in nats from the samples' log-ratios (k2: half the mean square).

    It is far too large unless the KL is well below 1 nat.
    """
    return 0.5 * (log_ratio**2).mean()


def clip_fraction(ratio: Tensor, clip_range: float) -> Tensor:
    """The fraction of samples whose ratio lies outside the clip range."""
    return ((ratio - 1).abs() > clip_range).float().mean()


def explained_variance(residuals: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(G - r) / Var(G): 1 for a perfect critic, 0 for one that predicts a constant."""
    return 1 - (returns - residuals).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
