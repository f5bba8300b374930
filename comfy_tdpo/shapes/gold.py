"""A program that measures directly what the learned rewards of Shapes only approximate.

`find_figures` recovers shapes, colours and places from a picture. `gold_score` compares them with the prompt, and
`fidelity` with the picture itself. `diversity` compares the pictures of a prompt with each other.

Shapes: H = W = 64 pixels, G x G points of the grid on which silhouettes are compared, S silhouettes.
"""

import colorsys
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from ..counts import number_of
from .scenes import COLOURS, IMAGE_SIZE, PLACES, SHAPES, Figure, Scene, parse, render

# Colours are points in [0, 1]^3, with Euclidean distances.
_CONTRAST = 0.15  # least distance of a figure's pixels from the ground: five sigma of noise of 0.03 per channel
_FAINT = 0.25  # least distance of a figure's colour from the ground; the closest two, orange and yellow, are 0.28 apart
_NOISE = 0.1  # distance that `fidelity` ignores: two standard deviations of noise of 0.03 per channel
_SATURATION = 0.35  # below this a colour has no name; the palest of COLOURS has 0.81
_EDGE = 3  # greatest width of a soft edge in pixels; the gap between figures is 4
_SPECK = 12  # least area of a figure in pixels; the smallest one drawn, a star of side 17, covers 110
_LIKENESS = 0.85  # least similarity to a silhouette; that of circle and square, the most similar two, is 0.83
_SOFTNESS = (
    0.01,
    0.04,
    0.07,
    0.1,
)  # blur of a figure's edges, relative to its side; 1 pixel is 0.06 of the smallest side drawn
_SMEARED = (0.13, 0.16, 0.2, 0.25, 0.3)  # a blob that is most similar to one of these is not a figure

_GRID = 40
_REACH = 1.15  # half the grid's side for a silhouette of area 1; the triangle's apex is at 0.94


@dataclass(frozen=True)
class FoundFigure:
    """A figure found in a picture; `shape` is None if no silhouette fits, and `colour` is None for a grey.

    x, y, side: centre and side of the bounding box in pixels, as in `scenes.Figure`. For an unknown shape: the centre
    of mass and the square root of the area.
    """

    shape: str | None
    colour: str | None
    rgb: tuple[float, float, float]
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Found:
    """What was found in a picture; `clutter` means that specks too small for a figure add up to the area of one."""

    ground: tuple[float, float, float]
    background: str | None  # one of COLOURS; None for a grey
    figures: tuple[FoundFigure, ...]
    clutter: bool

    @property
    def count(self) -> int:
        """The number of things on the ground, recognised or not."""
        return len(self.figures) + self.clutter

    @property
    def scene(self) -> Scene:
        """A flat scene made of the recognised figures."""
        figures = [Figure(f.shape, f.rgb, f.x, f.y, f.side) for f in self.figures if f.shape]
        return Scene(self.ground, tuple(figures))


