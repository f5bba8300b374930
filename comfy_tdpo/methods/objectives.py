"""The objectives of the policy and the critic, as pure functions of tensors.

Those of arXiv 2402.08552 (Eq. 8-10), and two other ways to keep an update close to the policy that sampled: a ratio
normalised by step (GRPO-Guard, arXiv 2510.22319) and a trust-region mask (Flow-DPPO, arXiv 2606.11025).

Shapes: B pairs of a sample and a step, C H W latent.
"""

import torch
from torch import Tensor

LARGEST_LOG_RATIO = 20.0  # of the mean over elements; float32's exp overflows at 88


def ratio_of(log_ratio: Tensor) -> Tensor:
    """rho of Eq. 8 from its log, (B,). It stays finite, and so does its gradient, which still points back."""
    return (log_ratio - (log_ratio.detach() - LARGEST_LOG_RATIO).clamp(min=0)).exp()


def policy_loss(ratio: Tensor, temporal_rewards: Tensor, clip_range: float) -> Tensor:
    """Eq. 8, negated because it is minimised: the clipped surrogate of each sample, (B,)."""
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-temporal_rewards * ratio, -temporal_rewards * clipped)


def step_normalised_log_ratio(mean: Tensor, old_mean: Tensor, noise: Tensor) -> Tensor:
    """GRPO-Guard's ratio for steps N(mean, sigma^2) that were sampled as old_mean + sigma * noise, as its log, (B,).

    The log-ratio of Eq. 8 is -KL on average and spreads in inverse proportion to sigma. Adding the KL and multiplying
    by sigma leaves the mean over elements of noise * (mean - old_mean): zero on average, whatever the step's sigma.
    """
    return (noise * (mean - old_mean)).mean(dim=(1, 2, 3))


def trust_region_loss(log_ratio: Tensor, temporal_rewards: Tensor, kl: Tensor, limit: float) -> Tensor:
    """Flow-DPPO's loss (Eq. 14 and 18), (B,): unclipped, but zero for steps that are to move on beyond the limit.

    kl: of the step from the one that sampled, in nats, (B,); limit: in nats. A step that may move back still counts.
    """
    onward = temporal_rewards * log_ratio.detach() > 0
    keep = (kl.detach() < limit) | ~onward
    ratio = ratio_of(torch.where(keep, log_ratio, 0.0))  # masked first: a step that does not count has no gradient
    return torch.where(keep, -temporal_rewards * ratio, 0.0)


def critic_loss(residuals: Tensor, old_residuals: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Eq. 10: the clipped squared error of each sample, (B,), in squared units of the normalised reward."""
    clipped = old_residuals + (residuals - old_residuals).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((residuals - returns) ** 2, (clipped - returns) ** 2)


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(old || new) in nats from the samples' log-ratios (k2: half the mean square).

    It is far too large unless the KL is well below 1 nat.
    """
    return 0.5 * (log_ratio**2).mean()


def outside(ratio: Tensor, clip_range: float) -> Tensor:
    """Which samples' ratios lie outside the clip range, bool (B,)."""
    return (ratio - 1).abs() > clip_range


def explained_variance(residuals: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(G - r) / Var(G): 1 for a perfect critic, 0 for one that predicts a constant."""
    return 1 - (returns - residuals).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
