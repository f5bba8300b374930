"""The captions of Shapes and the pictures that match them.

A `Request` is the meaning of a caption; a `Scene` is one of the many pictures that match it. What the caption leaves
open (the size of the shapes, the brightness of a plain background, where things are) is drawn at random, so that a
reward has something to choose from. The grammar covers what the complex prompts of arXiv 2402.08552, Appendix C, test:
colour, count, composition and location.
"""

import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 64

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (0.90, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.10),
    "green": (0.10, 0.72, 0.20),
    "blue": (0.12, 0.25, 0.92),
    "purple": (0.62, 0.12, 0.80),
}
COUNTS = {2: "two", 3: "three", 4: "four"}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}

_SUPERSAMPLING = 4
_GAP = 4  # pixels between two shapes, so that they never touch


@dataclass(frozen=True)
class Item:
    """`count` shapes of one kind; `colour` None means any colour."""

    shape: str
    colour: str | None = None
    count: int = 1

    @property
    def caption(self) -> str:
        colour = f"{self.colour} " if self.colour else ""
        if self.count > 1:
            return f"{COUNTS[self.count]} {colour}{_plural(self.shape)}"
        return _with_article(f"{colour}{self.shape}")


@dataclass(frozen=True)
class Request:
    """What a caption asks for; `place` is one of PLACES or None, and `background` is one of COLOURS or None."""

    items: tuple[Item, ...]
    place: str | None = None
    background: str | None = None

    @property
    def count(self) -> int:
        return sum(item.count for item in self.items)

    @property
    def caption(self) -> str:
        text = " and ".join(item.caption for item in self.items)
        if self.place:
            text += f" at the {self.place}"
        if self.background:
            text += f" on {_with_article(self.background)} background"
        return text


@dataclass(frozen=True)
class Figure:
    """One drawn shape: centre (x, y) and side of its bounding box in pixels, colour in [0, 1]."""

    shape: str
    rgb: tuple[float, float, float]
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """One picture: a flat ground and the figures on it."""

    ground: tuple[float, float, float]
    figures: tuple[Figure, ...]


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_NUMBERS = {"a": 1, "an": 1} | {word: number for number, word in COUNTS.items()}
_KINDS = {name: shape for shape in SHAPES for name in (shape, _plural(shape))}
_ITEM = rf"({'|'.join(_NUMBERS)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(_KINDS)})"
_CAPTION = re.compile(
    rf"{_ITEM}(?: and {_ITEM})?(?: at the ({'|'.join(PLACES)}))?(?: on an? ({'|'.join(COLOURS)}) background)?"
)


def parse(caption: str) -> Request:
    """The request that a caption expresses; the inverse of `Request.caption`.

    Raises:
        ValueError: the caption does not follow the grammar.
    """
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"shapes cannot read the prompt {caption!r}; expected something like 'a red circle', 'two green squares "
            "on a blue background', 'a circle and a star' or 'a yellow triangle at the top left'"
        )
    words = match.groups()
    items = [Item(_KINDS[words[i + 2]], words[i + 1], _NUMBERS[words[i]]) for i in (0, 3) if words[i + 2]]
    return Request(tuple(items), place=words[6], background=words[7])


def sample_request(rng: random.Random) -> Request:
    """Draw a random request: one shape (45 %), several of a kind (25 %), or two different ones (30 %)."""
    kind = rng.choices(("one", "several", "two"), (0.45, 0.25, 0.30))[0]
    place = None
    if kind == "two":
        shapes = rng.sample(SHAPES, 2)
        colours = rng.sample(list(COLOURS), 2) if rng.random() < 0.5 else [None, None]
        items = tuple(Item(shape, colour) for shape, colour in zip(shapes, colours, strict=True))
    elif kind == "several":
        items = (Item(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(COUNTS))),)
    else:
        items = (Item(rng.choice(SHAPES), rng.choice(list(COLOURS))),)
        place = rng.choice(list(PLACES)) if rng.random() < 0.4 else None
    background = None
    if rng.random() < 0.3:
        taken = {item.colour for item in items}
        background = rng.choice([colour for colour in COLOURS if colour not in taken])
    return Request(items, place, background)


