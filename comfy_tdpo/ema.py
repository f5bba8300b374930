"""An exponential moving average of the trained weights, for evaluation and export.

With the weights w_n after update n = 0, 1, ... and w_(-1) before the first:

    average_n = d_n average_(n-1) + (1 - d_n) w_n,    d_n = min((1 + n) / (10 + n), rate),    average_(-1) = w_(-1).

The warm-up d_n keeps the untrained weights from dominating the average of a short run (as in Flow-GRPO and in
TensorFlow's ExponentialMovingAverage).
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .swapping import copied, swapped

UPDATES = "updates"  # the name of the count in the saved state; parameters' names contain a dot


class MovingAverage:
    """The average of `parameters`, by name, in float32 on their device.

    rate: in (0, 1); in_place: as in `swapped`.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], rate: float, in_place: bool = False):
        self.parameters, self.rate, self.in_place, self.updates = parameters, rate, in_place, 0
        self.weights = copied(parameters)

    @torch.no_grad()
    def update(self) -> None:
        """Average in the current weights; called after each update of them."""
        decay = min((1 + self.updates) / (10 + self.updates), self.rate)
        for name, parameter in self.parameters.items():
            self.weights[name].lerp_(parameter.float(), 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def restart(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Start the average anew from the current weights, where `mask`, which broadcasts to `parameter`, is true."""
        name = next(name for name, candidate in self.parameters.items() if candidate is parameter)
        self.weights[name].copy_(torch.where(mask, parameter.float(), self.weights[name]))

    def swapped_in(self) -> AbstractContextManager[None]:
        """Inside the block, the parameters hold the average; afterwards, their own values to the last bit.

        Before the first update there is nothing to average, so the weights stay: they may have been loaded since.
        """
        return swapped(self.parameters, self.weights, self.in_place) if self.updates else nullcontext()

    def state(self) -> dict[str, Tensor]:
        """The tensors to save in a checkpoint."""
        return self.weights | {UPDATES: torch.tensor(self.updates)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, weight in self.weights.items():
            weight.copy_(state[name])
        self.updates = int(state[UPDATES])
