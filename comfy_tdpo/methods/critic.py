"""The temporal critic R_phi (arXiv 2402.08552, Eq. 7), which predicts the reward from a noisy latent.

Its input is the reward encoder's embedding of the decoded latent, so that critic and reward share one encoder. By
default there is no activation between the layers, as in the authors' code; the paper mentions ReLU and leaky ReLU.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUT = (0.2, 0.2, 0.1, 0.0)  # after each layer except the last

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}


class TemporalCritic(nn.Module):
    """An MLP from unit embeddings, (..., D), to the residual in units of the normalised reward, (...).

    All random numbers come from generators that the caller passes. Torch's global generator is not used, because other
    threads may be using it.

    Args:
        embed_dim: D; activation: a key of ACTIVATIONS; generator: a CPU generator that draws the initial weights.
    """

    def __init__(self, embed_dim: int, activation: str = "identity", generator: torch.Generator | None = None):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.init_std = 1 / (embed_dim + 1)
        sizes = (embed_dim, *WIDTHS)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, a, b) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=self.init_std, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, embeds: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        """`dropout` is a CPU generator that draws the dropout masks; None turns dropout off."""
        for layer, share in zip(self.layers[:-1], DROPOUT, strict=True):
            embeds = ACTIVATIONS[self.activation](layer(embeds))
            if dropout is not None and share:
                embeds = _drop(embeds, share, dropout)
        return self.layers[-1](embeds)[..., 0]


def _drop(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Inverted dropout; the mask is drawn on the CPU, so that it is the same on every device."""
    kept = torch.rand(x.shape, generator=generator) >= share
    return x * kept.to(x.device, non_blocking=True) / (1 - share)