def find_figures(image: np.ndarray) -> Found:
    """Find the figures in `image`, float (H, W, 3) in [0, 1].

    The ground is the median colour of the border. A pixel belongs to a figure if it is closer to the strongest contrast
    around it than to the ground, so a soft edge is cut halfway. Touching pixels form one figure.
    """
    _check(image)
    ground = np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)
    distance = np.linalg.norm(image - ground, axis=-1)
    peak = ndimage.maximum_filter(distance, 2 * _EDGE + 1)
    labels, _ = ndimage.label(distance > np.maximum(_CONTRAST, peak / 2), structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    figures = [_find_figure(image - ground, ground, labels == 1 + i) for i in np.flatnonzero(areas >= _SPECK)]
    return Found(_as_rgb(ground), _colour_name(ground), tuple(figures), bool(areas[areas < _SPECK].sum() >= _SPECK))


def _check(image: np.ndarray) -> None:
    expected = (IMAGE_SIZE, IMAGE_SIZE, 3)
    if image.shape != expected or not np.issubdtype(image.dtype, np.floating):
        raise ValueError(
            f"got an image of {image.dtype}, shape {image.shape}; expected floats in [0, 1], shape {expected}: divide "
            "bytes by 255, or use gold_scores, which takes tensors of any size"
        )
    if not 0 <= image.min() <= image.max() <= 1:
        raise ValueError(
            f"got pixels from {image.min():.3g} to {image.max():.3g}; expected [0, 1]: clamp a decoder's output; NaN "
            "means that the model has diverged or overflowed in half precision"
        )


def _find_figure(contrast: np.ndarray, ground: np.ndarray, mask: np.ndarray) -> FoundFigure:
    """Classify the figure under `mask`, (H, W); `contrast` is the image minus the ground, (H, W, 3)."""
    colour = _level(contrast[mask])
    coverage = _coverage(contrast, colour, mask)
    if coverage is None:
        shape, (_, x, y, side) = None, _normalise(mask.astype(float))
    else:
        shape, x, y, side = _recognise(coverage)
    return FoundFigure(shape, _colour_name(ground + colour), _as_rgb(ground + colour), x, y, side)


def _level(contrast: np.ndarray) -> np.ndarray:
    """The value, (C,), of a figure's pixels, (N, C), away from its soft edge."""
    strength = np.linalg.norm(contrast, axis=-1)
    return np.median(contrast[strength >= 0.8 * np.quantile(strength, 0.9)], axis=0)


def _coverage(contrast: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """How much of each pixel `colour` covers, (H, W), or None if this is not a figure.

    It is not a figure if the colour is faint, is one of several that cancel out, or continues beyond the edge.
    """
    strength = np.linalg.norm(colour)
    if strength < _FAINT:
        return None
    share = contrast @ colour / strength**2
    near = ndimage.maximum_filter(mask, 2 * _EDGE - 1)  # the mask's edge is the middle of the soft edge
    beyond = ndimage.maximum_filter(mask, 2 * _EDGE + 1) & ~near
    coverage = np.where(near, share, 0.0)
    flat = coverage.sum() >= mask.sum() / 2 and share[beyond].sum() <= beyond.sum() / 4
    return coverage if flat else None


def _recognise(coverage: np.ndarray) -> tuple[str | None, float, float, float]:
    """Shape, centre and side of the figure that covers each pixel by `coverage`, (H, W).

    Similarity to a silhouette is the Tanimoto coefficient a.b / (a.a + b.b - a.b), on a grid centred on the centre of
    mass and scaled by the area. For masks of zeros and ones it is intersection over union; for soft masks it
    distinguishes steep edges from smears.
    """
    silhouettes = _silhouettes()
    patch, x, y, scale = _normalise(coverage)
    dots = silhouettes.patches @ patch
    likeness = dots / (silhouettes.energies + patch @ patch - dots)
    best = int(likeness.argmax())
    if likeness[best] < _LIKENESS or silhouettes.softness[best] in _SMEARED:
        return None, x, y, scale
    side = scale * silhouettes.sides[best]
    dx, dy = silhouettes.offsets[best]
    return silhouettes.shapes[best], x + dx * side, y + dy * side, side


def _normalise(coverage: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """The coverage sampled on the grid, (G * G,), its centre of mass (x, y), and the square root of its area."""
    area = coverage.sum()
    scale = math.sqrt(area)
    y = (coverage.sum(axis=1) @ np.arange(coverage.shape[0])) / area
    x = (coverage.sum(axis=0) @ np.arange(coverage.shape[1])) / area
    steps = np.linspace(-_REACH, _REACH, _GRID) * scale
    points = np.meshgrid(y + steps, x + steps, indexing="ij")
    patch = ndimage.map_coordinates(coverage, points, order=1)
    return patch.ravel(), x + 0.5, y + 0.5, scale


@dataclass(frozen=True)
class _Silhouettes:
    """The filled, blurred and normalised outlines of SHAPES, with which figures are compared."""

    shapes: list[str]  # S names
    softness: list[float]  # S of _SOFTNESS or _SMEARED
    patches: np.ndarray  # (S, G * G)
    energies: np.ndarray  # (S,) squared norms
    sides: np.ndarray  # (S,) of the bounding box, for an area of 1
    offsets: np.ndarray  # (S, 2) from the centre of mass to the bounding box's centre, in sides


@cache
def _silhouettes() -> _Silhouettes:
    size, side = 256, 112
    black, white = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    kinds = list(itertools.product(SHAPES, _SOFTNESS + _SMEARED))
    patches, sides, offsets = [], [], []
    for shape, softness in kinds:
        figure = Figure(shape, white, IMAGE_SIZE / 2, IMAGE_SIZE / 2, side * IMAGE_SIZE / size)
        filled = ndimage.gaussian_filter(render(Scene(black, (figure,)), size)[..., 0] / 255, softness * side)
        level = _level(filled[filled > filled.max() / 2, None])
        patch, x, y, scale = _normalise(filled / level)
        patches.append(patch)
        sides.append(side / scale)
        offsets.append(((size / 2 - x) / side, (size / 2 - y) / side))
    energies = np.sum(np.square(patches), axis=1)
    shapes, softness = map(list, zip(*kinds, strict=True))
    return _Silhouettes(shapes, softness, np.array(patches), energies, np.array(sides), np.array(offsets))


def _as_rgb(colour: np.ndarray) -> tuple[float, float, float]:
    red, green, blue = np.clip(colour, 0.0, 1.0).tolist()
    return red, green, blue


def _colour_name(colour: np.ndarray) -> str | None:
    """The name in COLOURS with the closest hue; None for a grey."""
    hue, saturation, _ = colorsys.rgb_to_hsv(*_as_rgb(colour))
    if saturation < _SATURATION:
        return None
    return min(_HUES, key=lambda name: abs((hue - _HUES[name] + 0.5) % 1 - 0.5))


_HUES = {name: colorsys.rgb_to_hsv(*rgb)[0] for name, rgb in COLOURS.items()}


def gold_score(image: np.ndarray, prompt: str) -> float:
    """How well `image`, float (H, W, 3) in [0, 1], shows what `prompt` asks for, in [0, 1].

    The number of requested figures that were found, divided by the number requested or found, whichever is larger. The
    score is 0 if a matching figure is outside the requested place or the ground does not have the requested colour.

    Raises:
        ValueError: `scenes.parse` cannot read the prompt, or the image has the wrong dtype, shape or range.
    """
    request, found = parse(prompt), find_figures(image)
    if request.background and found.background != request.background:
        return 0.0
    remaining, matched = list(found.figures), []
    for item in sorted(request.items, key=lambda item: item.colour is None):  # items of any colour take what is left
        fitting = [f for f in remaining if f.shape == item.shape and item.colour in (None, f.colour)][: item.count]
        remaining = [f for f in remaining if f not in fitting]
        matched += fitting
    if request.place and any(_place(figure) != PLACES[request.place] for figure in matched):
        return 0.0
    return len(matched) / max(request.count, found.count)


def _place(figure: FoundFigure) -> tuple[bool, bool]:
    return figure.x > IMAGE_SIZE / 2, figure.y > IMAGE_SIZE / 2


def gold_scores(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """`gold_score` of each of `images`, (B, 3, any, any) in [0, 1], as (B,) float32 on the same device."""
    if len(images) != len(prompts):
        raise ValueError(
            f"got {number_of(len(images), 'image')} and {number_of(len(prompts), 'prompt')}; expected one "
            "prompt per image"
        )
    resized = F.interpolate(images.detach().float(), (IMAGE_SIZE, IMAGE_SIZE), mode="area")
    pictures = resized.permute(0, 2, 3, 1).cpu().double().numpy()
    scores = [gold_score(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return torch.tensor(scores, dtype=torch.float32, device=images.device)


def fidelity(image: np.ndarray) -> float:
    """How much of `image`, float (H, W, 3) in [0, 1], the flat shapes found in it explain, in [0, 1].

    1 - sum |image - scene| / sum |image - ground| over the pixels, at least 0. The scene is rendered from what was
    found, |.| is the distance between two colours, and 0.1 is subtracted from each distance (not below 0), so that
    noise is ignored but smears are not. A picture without figures scores 0.
    """
    found = find_figures(image)
    total = _unlikeness(image, np.array(found.ground))
    rest = _unlikeness(image, render(found.scene) / 255)
    return max(0.0, 1 - rest / total) if total else 0.0


def _unlikeness(image: np.ndarray, other: np.ndarray) -> float:
    return float(np.maximum(np.linalg.norm(image - other, axis=-1) - _NOISE, 0).sum())


def diversity(images: Sequence[np.ndarray] | np.ndarray, prompts: Sequence[str]) -> float:
    """Mean distance between two images, float (H, W, 3) in [0, 1], of the same prompt, averaged over the prompts.

    The distance is the root mean square difference after averaging down to 8 x 8 pixels, so it measures the places and
    colours of things and not their edges. NaN if no prompt has two images.
    """
    groups: dict[str, list[np.ndarray]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        _check(image)
        groups.setdefault(prompt, []).append(image.reshape(8, 8, 8, 8, 3).mean(axis=(1, 3)))
    pairs = [list(itertools.combinations(group, 2)) for group in groups.values() if len(group) > 1]
    means = [np.mean([math.sqrt(np.mean((a - b) ** 2)) for a, b in group]) for group in pairs]
    return float(np.mean(means)) if means else math.nan
