"""Arranges several images in one picture, and cuts them out of it again."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of


def save_image_grid(images: Tensor, path: Path) -> None:
    """Save images, float (B, 3, H, W) in [0, 1], as one near-square PNG with thin white gaps."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width = pixels.shape[:3]
    rows, columns = grid_shape(count)
    gap = _gap(width)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(image), (column * (width + gap), row * (height + gap)))
    write_atomically(path, grid.save)


def image_in_grid(path: Path, count: int, row: int, column: int) -> tuple[int, Tensor]:
    """The index of an image in a grid of `count` that `save_image_grid` saved, and the image, float (3, H, W).

    Rows and columns count from 0.

    Raises:
        ValueError: there is no image at that place, or the file is no such grid.
    """
    rows, columns = grid_shape(count)
    index = row * columns + column
    if not (0 <= row < rows and 0 <= column < columns and index < count):
        raise ValueError(
            f"got row {row}, column {column} of a grid of {number_of(count, 'image')}; expected rows 0 to {rows - 1}, "
            f"columns 0 to {columns - 1}, and a place that has an image"
        )
    try:
        with Image.open(path) as image:
            levels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"got the sample grid '{path}', which cannot be read ({error}); expected a PNG") from error
    width = _side(levels.shape[1], columns)
    gap = _gap(width)
    height = (levels.shape[0] + gap) // rows - gap
    if levels.shape[:2] != (rows * (height + gap) - gap, columns * (width + gap) - gap):
        raise ValueError(
            f"got the sample grid '{path}', which is no grid of {number_of(count, 'image')}; expected the run's own "
            "file"
        )
    top, left = row * (height + gap), column * (width + gap)
    return index, torch.from_numpy(levels[top : top + height, left : left + width]).permute(2, 0, 1).float() / 255


def grid_shape(count: int) -> tuple[int, int]:
    """Rows and columns."""
    columns = math.ceil(math.sqrt(count))
    return math.ceil(count / columns), columns


def _gap(width: int) -> int:
    return max(2, width // 64)


def _side(total: int, columns: int) -> int:
    """The width of an image, of which `columns` and the gaps between them have the width `total`."""
    fitting = (side for side in range(total // columns, 0, -1) if columns * (side + _gap(side)) - _gap(side) <= total)
    return next(fitting, 1)
