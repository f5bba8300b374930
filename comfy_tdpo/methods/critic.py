"""The temporal critic R_phi (arXiv 2402.08552, Eq. 7), which predicts the reward of an unfinished image.

It reads the reward encoder's embedding of a decoded latent, so that critic and reward share one encoder. The authors'
network has no activation between its layers; the paper mentions ReLU and leaky ReLU.

With another architecture it is the value function V(x_k, c, k) of DPOK (arXiv 2305.16381), which reads the latent
itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..swapping import brought

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}


@dataclass(frozen=True)
class Architecture:
    """Widths of the hidden layers, the share that dropout takes after each, and how weights are drawn.

    he: draw hidden layers by He's rule (arXiv 1502.01852) and start the last at zero. Otherwise all weights have std
    1/(D+1), with D the width of the input, as in the authors' code.
    standardised: subtract the mean of the inputs seen first, divide by their standard deviation, and clip at 10.
    by_step: multiply the last hidden layer by a vector of its own for each step, which starts as normal noise. The step
    is no input of the first layer.
    """

    widths: tuple[int, ...]
    dropout: tuple[float, ...]
    he: bool
    standardised: bool
    by_step: bool = False


ARCHITECTURES = {
    "authors": Architecture((1024, 128, 64, 16), (0.2, 0.2, 0.1, 0.0), he=False, standardised=False),
    "standardised": Architecture((256, 256), (0.2, 0.2), he=True, standardised=True),
    "dpok": Architecture((256, 256, 256), (0.0, 0.0, 0.0), he=True, standardised=False, by_step=True),
}


class TemporalCritic(nn.Module):
    """An MLP from inputs, (..., D), to the residual in units of the normalised reward, (...).

    All random numbers come from generators that the caller passes. Torch's global generator is not used, because other
    threads may be using it.

    Args:
        width: D; activation: a key of ACTIVATIONS; generator: a CPU generator that draws the initial weights;
        architecture: a key of ARCHITECTURES.
        steps: how many of the inputs, the last ones, say which step it is: one of them is 1, the others are 0.
    """

    def __init__(
        self,
        width: int,
        activation: str = "identity",
        generator: torch.Generator | None = None,
        architecture: str = "authors",
        steps: int = 0,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        chosen = ARCHITECTURES[architecture]
        self.activation, self.dropout = activation, chosen.dropout
        self.gate = None
        if chosen.by_step:
            width -= steps
            self.gate = nn.Parameter(torch.randn(steps, chosen.widths[-1], generator=generator))
        sizes = (width, *chosen.widths, 1)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, a, b) for a, b in pairwise(sizes))
        self.stds = [(2 / a) ** 0.5 for a in sizes[:-2]] + [0.0] if chosen.he else [1 / (width + 1)] * len(self.layers)
        for layer, std in zip(self.layers, self.stds, strict=True):
            nn.init.normal_(layer.weight, std=std, generator=generator)
            nn.init.zeros_(layer.bias)
        self.standardised = chosen.standardised
        if self.standardised:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("std", torch.zeros(width))  # zero until inputs have been seen

    @property
    def needs_moments(self) -> bool:
        """Whether it standardises its inputs and has not seen any."""
        return self.standardised and not self.std.any()

    @torch.no_grad()
    def see(self, inputs: Tensor) -> None:
        """Take the moments for standardising from `inputs`, (M, D), unless earlier inputs have set them."""
        if self.needs_moments:
            self.mean.copy_(inputs.mean(0))
            self.std.copy_(inputs.std(0, correction=0).clamp(min=1e-3))

    def forward(self, inputs: Tensor, dropout: torch.Generator | None = None, part: int = 0, parts: int = 1) -> Tensor:
        """`dropout` is a CPU generator that draws the dropout masks; None turns dropout off.

        If the inputs are the `part` of that number, from 0, of `parts` equally long ones, the masks are those that all
        of these together would get.
        """
        x = ((inputs - self.mean) / self.std).clamp(-10, 10) if self.standardised else inputs
        if self.gate is not None:
            x, step = x.tensor_split([-len(self.gate)], dim=-1)
        for layer, share in zip(self.layers[:-1], self.dropout, strict=True):
            x = ACTIVATIONS[self.activation](layer(x))
            if dropout is not None and share:
                x = _drop(x, share, dropout, part, parts)
        if self.gate is not None:
            x = x * (step @ self.gate)
        return self.layers[-1](x)[..., 0]


def _drop(x: Tensor, share: float, generator: torch.Generator, part: int, parts: int) -> Tensor:
    """Inverted dropout; the mask is drawn on the CPU, so that it is the same on every device."""
    kept = torch.rand((parts * len(x), *x.shape[1:]), generator=generator).chunk(parts)[part] >= share
    return x * brought(kept, x.device) / (1 - share)
