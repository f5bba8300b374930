"""How colourful an image looks, from Hasler and Suesstrunk, Measuring colourfulness in natural images (2003); it uses
no model and no prompt.

With rg = R - G and yb = (R + G) / 2 - B, over the pixels of an image, in levels from 0 to 255:
M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)   (their equation for M^(3))
"""

import torch
from torch import Tensor

from .options import Options

_TINY = 1e-12  # under the square roots, whose gradient is infinite at 0


class Colourfulness:
    """M: 0 for grey images, about 15 for slightly, 45 for averagely and 80 for highly colourful photographs."""

    sources = ()
    embed_dim = None
    differentiable = True

    def __init__(self, name: str, options: Options):
        self.name = name

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} has no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        red, green, blue = (images.float() * 255).flatten(2).unbind(1)  # (B, H * W) each
        opponents = torch.stack([red - green, (red + green) / 2 - blue])  # (2, B, H * W)
        spread = opponents.var(-1, correction=0).sum(0)
        shift = opponents.mean(-1).square().sum(0)
        return (spread + _TINY).sqrt() + 0.3 * (shift + _TINY).sqrt()

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt is fine: only images are scored."""
