"""How far sampling and training disagree about the same policy.

Shapes: N samples of an epoch in this process, T denoising steps, B pairs of a sample and a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .context import Context
from .objectives import ratio_of


@torch.no_grad()
def measure_drift(
    context: Context, trained: Tensor, log_ratio: Callable[[Tensor, Tensor], Tensor], together: int = 1
) -> None:
    """Report `policy/ratio_drift`. Before an epoch's first update the policy is still the one that sampled, so that all
    its ratios should be 1.

    Measured on a few samples at each trained step: later steps have smaller sigmas, and so drift more.

    trained: the steps that the epoch trains, bool (T,); log_ratio: for the rows and the steps of B pairs, (B,);
    together: see `Context.update_policy`.
    """
    size, (steps,) = context.rows_at_once(together), trained.nonzero(as_tuple=True)
    pairs = torch.arange(-(-len(steps) // size) * size)  # all steps, in full micro-batches
    for part in pairs.split(size):
        log_ratios = log_ratio(part % context.samples, steps[part % len(steps)])
        context.raise_to("policy/ratio_drift", (ratio_of(log_ratios) - 1).abs().max())
