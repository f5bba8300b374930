"""What `shapes-match` learns from: scenes with exact labels, spoilt by degrees until nothing can be recognised.

Reward-tuned images have dark grounds, large figures, and figures that are dark, pale, soft or warped. These scenes have
them too. Each is labelled with whether a caption is true of it, times how well its figures can be recognised, so that
the cosine falls when they no longer can. The labels follow from how a scene was made; no reward is consulted.

B: scenes, M: captions or scenes, K = 5 * 6 kinds of figures (shape and colour), H W: pixels.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizerFast

from .encoders import MatchEncoder, tokenize
from .scenes import (
    COLOURS,
    COUNTS,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    Figure,
    Request,
    Scene,
    render,
    sample_request,
    sample_scene,
)

# A quantity at its first bound or beyond leaves nothing to recognise, and at its second or beyond, nothing to guess.
# Colours are points in [0, 1]^3: chroma is the largest minus the smallest channel, contrast the distance to the ground.
CHROMA = (0.10, 0.30)
CONTRAST = (0.10, 0.30)
# In sides of the smallest figure: the standard deviations of the blur and of the warp's displacement.
BLUR = (0.20, 0.08)
WARP = (0.20, 0.08)

T = TypeVar("T")

HARD_CAPTIONS = 3  # captions of each scene that differ from its own in one attribute


@dataclass(frozen=True)
class Meanings:
    """What captions ask for, or what scenes show; -1 stands for no place or a grey ground, or for "any".

    kinds: (M, K), how many figures of each shape and colour; shapes: (M, 5), how many of each shape; any_colour: (M,),
    whether the colours are left open; place, ground: (M,), indices into PLACES and COLOURS.
    """

    kinds: Tensor
    shapes: Tensor
    any_colour: Tensor
    place: Tensor
    ground: Tensor

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "Meanings":
        places, colours = list(PLACES), list(COLOURS)
        shapes, kinds = [], []
        for request in requests:
            counts = Counter((item.shape, item.colour) for item in request.items for _ in range(item.count))
            kinds.append([counts[shape, colour] for shape in SHAPES for colour in COLOURS])
            shapes.append([sum(counts[shape, colour] for colour in (None, *COLOURS)) for shape in SHAPES])
        return cls(
            torch.tensor(kinds),
            torch.tensor(shapes),
            torch.tensor([all(item.colour is None for item in request.items) for request in requests]),
            torch.tensor([places.index(r.place) if r.place else -1 for r in requests]),
            torch.tensor([colours.index(r.background) if r.background else -1 for r in requests]),
        )

    def __getitem__(self, rows: Tensor) -> "Meanings":
        return Meanings(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def are_true_of(self, shown: "Meanings") -> Tensor:
        """Whether each caption is true of each scene in `shown`: bool (B, M)."""
        same_kinds = (shown.kinds[:, None] == self.kinds).all(-1)
        same_shapes = (shown.shapes[:, None] == self.shapes).all(-1)
        figures = torch.where(self.any_colour, same_shapes, same_kinds)
        places = (self.place == -1) | (shown.place[:, None] == self.place)
        return figures & places & ((self.ground == -1) | (shown.ground[:, None] == self.ground))


class Matching:
    """The training data of `shapes-match` and its loss.

    Args:
        seed: of the scenes; count: their number; tokenizer: the world's.
    """

    def __init__(self, seed: int, count: int, tokenizer: CLIPTokenizerFast):
        rng = random.Random(seed)
        asked = [sample_request(rng) for _ in range(count)]
        scenes, shown = zip(*[spoilt_scene(request, rng) for request in asked], strict=True)
        captions = [c for request in asked for c in (request, *hard_captions(request, rng))]
        self.tokens = tokenize(tokenizer, [c.caption for c in captions]).view(count, -1, tokenizer.model_max_length)
        self.asked, self.shown = Meanings.of(captions), Meanings.of(shown)
        self.clarity = torch.tensor([clarity(scene, request) for scene, request in zip(scenes, asked, strict=True)])
        self.sides = torch.tensor([min(figure.side for figure in scene.figures) for scene in scenes])
        pixels = [render(scene) for scene in tqdm(scenes, desc="scenes", leave=False)]
        self.images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()

    def loss(self, encoder: MatchEncoder, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The sigmoid loss (SigLIP, Zhai et al., 2023) of the scenes in `rows`, (B,), with all their captions."""
        images, kept = spoil(self.images[rows].float() / 255, self.sides[rows], generator)
        width = self.tokens.shape[1]
        captions = (rows[:, None] * width + torch.arange(width)).flatten()
        target = self.asked[captions].are_true_of(self.shown[rows]) * (self.clarity[rows] * kept)[:, None]
        text = encoder.embed_tokens(self.tokens[rows].flatten(0, 1))
        logits = encoder.logit_scale.exp() * encoder.embed_images(images) @ text.T + encoder.logit_bias
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(rows)


