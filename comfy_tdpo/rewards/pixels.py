"""Preprocessing of images in [0, 1] for CLIP and BLIP, on the images' device: resize the shorter side to the model's
size by antialiased bicubic interpolation, crop the centre, normalise.

Upstream's processors do this on the CPU: on 8-bit images with Pillow, or on float tensors with torchvision. Pillow
computes in integers and rounds to 8 bits after each axis; this module uses the same integers, so the levels are equal.
Only the pixels that the crop keeps are computed, so a long image costs no more than its centre.

Rounding has no gradient. If the images require gradients, the result has the exact values and the gradient of the same
steps in floats. The values are equal to the last bit, with or without gradients.

Shapes: B images; n pixels along an axis.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BITS = 22  # fraction bits of Pillow's coefficients
_SUPPORT = 2  # pixels that the cubic kernel reads on either side
_AT_ONCE = 2**22  # pixels of a channel interpolated at once before a crop, to limit memory


class _Axis(NamedTuple):
    """One axis of an image: resized from `before` to `after` pixels, of which `size` are kept, starting at `start`."""

    before: int
    after: int
    start: int
    size: int

    @property
    def kept(self) -> slice:
        return slice(self.start, self.start + self.size)


def pillow_pixels(images: Tensor, size: int, crop: str = "rounded") -> Tensor:
    """Preprocessing with Pillow's resizing, float32 (B, 3, size, size).

    crop: "rounded" or "first", the choice between two possible centres; see `_axes`.
    """
    rows, columns = _axes(images, size, crop)
    whole = _levels(images.detach()[..., _read(rows), _read(columns)]).round().int()
    resized = _resize_rows(_resize_rows(whole.mT.contiguous(), columns).mT.contiguous(), rows).float()
    if images.requires_grad and torch.is_grad_enabled():
        resized = _straight_through(resized, _interpolate(_levels(images), rows, columns, clamp=True))
    return _normalize(resized)


def torchvision_pixels(images: Tensor, size: int) -> Tensor:
    """Preprocessing with torchvision's resizing of float tensors (0.17 and later): not rounded, overshoot kept."""
    rows, columns = _axes(images, size, "rounded")
    levels = _levels(images)
    return _normalize(_interpolate(_straight_through(levels.round(), levels), rows, columns))


def _levels(images: Tensor) -> Tensor:
    """Levels from 0 to 255; rounded, they are the values in an 8-bit file."""
    return (images.float() * 255).clamp(0, 255)


def _straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `smooth`, if it has one."""
    return exact.detach() + (smooth - smooth.detach()) if smooth.requires_grad else exact


def _axes(images: Tensor, size: int, crop: str) -> tuple[_Axis, _Axis]:
    """Rows and columns. If two centres are possible, torchvision uses the one that starts at an even pixel ("rounded"),
    and transformers the first one.
    """
    before = images.shape[-2:]
    after = [int(size * n / min(before)) for n in before]
    starts = [round((n - size) / 2) if crop == "rounded" else (n - size) // 2 for n in after]
    rows, columns = (_Axis(*axis, size) for axis in zip(before, after, starts, strict=True))
    return rows, columns


# --- Pillow's resizing


def _resize_rows(levels: Tensor, axis: _Axis) -> Tensor:
    """Pillow's resizing along the second-to-last axis, int32 in and out, of the pixels selected by `_read`.

    Sums stay below 2^31, since 255 * 2^22 is half of that.
    """
    if axis.before == axis.after:
        return levels
    pixels, weights = _windows(axis, levels.device)
    total = levels.new_full(
        (*levels.shape[:-2], axis.size, levels.shape[-1]), 2 ** (_BITS - 1)
    )  # one half, for rounding
    for read, weight in zip(pixels, weights, strict=True):
        total += levels.index_select(-2, read) * weight[:, None]
    return (total >> _BITS).clamp(0, 255)


def _read(axis: _Axis) -> slice:
    """The pixels before resizing that the kept pixels depend on."""
    if axis.before == axis.after:
        return axis.kept
    _, first, last = _reach(axis)
    return slice(first[0], last[-1])


def _reach(axis: _Axis) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each kept pixel: its centre before resizing, the first pixel it reads, and the one after the last."""
    scale = axis.before / axis.after
    centers = (np.arange(axis.start, axis.start + axis.size) + 0.5) * scale
    reach = _SUPPORT * max(scale, 1.0)
    first = np.maximum((centers - reach + 0.5).astype(int), 0)
    return centers, first, np.minimum((centers + reach + 0.5).astype(int), axis.before)


@lru_cache(maxsize=8)  # training uses one or two sizes, but image files may all differ
def _windows(axis: _Axis, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pixels that each kept pixel reads, relative to the first one read, and their weights in units of 2^-22.

    Both have shape (window, size); shorter windows are padded with weights of 0.
    """
    centers, first, last = _reach(axis)
    pixels = first + np.arange((last - first).max())[:, None]
    weights = _cubic(np.abs(pixels + 0.5 - centers) / max(axis.before / axis.after, 1.0)) * (pixels < last)
    weights /= weights.sum(axis=0)
    whole = np.trunc(weights * 2**_BITS + np.copysign(0.5, weights))
    read = np.minimum(pixels, last[-1] - 1) - first[0]
    return torch.tensor(read, device=device), torch.tensor(whole, dtype=torch.int32, device=device)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -1/2."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


# --- resizing in floats


def _interpolate(levels: Tensor, rows: _Axis, columns: _Axis, clamp: bool = False) -> Tensor:
    """The same with torch; `clamp` limits levels to 0 ... 255 after each axis, as Pillow's rounding does.

    Like torch itself, it resizes one axis after the other, but it crops in between, because few pixels of a long image
    are kept.
    """
    if columns.before != columns.after:
        levels = _bicubic(levels, rows.before, columns.after)
    levels = _clamp(levels[..., columns.kept], clamp)
    if rows.before != rows.after:
        parts = levels.split(max(1, _AT_ONCE // rows.after), -1)
        kept = [_bicubic(part, rows.after, part.shape[-1])[..., rows.kept, :].clone() for part in parts]
        levels = torch.cat(kept, -1)
    else:
        levels = levels[..., rows.kept, :]
    return _clamp(levels, clamp)


def _bicubic(levels: Tensor, height: int, width: int) -> Tensor:
    if levels.is_cuda and levels.requires_grad and torch.are_deterministic_algorithms_enabled():
        return _bicubic_by_matrices(levels, height, width)
    return F.interpolate(levels, (height, width), mode="bicubic", antialias=True)


def _bicubic_by_matrices(levels: Tensor, height: int, width: int) -> Tensor:
    """The same up to rounding, with a backward pass that adds in the same order every time, as CUDA's does not."""

    def weights(before: int, after: int) -> Tensor:
        eye = torch.eye(before, device=levels.device)[None, None]
        return F.interpolate(eye, (after, before), mode="bicubic", antialias=True)[0, 0]

    return weights(levels.shape[-2], height) @ levels @ weights(levels.shape[-1], width).T


def _clamp(levels: Tensor, clamp: bool) -> Tensor:
    return levels.clamp(0, 255) if clamp else levels


def _normalize(levels: Tensor) -> Tensor:
    mean, std = (torch.tensor(c, device=levels.device)[:, None, None] for c in (CLIP_MEAN, CLIP_STD))
    return (levels / 255 - mean) / std
