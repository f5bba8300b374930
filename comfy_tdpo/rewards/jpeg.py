"""How well an image compresses, from DDPO (Black et al., 2023, arXiv 2305.13301); it uses no model and no prompt."""

import io

import torch
from PIL import Image
from torch import Tensor

from .options import Options

QUALITY = 95
SIGNS = {"jpeg-compressibility": -1, "jpeg-incompressibility": 1}


class JpegSize:
    """The size of the image as JPEG, in units of 1000 bytes; negated for compressibility."""

    sources = ()
    embed_dim = None
    differentiable = False

    def __init__(self, name: str, options: Options):
        self.name, self.sign = name, SIGNS[name]

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} has no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        levels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        sizes = [_kilobytes(Image.fromarray(image)) for image in levels]
        return self.sign * torch.tensor(sizes, device=images.device)

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt is fine: only images are scored."""


def _kilobytes(image: Image.Image) -> float:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=QUALITY)
    return file.tell() / 1000