def spoilt_scene(request: Request, rng: random.Random) -> tuple[Scene, Request]:
    """A scene for `request` of any size and brightness, and the request that says all about it.

    Its figures are darkened and greyed, sometimes beyond recognition, and resized as far as there is room. Half of the
    plain grounds are dark.
    """
    taken = {request.background} | {item.colour for item in request.items}
    free = [colour for colour in COLOURS if colour not in taken]
    items = tuple(replace(item, colour=item.colour or rng.choice(free)) for item in request.items)
    scene = sample_scene(replace(request, items=items), rng)
    size = rng.uniform(0.8, max(0.8, min(1.8, _room(scene.figures))))
    dark, grey = 1 - 0.85 * rng.random() ** 3, 0.9 * rng.random() ** 4
    figures = tuple(
        replace(figure, side=figure.side * size, rgb=_faded(figure.rgb, dark, grey)) for figure in scene.figures
    )
    ground = scene.ground
    if request.background:
        ground = _faded(ground, 1 - 0.7 * rng.random() ** 3, 0.6 * rng.random() ** 4)
    else:
        level = rng.uniform(0, 0.3) if rng.random() < 0.5 else ground[0]
        ground = _clipped(*(level + rng.uniform(-0.03, 0.03) for _ in range(3)))
    return Scene(ground, figures), Request(items, _place(figures), request.background)


def _room(figures: Sequence[Figure]) -> float:
    """The factor by which `figures` can grow without touching each other or the border."""
    inside = [2 * min(f.x, f.y, IMAGE_SIZE - f.x, IMAGE_SIZE - f.y) / f.side for f in figures]
    apart = [
        2 * (max(abs(a.x - b.x), abs(a.y - b.y)) - 2) / (a.side + b.side)
        for i, a in enumerate(figures)
        for b in figures[i + 1 :]
    ]
    return min(inside + apart)


def _place(figures: Sequence[Figure]) -> str | None:
    corners = {(int(f.x > IMAGE_SIZE / 2), int(f.y > IMAGE_SIZE / 2)) for f in figures}
    return next((name for name, corner in PLACES.items() if corners == {corner}), None)


def _faded(rgb: tuple[float, float, float], dark: float, grey: float) -> tuple[float, float, float]:
    mean = sum(rgb) / 3
    return _clipped(*(dark * (grey * mean + (1 - grey) * value) for value in rgb))


def _clipped(red: float, green: float, blue: float) -> tuple[float, float, float]:
    return min(max(red, 0.0), 1.0), min(max(green, 0.0), 1.0), min(max(blue, 0.0), 1.0)


def clarity(scene: Scene, request: Request) -> float:
    """How well the colours of `scene` can be recognised, 0 to 1: the figures', and the ground's if it counts."""
    parts = [_ramp(max(f.rgb) - min(f.rgb), CHROMA) for f in scene.figures]
    parts += [_ramp(math.dist(f.rgb, scene.ground), CONTRAST) for f in scene.figures]
    if request.background:
        parts.append(_ramp(max(scene.ground) - min(scene.ground), CHROMA))
    return min(parts)


def _ramp(value: float, bounds: tuple[float, float]) -> float:
    return min(max((value - bounds[0]) / (bounds[1] - bounds[0]), 0.0), 1.0)


def hard_captions(request: Request, rng: random.Random) -> list[Request]:
    """HARD_CAPTIONS requests, each of which differs from `request` in one attribute."""
    return [rng.choice(_EDITS)(request, rng) for _ in range(HARD_CAPTIONS)]


