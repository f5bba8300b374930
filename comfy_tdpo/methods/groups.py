"""Groups: the K samples of one prompt in an epoch, K consecutive rows.

Deviations: the leave-one-out baseline of LOOP (arXiv 2503.00897) instead of GRPO's mean of the group, which contains
the sample itself; the factors of GARDO (arXiv 2512.24138) as in its code, divided by their group's mean, which the
paper does not do.

Shapes: B samples of all processes, in B / K groups; D embedding width.
"""

import torch
from torch import Tensor

from ..exact import exact
from .advantages import Standard


def leave_one_out(values: Tensor, size: int) -> Tensor:
    """Each value minus the mean of the other `size` - 1 of its group, (B,) float64 on the CPU."""
    groups = exact(values).unflatten(0, (-1, size))
    return (size / (size - 1) * (groups - groups.mean(1, keepdim=True))).flatten()


def standard(rewards: Tensor, size: int, std: str) -> Standard:
    """What rewards, (B,), are normalised by: the mean of the others in their group, and a standard deviation.

    std: "batch" for that of all rewards (Flow-GRPO, arXiv 2505.05470), "group" for that of the sample's own group
    (GRPO, arXiv 2402.03300), "none" for no division.
    """
    rewards = exact(rewards)
    deviation = torch.ones_like(rewards)
    if std == "batch":
        deviation = (rewards.std(correction=0) + 1e-6).expand_as(rewards)
    elif std == "group":
        deviation = rewards.unflatten(0, (-1, size)).std(1, correction=0).repeat_interleave(size) + 1e-6
    return Standard(rewards - leave_one_out(rewards, size), deviation)


def diversity_factors(embeds: Tensor, size: int) -> Tensor:
    """How different each image is from the others of its group, relative to the group's mean, (B,).

    It is the cosine distance to the nearest neighbour. In a group of identical images, the factors are 1.

    Args:
        embeds: unit embeddings (B, D).
    """
    groups = exact(embeds).unflatten(0, (-1, size))
    similar = groups @ groups.mT - 3 * torch.eye(size)  # so that none is its own neighbour
    distance = (1 - similar.amax(2)).clamp(min=0)
    mean = distance.mean(1, keepdim=True)
    factors = torch.where(mean > 1e-7, distance / mean.clamp(min=1e-7), 1.0)  # float32 has 1e-7 noise
    return factors.float().flatten().to(embeds.device)


def favour_diversity(advantages: Tensor, factors: Tensor) -> Tensor:
    """The advantages, (B, T), positive ones multiplied by their sample's factor, (B,)."""
    return torch.where(advantages > 0, advantages * factors[:, None], advantages)
