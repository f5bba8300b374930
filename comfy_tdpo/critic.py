"""The temporal critic R_phi (arXiv 2402.08552, Eq. 7): what reward is to be expected from a noisy latent.

It reads the reward encoder's embedding of the decoded latent, so that critic and reward share one encoder. As in the
authors' code there is no activation between the layers by default; the paper speaks of ReLU and leaky ReLU.
"""

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
DROPOUT = (0.2, 0.2, 0.1, 0.0)  # after each layer but the last

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}


class TemporalCritic(nn.Module):
    """An MLP from unit embeddings, (..., D), to the residual in units of the normalised reward, (...)."""

    def __init__(self, embed_dim: int, activation: str = "identity"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"got activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.activation = activation
        self.init_std = 1 / (embed_dim + 1)
        sizes = (embed_dim, *WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=self.init_std)
            nn.init.zeros_(layer.bias)

    def forward(self, embeds: Tensor) -> Tensor:
        for layer, dropout in zip(self.layers[:-1], DROPOUT, strict=True):
            embeds = F.dropout(ACTIVATIONS[self.activation](layer(embeds)), dropout, self.training)
        return self.layers[-1](embeds)[..., 0]
