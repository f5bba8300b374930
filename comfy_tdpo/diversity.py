"""How different the images of one prompt are.

Shapes: N samples of an epoch in all processes, D embedding width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .exact import exact


def diversity(embeds: Tensor, prompts: Sequence[str]) -> float | None:
    """The mean cosine distance between two images of the same prompt: 0 if they are equal, 1 if they are orthogonal.

    Within a prompt of n images it is the mean over its n (n - 1) / 2 pairs. Prompts are weighted by n - 1, as in a
    pooled variance, because n unit embeddings e have exactly that mean distance as the trace of their unbiased
    covariance. Returns None if no prompt occurs twice.

    embeds: (N, D), of the images; prompts: the prompt of each.
    """
    names = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([names[prompt] for prompt in prompts])
    units = F.normalize(exact(embeds), dim=-1)
    sums = units.new_zeros(len(names), units.shape[1]).index_add_(0, groups, units)
    counts = torch.bincount(groups, minlength=len(names)).double()
    if counts.max() < 2:
        return None
    sums, counts = sums[counts > 1], counts[counts > 1]
    distances = (counts.square() - sums.square().sum(1)) / (counts * (counts - 1))
    weights = counts - 1
    return ((weights * distances).sum() / weights.sum()).item()
