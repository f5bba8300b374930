"""The head of Aesthetic Score, which ImageReward adopted."""

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Five linear layers in a row, (B, D) -> (B,). Identities replace upstream's dropout layers, so names match."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, 1024),
            nn.Identity(),
            nn.Linear(1024, 128),
            nn.Identity(),
            nn.Linear(128, 64),
            nn.Identity(),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]
