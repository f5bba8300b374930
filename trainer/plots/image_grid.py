"""Arranges several images in one picture."""

import math
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..run.files import write_atomically


def save_image_grid(images: Tensor, path: Path) -> None:
    """Save images, float (B, 3, H, W) in [0, 1], as one near-square PNG with thin white gaps."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width = pixels.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows, gap = math.ceil(count / columns), max(2, width // 64)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(image), (column * (width + gap), row * (height + gap)))
    write_atomically(path, grid.save)