def sample_scene(request: Request, rng: random.Random) -> Scene:
    """Draw a random scene that matches `request`."""
    brightness = rng.uniform(0.12, 0.95)
    ground = _shade(COLOURS[request.background], rng) if request.background else (brightness,) * 3
    wanted = [(item.shape, item.colour) for item in request.items for _ in range(item.count)]
    taken = {request.background} | {colour for _, colour in wanted}
    free = [colour for colour in COLOURS if colour not in taken]
    boxes = _place_boxes(len(wanted), request.place, rng)
    figures = [
        Figure(shape, _shade(COLOURS[colour or rng.choice(free)], rng), x, y, side)
        for (shape, colour), (x, y, side) in zip(wanted, boxes, strict=True)
    ]
    return Scene(ground, tuple(figures))


def _shade(rgb: tuple[float, float, float], rng: random.Random) -> tuple[float, float, float]:
    factor = rng.uniform(0.8, 1.0)
    return (rgb[0] * factor, rgb[1] * factor, rgb[2] * factor)


def _place_boxes(count: int, place: str | None, rng: random.Random) -> list[tuple[float, float, float]]:
    """Centres and sides of `count` random boxes inside the image, at least _GAP pixels apart."""
    smallest, largest = {1: (20, 48), 2: (18, 30), 3: (18, 25), 4: (17, 23)}[count]
    if place is not None:
        largest = 28
    while True:
        boxes = [_box(rng.uniform(smallest, largest), place, rng) for _ in range(count)]
        apart = all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= (a[2] + b[2]) / 2 + _GAP
            for i, a in enumerate(boxes)
            for b in boxes[i + 1 :]
        )
        if apart:
            return boxes


def _box(side: float, place: str | None, rng: random.Random) -> tuple[float, float, float]:
    low, high = side / 2 + 1, IMAGE_SIZE - side / 2 - 1
    if place is None:
        return rng.uniform(low, high), rng.uniform(low, high), side
    reach = IMAGE_SIZE * 3 / 8  # the centre is at most this far from the two edges of its corner
    centre = [rng.uniform(IMAGE_SIZE - reach, high) if far else rng.uniform(low, reach) for far in PLACES[place]]
    return centre[0], centre[1], side


def render(scene: Scene, size: int = IMAGE_SIZE) -> np.ndarray:
    """The scene as an RGB image, uint8 (size, size, 3), anti-aliased."""
    scale = _SUPERSAMPLING * size / IMAGE_SIZE
    canvas = Image.new("RGB", (_SUPERSAMPLING * size,) * 2, _to_bytes(scene.ground))
    draw = ImageDraw.Draw(canvas)
    for figure in scene.figures:
        outline = [
            ((figure.x + u * figure.side / 2) * scale, (figure.y + v * figure.side / 2) * scale)
            for u, v in OUTLINES[figure.shape]
        ]
        draw.polygon(outline, fill=_to_bytes(figure.rgb))
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX))


def _to_bytes(rgb: tuple[float, float, float]) -> tuple[int, int, int]:
    return (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))


def _fill_box(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Stretch an outline to the square [-1, 1] x [-1, 1]."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [
        (2 * (x - min(xs)) / (max(xs) - min(xs)) - 1, 2 * (y - min(ys)) / (max(ys) - min(ys)) - 1) for x, y in points
    ]


def _around(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
    return [(r * math.sin(a), -r * math.cos(a)) for a, r in zip(angles, radii, strict=True)]


_ARM = 0.36  # half the width of a cross's arms

# Outlines in [-1, 1] x [-1, 1], y down, each touching all four sides.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _around([math.tau * i / 48 for i in range(48)], [1.0] * 48),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1), (1, 1), (-1, 1)],
    "star": _fill_box(_around([math.tau * i / 10 for i in range(10)], [1.0, 0.42] * 5)),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip
