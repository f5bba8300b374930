"""The head that Aesthetic Score has and ImageReward took over from it."""

from torch import Tensor, nn


class LinearHead(nn.Module):
    """Five linear layers in a row, (B, D) -> (B,), under upstream's names; its dropout counts as layers there."""

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
