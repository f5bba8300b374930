"""From images in [0, 1] to what CLIP and BLIP are fed, on the images' device: the shorter side to the model's size by
antialiased bicubic resizing, the middle cut out, normalised.

Upstream's processors do that on the CPU, to 8-bit images by Pillow or to float tensors by torchvision. Pillow computes
in integers and rounds to 8 bits after each axis; here it is done with the same integers, so the levels are the same.

Shapes: B images.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BITS = 22  # of the fraction in Pillow's coefficients
_SUPPORT = 2  # pixels on either side that a cubic sees


def pillow_pixels(images: Tensor, size: int, crop: str = "rounded") -> Tensor:
    """What follows from Pillow's resizing, float32 (B, 3, size, size)."""
    height, width = _shorter_side_to(size, images)
    levels = _resize_last_axis(_levels(images), width)
    levels = _resize_last_axis(levels.mT, height).mT
    return _normalize(_crop(levels, size, crop))


def torchvision_pixels(images: Tensor, size: int) -> Tensor:
    """What follows from torchvision's resizing of float tensors (0.17 and later): nothing rounded, overshoot kept."""
    height, width = _shorter_side_to(size, images)
    levels = _levels(images)
    if levels.shape[-2:] != (height, width):
        levels = F.interpolate(levels, (height, width), mode="bicubic", antialias=True)
    return _normalize(_crop(levels, size, "rounded"))


def _levels(images: Tensor) -> Tensor:
    """0 to 255: what is left of images in a file."""
    return (images.float() * 255).round().clamp(0, 255)


def _shorter_side_to(size: int, images: Tensor) -> tuple[int, int]:
    height, width = images.shape[-2:]
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _resize_last_axis(levels: Tensor, size: int) -> Tensor:
    """Whole numbers throughout: each product of levels and digits sums to less than 2^24, which float32 holds."""
    if levels.shape[-1] == size:
        return levels
    total = torch.zeros((), dtype=torch.int32, device=levels.device)
    for digit in _coefficients(levels.shape[-1], size, levels.device):
        total = total * 256 + (levels @ digit).int()
    return ((total + 2 ** (_BITS - 1)) >> _BITS).clamp(0, 255).float()


@lru_cache(maxsize=8)  # a training has one size or two, and those of a folder may all differ
def _coefficients(before: int, after: int, device: torch.device) -> list[Tensor]:
    """The digits, to the base of 256 and highest first, of how much of each pixel goes where, each (before, after)."""
    scale = before / after
    stretch = max(scale, 1.0)
    centers = (np.arange(after) + 0.5) * scale
    first = np.maximum((centers - _SUPPORT * stretch + 0.5).astype(int), 0)
    last = np.minimum((centers + _SUPPORT * stretch + 0.5).astype(int), before)
    pixels = np.arange(before)[:, None]
    weights = _cubic(np.abs(pixels + 0.5 - centers) / stretch) * (first <= pixels) * (pixels < last)
    weights /= weights.sum(axis=0)
    whole = np.trunc(weights * 2**_BITS + np.copysign(0.5, weights)).astype(np.int64)
    digits = [whole >> 16, whole >> 8 & 255, whole & 255]
    return [torch.tensor(digit, dtype=torch.float32, device=device) for digit in digits]


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _crop(levels: Tensor, size: int, crop: str) -> Tensor:
    """The middle; where there are two, torchvision takes the even-numbered ("rounded"), transformers the first."""
    height, width = levels.shape[-2:]
    if crop == "rounded":
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:
        top, left = (height - size) // 2, (width - size) // 2
    return levels[..., top : top + size, left : left + size]


def _normalize(levels: Tensor) -> Tensor:
    mean, std = (torch.tensor(c, device=levels.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return (levels / 255 - mean) / std
