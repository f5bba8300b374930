"""The grammar reads what it writes, and every picture shows what its request asks for."""

import itertools
import random

import numpy as np
import pytest
from scipy import ndimage

from comfy_tdpo.shapes.scenes import (
    COLOURS,
    COUNTS,
    IMAGE_SIZE,
    OUTLINES,
    PLACES,
    SHAPES,
    Item,
    Request,
    parse,
    render,
    sample_request,
    sample_scene,
)


def every_request():
    """All that `sample_request` can draw."""
    grounds = [None, *COLOURS]
    for shape, colour, ground in itertools.product(SHAPES, COLOURS, grounds):
        for place in (None, *PLACES):
            yield Request((Item(shape, colour),), place, ground)
        for count in COUNTS:
            yield Request((Item(shape, colour, count),), None, ground)
    for (a, b), ground in itertools.product(itertools.permutations(SHAPES, 2), grounds):
        for one, other in [*itertools.permutations(COLOURS, 2), (None, None)]:
            yield Request((Item(a, one), Item(b, other)), None, ground)


@pytest.fixture(scope="module")
def pictures():
    rng = random.Random(0)
    requests = [sample_request(rng) for _ in range(400)]
    scenes = [sample_scene(request, rng) for request in requests]
    return [(request, scene, render(scene)) for request, scene in zip(requests, scenes, strict=True)]


def not_ground(picture: np.ndarray) -> np.ndarray:
    return (picture != picture[0, 0]).any(axis=-1)


def test_parse_inverts_caption():
    requests = list(every_request())
    assert len({request.caption for request in requests}) == len(requests)
    for request in requests:
        assert parse(request.caption) == request


def test_sampled_requests_are_among_all():
    rng, known = random.Random(1), set(every_request())
    assert all(sample_request(rng) in known for _ in range(2000))


@pytest.mark.parametrize(
    ("caption", "request_"),
    [
        ("an orange star", Request((Item("star", "orange"),))),
        ("  Two GREEN squares on a blue background ", Request((Item("square", "green", 2),), None, "blue")),
        ("three red crosses", Request((Item("cross", "red", 3),))),
        ("a circle and a star", Request((Item("circle"), Item("star")))),
        (
            "a yellow triangle at the top left on an orange background",
            Request((Item("triangle", "yellow"),), "top left", "orange"),
        ),
    ],
)
def test_parse_reads_english(caption, request_):
    assert parse(caption) == request_


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a photo of a dog",
        "a red circle.",
        "a pink circle",
        "five red circles",
        "a red circle and a blue star and a cross",
        "a red circle on a grey background",
        "a red circle on a blue background at the top left",
    ],
)
def test_foreign_captions_are_quoted_back(caption):
    with pytest.raises(ValueError) as error:
        parse(caption)
    assert repr(caption) in str(error.value)
    assert "expected" in str(error.value)


def test_figures_stay_inside(pictures):
    for _, _, picture in pictures:
        inside = not_ground(picture)
        inside[1:-1, 1:-1] = False
        assert not inside.any()


def test_figures_never_touch(pictures):
    for request, _, picture in pictures:
        _, count = ndimage.label(not_ground(picture), structure=np.ones((3, 3)))
        assert count == request.count, request.caption


def test_place_is_respected(pictures):
    placed = [(request, picture) for request, _, picture in pictures if request.place]
    assert len(placed) > 40
    for request, picture in placed:
        y, x = ndimage.center_of_mass(not_ground(picture))
        half = (IMAGE_SIZE - 1) / 2
        assert (x > half, y > half) == PLACES[request.place], request.caption


def test_scenes_hold_what_was_asked_for(pictures):
    """Shapes and counts as requested; a named colour up to its brightness; free colours unlike anything named."""
    for request, scene, _ in pictures:
        wanted = [item for item in request.items for _ in range(item.count)]
        assert [figure.shape for figure in scene.figures] == [item.shape for item in wanted]
        for item, figure in zip(wanted, scene.figures, strict=True):
            names = [item.colour] if item.colour else [name for name in COLOURS if name != request.background]
            assert any(is_shade(figure.rgb, COLOURS[name]) for name in names), request.caption
        if request.background:
            assert is_shade(scene.ground, COLOURS[request.background])
        else:
            assert len(set(scene.ground)) == 1


def is_shade(rgb, colour) -> bool:
    """Is `rgb` a multiple of `colour`, in the range of brightness that scenes use?"""
    factors = np.divide(rgb, colour)
    return np.ptp(factors) < 1e-9 and 0.8 <= factors[0] <= 1


def test_pictures_show_the_colours_of_their_scene(pictures):
    """Half a grey level of rounding is all that may lie between a scene and its picture, away from edges."""
    for request, scene, picture in pictures:
        assert np.abs(picture[0, 0] / 255 - scene.ground).max() <= 0.5 / 255 + 1e-9
        for figure in scene.figures:
            if figure.shape in ("circle", "square", "star", "cross"):  # these have their box's centre inside
                centre = picture[int(figure.y), int(figure.x)] / 255
                assert np.abs(centre - figure.rgb).max() <= 0.5 / 255 + 1e-9, request.caption


def test_outlines_fill_their_box():
    assert set(OUTLINES) == set(SHAPES)
    for outline in OUTLINES.values():
        assert np.min(outline, axis=0) == pytest.approx([-1, -1])
        assert np.max(outline, axis=0) == pytest.approx([1, 1])


def test_same_seed_same_pictures():
    def draw(seed):
        rng = random.Random(seed)
        requests = [sample_request(rng) for _ in range(20)]
        return [(request, render(sample_scene(request, rng)).tobytes()) for request in requests]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