def _other(values: Iterable[T], value: T, rng: random.Random) -> T:
    return rng.choice([other for other in values if other != value])


def _edit(request: Request, index: int, **change: Any) -> Request:
    """`request` with another item `index`."""
    items = list(request.items)
    items[index] = replace(items[index], **change)
    return replace(request, items=tuple(items))


def _edit_colour(request: Request, rng: random.Random) -> Request:
    if request.items[0].colour is None:
        return _edit_shape(request, rng)
    index = rng.randrange(len(request.items))
    return _edit(request, index, colour=_other(COLOURS, request.items[index].colour, rng))


def _edit_shape(request: Request, rng: random.Random) -> Request:
    index = rng.randrange(len(request.items))
    return _edit(request, index, shape=_other(SHAPES, request.items[index].shape, rng))


def _edit_count(request: Request, rng: random.Random) -> Request:
    """One item more or fewer if there are two, or another count of the only one."""
    if len(request.items) > 1:
        return replace(request, items=(rng.choice(request.items),))
    return _edit(request, 0, count=_other((1, *COUNTS), request.items[0].count, rng))


def _edit_surroundings(request: Request, rng: random.Random) -> Request:
    """Another place or background where the request names one, or else another colour."""
    if request.place:
        return replace(request, place=_other(PLACES, request.place, rng))
    if request.background:
        return replace(request, background=_other(COLOURS, request.background, rng))
    return _edit_colour(request, rng)


_EDITS: tuple[Callable[[Request, random.Random], Request], ...] = (
    _edit_colour,
    _edit_shape,
    _edit_count,
    _edit_surroundings,
)


def spoil(images: Tensor, sides: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Badly drawn versions of `images`, (B, 3, H, W), and how well their shapes can still be recognised, (B,), 0 to 1.

    Smoothly warped, a quarter of them blurred, then with another gamma, brightness and tint, with blotches and noise.
    sides: (B,) the side of the smallest figure in pixels.
    """
    count, shape = len(images), (len(images), 1, 1, 1)

    def uniform(low: float, high: float, shape: Sequence[int] = shape) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    def smooth(channels: int) -> Tensor:
        """Noise of mean 0 and standard deviation of about 1 that varies over a sixth of the image."""
        coarse = torch.randn(count, channels, 6, 6, generator=generator)
        return F.interpolate(coarse, images.shape[-2:], mode="bicubic") / 0.7

    warp = 4 * uniform(0, 1) ** 4  # pixels
    images = _warped(images, warp * smooth(2))
    deviation = 0.4 + 3.6 * torch.rand((), generator=generator).item() ** 2  # pixels
    chosen = uniform(0, 1) < 1 / 4
    images = torch.where(chosen, _blurred(images, deviation), images)
    kept = torch.minimum(_ramps(warp.flatten() / sides, WARP), _ramps(chosen.flatten() * deviation / sides, BLUR))
    tint = uniform(0.8, 1.1) * uniform(0.92, 1.08, (count, 3, 1, 1))
    images = tint * images.clamp(1e-4, 1) ** uniform(0.75, 1.4)  # the bound keeps 0 away from a fractional power
    images = images + 0.06 * uniform(0, 1) ** 2 * smooth(3)
    return images + 0.1 * uniform(0, 1) ** 2 * torch.randn(images.shape, generator=generator), kept


def _ramps(values: Tensor, bounds: tuple[float, float]) -> Tensor:
    return ((values - bounds[0]) / (bounds[1] - bounds[0])).clamp(0, 1)


def _warped(images: Tensor, shift: Tensor) -> Tensor:
    """`images` displaced by `shift`, (B, 2, H, W) pixels; beyond the border they continue with its colours."""
    height, width = images.shape[-2:]
    identity = torch.eye(2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    grid = grid + shift.permute(0, 2, 3, 1) * torch.tensor([2 / width, 2 / height])
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """`images` after a Gaussian blur of standard deviation `deviation` pixels."""
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    row = (weights / weights.sum()).expand(3, 1, 1, -1)
    images = F.pad(images, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(images, row, groups=3), row.mT, groups=3)
