"""How far sampling and training disagree about the same policy.

Shapes: N samples of an epoch in this process, T denoising steps, B pairs of a sample and a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..memory.running_out import within_memory
from .context import Context
from .objectives import ratio_of


def measure_drift(context: Context, trained: Tensor, log_ratio: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Report `policy/ratio_drift`. Before an epoch's first update the policy is still the one that sampled, so that all
    its ratios should be 1.

    Measured on a few samples at each trained step: later steps have smaller sigmas, and so drift more. The ratios have
    a graph, as in an update, since a device may choose other kernels for calls that need none; a sharded model, whose
    weights are gathered again for a backward pass, does without.

    trained: the steps that the epoch trains, bool (T,); log_ratio: for the rows and the steps of B pairs, (B,).
    """
    steps = trained.nonzero()[:, 0]

    def measure() -> Tensor:
        size, found = context.micro_batch, []
        pairs = torch.arange(-(-len(steps) // size) * size)  # all steps, in full micro-batches
        for part in pairs.split(size):
            with torch.set_grad_enabled(not context.policy.trainable.sharded):
                log_ratios = log_ratio(part % context.samples, steps[part % len(steps)]).detach()
            found.append((ratio_of(log_ratios) - 1).abs().max())
        return torch.stack(found).max()

    context.raise_to("policy/ratio_drift", within_memory(measure, context.shrink))
