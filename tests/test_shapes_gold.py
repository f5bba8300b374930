"""The gold measure against scenes whose content is known, and against pictures that show nothing."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from comfy_tdpo.shapes.gold import diversity, fidelity, find_figures, gold_score, gold_scores
from comfy_tdpo.shapes.scenes import (
    COLOURS,
    COUNTS,
    PLACES,
    SHAPES,
    Figure,
    Item,
    Request,
    Scene,
    render,
    sample_scene,
)

GREY, RED, BLUE = (0.5, 0.5, 0.5), COLOURS["red"], COLOURS["blue"]
EACH = 200  # pictures of each kind of caption


def draw_requests(rng: random.Random) -> dict[str, Request]:
    """One request of every kind of caption."""
    colour, other, ground = rng.sample(list(COLOURS), 3)
    shape, second = rng.sample(SHAPES, 2)
    place, count = rng.choice(list(PLACES)), rng.choice(list(COUNTS))
    one, several = (Item(shape, colour),), (Item(shape, colour, count),)
    pair, free = (Item(shape, colour), Item(second, other)), (Item(shape), Item(second))
    return {
        "colour": Request(one),
        "background": Request(one, None, ground),
        "place": Request(one, place),
        "place and background": Request(one, place, ground),
        "count": Request(several),
        "count and background": Request(several, None, ground),
        "pair": Request(pair),
        "pair and background": Request(pair, None, ground),
        "free pair": Request(free),
        "free pair and background": Request(free, None, ground),
    }


KINDS = list(draw_requests(random.Random(0)))


@pytest.fixture(scope="module")
def pictures() -> dict[str, list[tuple[Request, np.ndarray]]]:
    """EACH requests of every kind, and a picture that fulfils each, float (64, 64, 3)."""
    rng = random.Random(0)
    drawn = [draw_requests(rng) for _ in range(EACH)]
    return {kind: [(row[kind], render(sample_scene(row[kind], rng)) / 255) for row in drawn] for kind in KINDS}


def fulfilled(pairs) -> float:
    """The share of (request, picture) pairs with a full score."""
    return np.mean([gold_score(picture, request.caption) == 1 for request, picture in pairs])


def photograph(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Out of focus by one pixel, with noise of 0.03."""
    blurred = ndimage.gaussian_filter(picture, (1, 1, 0))
    return np.clip(blurred + 0.03 * rng.standard_normal(picture.shape), 0, 1)


def draw(*figures: Figure, ground=GREY) -> np.ndarray:
    return render(Scene(ground, figures)) / 255


@pytest.mark.parametrize("kind", KINDS)
def test_clean_pictures_score_one(pictures, kind):
    assert fulfilled(pictures[kind]) >= 0.99  # what the measure is asked for


@pytest.mark.parametrize("kind", KINDS)
def test_soft_and_noisy_pictures_score_one(pictures, kind):
    rng = np.random.default_rng(0)
    assert fulfilled((request, photograph(picture, rng)) for request, picture in pictures[kind]) >= 0.95


def another(rng: random.Random, values, *taken):
    return rng.choice([value for value in values if value not in taken])


def change_item(request: Request, **changes) -> Request:
    first, *rest = request.items
    return dataclasses.replace(request, items=(dataclasses.replace(first, **changes), *rest))


def wrong_requests(request: Request, rng: random.Random) -> dict[str, Request]:
    """The requests that differ from `request` in one thing it says, by that thing."""
    first = request.items[0]
    wrong = {"shape": change_item(request, shape=another(rng, SHAPES, *(item.shape for item in request.items)))}
    if first.colour:
        wrong["colour"] = change_item(request, colour=another(rng, COLOURS, first.colour))
    if len(request.items) == 1:
        wrong["count"] = change_item(request, count=another(rng, (1, *COUNTS), first.count))
    elif first.colour:
        shapes = reversed([item.shape for item in request.items])
        items = [dataclasses.replace(item, shape=shape) for item, shape in zip(request.items, shapes, strict=True)]
        wrong["colours swapped"] = dataclasses.replace(request, items=tuple(items))
    if request.place:
        wrong["place"] = dataclasses.replace(request, place=another(rng, PLACES, request.place))
    ground = another(rng, COLOURS, request.background)  # of a grey ground too: "a red circle" is not on green
    return wrong | {"background": dataclasses.replace(request, background=ground)}


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_captions_do_not_score_one(pictures, kind):
    rng, scores = random.Random(1), {}
    for request, picture in pictures[kind][:60]:
        for change, wrong in wrong_requests(request, rng).items():
            scores.setdefault(change, []).append(gold_score(picture, wrong.caption))
    for change, values in scores.items():
        assert np.mean(np.array(values) == 1) < 0.02, change  # at most one of 60: two ambiguous pictures are too many


def meaningless_pictures(rng: np.random.Generator):
    """Pictures without a figure, in the colours of the world, which are the likeliest to pass for one."""
    x, y = np.meshgrid(np.linspace(0, 1, 64), np.linspace(0, 1, 64))
    colours = list(COLOURS.values())
    for name in ("flat", "linear gradient", "cone", "hill", "checkerboard", "stripes", "uniform noise", "normal noise"):
        one, other = (np.array(colours[i]) for i in rng.choice(6, 2, replace=False))
        angle, radius = rng.uniform(0, math.tau), np.hypot(x - rng.uniform(0.3, 0.7), y - rng.uniform(0.3, 0.7))
        cell, width = rng.choice([1, 2, 4, 8, 16, 32]), rng.uniform(0.1, 0.4)
        column, row = np.floor(64 * np.array([x, y]) * 0.999) // cell
        share = {
            "flat": np.zeros((64, 64)),
            "linear gradient": 0.5 + 0.35 * (2 * x - 1) * np.cos(angle) + 0.35 * (2 * y - 1) * np.sin(angle),
            "cone": np.clip(1 - radius / (2 * width), 0, 1),
            "hill": np.exp(-((radius / width) ** 2) / 2),
            "checkerboard": (row + column) % 2,
            "stripes": row % 2,
        }
        if name == "uniform noise":
            yield name, rng.random((64, 64, 3))
        elif name == "normal noise":
            yield name, np.clip(one + rng.choice([0.1, 0.3]) * rng.standard_normal((64, 64, 3)), 0, 1)
        else:
            yield name, share[name][..., None] * one + (1 - share[name][..., None]) * other


def test_meaningless_pictures_score_nothing():
    rng, scores, explained = np.random.default_rng(0), {}, {}
    requests = random.Random(0)
    for _ in range(12):
        prompts = {kind: request.caption for kind, request in draw_requests(requests).items()}
        for name, picture in meaningless_pictures(rng):
            explained.setdefault(name, []).append(fidelity(picture))
            for kind, prompt in prompts.items():
                scores.setdefault((name, kind), []).append(gold_score(picture, prompt))
    # of twelve pictures of a kind at most one may pass for half of what is asked
    assert {pair: np.mean(values) for pair, values in scores.items() if np.mean(values) >= 0.05} == {}
    assert {name: np.mean(values) for name, values in explained.items() if np.mean(values) >= 0.05} == {}


def test_figures_are_found_where_they_were_drawn(pictures):
    """To a pixel: the renderer's polygons are a quarter of a pixel larger than their outlines; colours to a level."""
    rng = random.Random(2)
    for kind in KINDS:
        for request, _ in pictures[kind][:10]:
            scene = sample_scene(request, rng)
            found = find_figures(render(scene) / 255)
            assert found.background == request.background
            assert not found.clutter
            assert len(found.figures) == len(scene.figures)
            for figure in scene.figures:
                near = min(found.figures, key=lambda other: math.hypot(other.x - figure.x, other.y - figure.y))
                assert near.shape == figure.shape
                assert (near.x, near.y, near.side) == pytest.approx((figure.x, figure.y, figure.side), abs=1)
                assert near.rgb == pytest.approx(figure.rgb, abs=1 / 255)


CIRCLE, STAR = Figure("circle", RED, 18, 18, 24), Figure("star", BLUE, 46, 46, 26)


@pytest.mark.parametrize(
    ("prompt", "score"),
    [
        ("a red circle and a blue star", 1),
        ("a circle and a star", 1),
        ("a star and a circle", 1),
        ("a red circle", 1 / 2),  # the star was not asked for
        ("a red circle and a red star", 1 / 2),
        ("a blue circle and a red star", 0),
        ("two red circles", 1 / 2),
        ("four red circles", 1 / 4),
        ("a circle and a red circle", 1 / 2),  # one circle is not two
        ("a red circle at the top left", 1 / 2),
        ("a red circle at the bottom left", 0),
        ("a red circle and a blue star on a green background", 0),
    ],
)
def test_score_by_hand(prompt, score):
    assert gold_score(draw(CIRCLE, STAR), prompt) == pytest.approx(score)


def test_named_colours_are_matched_before_free_ones():
    picture = draw(CIRCLE, dataclasses.replace(STAR, shape="circle"))
    assert gold_score(picture, "a circle and a red circle") == 1


def test_clutter_counts_as_one_thing():
    """Each speck is too small for a figure; together they are not."""
    picture = draw(CIRCLE)
    picture[40:60:5, 40:60:5] = BLUE
    assert find_figures(picture).clutter
    assert gold_score(picture, "a red circle") == 1 / 2


def test_shapes_outside_the_vocabulary_are_unknown():
    """A bar, half a disc, figures that overlap and squares that meet in a corner are one thing each, and unnamed."""
    bar, half, overlap, corner = draw(), draw(CIRCLE), draw(CIRCLE, dataclasses.replace(STAR, x=30, y=30)), draw()
    bar[20:30, 10:50] = RED
    half[:18] = GREY
    corner[10:30, 10:30] = corner[30:50, 30:50] = RED
    for picture in (bar, half, overlap, corner):
        assert [figure.shape for figure in find_figures(picture).figures] == [None]


def test_faint_figures_are_unknown():
    """0.2 from the ground: nearer than any two colours of the world."""
    faint = dataclasses.replace(CIRCLE, rgb=(0.62, 0.62, 0.62))
    assert [figure.shape for figure in find_figures(draw(faint)).figures] == [None]


def test_colours_that_cancel_out_are_no_figure():
    """White on black on a dark ground: of the black, as much is missing as of the white is there."""
    picture = draw(ground=(0.4, 0.4, 0.4))
    picture[16:46, 16:46] = 0
    picture[24:38, 24:38] = 1
    assert [figure.shape for figure in find_figures(picture).figures] == [None]


def test_neighbours_stay_apart_out_of_focus():
    """Four pixels between them, as little as scenes leave, and a blur of 1.5: the ground there is a sixth yellow."""
    yellow = COLOURS["yellow"]
    picture = draw(Figure("square", yellow, 18, 32, 24), Figure("square", yellow, 46, 32, 24), ground=(0.1, 0.1, 0.1))
    assert gold_score(ndimage.gaussian_filter(picture, (1.5, 1.5, 0)), "two yellow squares") == 1


def test_colours_without_hue_have_no_name():
    found = find_figures(draw(dataclasses.replace(CIRCLE, rgb=(0.9, 0.9, 0.88)), ground=(0.2, 0.2, 0.2)))
    assert (found.figures[0].shape, found.figures[0].colour, found.background) == ("circle", None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_fidelity_of_clean_pictures(pictures, kind):
    assert min(fidelity(picture) for _, picture in pictures[kind][:40]) >= 0.95


def test_fidelity_forgives_noise_and_falls_with_every_smear(pictures):
    rng = np.random.default_rng(0)
    clean = [picture for kind in KINDS for _, picture in pictures[kind][:10]]
    noisy = [np.clip(picture + 0.03 * rng.standard_normal(picture.shape), 0, 1) for picture in clean]
    smeared = [[ndimage.gaussian_filter(p, (sigma, sigma, 0)) for p in clean] for sigma in (0, 1, 2, 4)]
    means = [np.mean([fidelity(p) for p in row]) for row in smeared]
    assert np.mean([fidelity(p) for p in noisy]) >= 0.95
    assert (np.diff(means) < -0.03).all(), means


def test_fidelity_falls_with_what_is_unexplained():
    """A second figure as large as the first, of no known shape, leaves half of the picture unexplained."""
    picture = draw(Figure("square", RED, 16, 32, 20))
    picture[12:52, 40:50] = RED
    assert fidelity(picture) == pytest.approx(0.5, abs=0.03)  # the square's edge pixels


def test_diversity_by_hand():
    """Grey levels 0, 0.3 and 0.9 are 0.3, 0.6 and 0.9 apart, 0.6 on average; the lone prompt has no pair."""
    levels = [np.full((64, 64, 3), level) for level in (0.0, 0.3, 0.9, 0.5, 0.5, 0.7)]
    prompts = ["a", "a", "a", "b", "b", "c"]
    assert diversity(levels, prompts) == pytest.approx((0.6 + 0.0) / 2)
    assert diversity(np.stack(levels), prompts) == diversity(levels, prompts)
    assert math.isnan(diversity(levels[:1], prompts[:1]))
    assert math.isnan(diversity([], []))


def test_diversity_ignores_detail():
    """Checkerboards of 4 pixels and their negatives average to the same grey."""
    board = np.repeat((np.indices((64, 64)) // 4).sum(axis=0)[..., None] % 2, 3, axis=-1).astype(float)
    assert diversity([board, 1 - board], ["a", "a"]) == pytest.approx(0)


@pytest.mark.parametrize("size", [64, 96, 192, 512])
def test_batches_agree_with_single_pictures(pictures, size):
    rows = [pictures[kind][0] for kind in KINDS]
    rng = random.Random(3)
    scenes = [sample_scene(request, rng) for request, _ in rows]
    images = np.stack([render(scene, size) for scene in scenes])
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    scores = gold_scores(tensor, [request.caption for request, _ in rows])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0] * len(rows)
    assert gold_scores(tensor.flip(0), [request.caption for request, _ in rows]).sum() < len(rows)


def test_large_pictures_are_averaged_down():
    """Noise of 0.115, far more than is forgiven, over 16 pixels each."""
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, (256, 256, 3))
    red = dataclasses.replace(CIRCLE, rgb=(0.8, 0.2, 0.2))
    picture = render(Scene(GREY, (red,)), 256) / 255 + noise
    tensor = torch.from_numpy(np.clip(picture, 0, 1)).permute(2, 0, 1)[None]
    assert gold_scores(tensor, ["a red circle"]).tolist() == [1.0]


def test_foreign_prompts_are_refused():
    with pytest.raises(ValueError, match="'a photo of a dog'"):
        gold_score(draw(CIRCLE), "a photo of a dog")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 64, 64)), r"shape \(3, 64, 64\)"),
        (np.zeros((64, 64, 3), np.uint8), "got an image of uint8"),
        (np.full((64, 64, 3), 1.5), "got pixels from 1.5 to 1.5"),
        (np.full((64, 64, 3), np.nan), "diverged"),
    ],
)
def test_foreign_images_are_refused(image, message):
    for measure in (find_figures, fidelity, lambda image: diversity([image], ["a red circle"])):
        with pytest.raises(ValueError, match=message):
            measure(image)


def test_a_prompt_for_each_image():
    with pytest.raises(ValueError, match="got 2 images and 1 prompt"):
        gold_scores(torch.zeros(2, 3, 64, 64), ["a red circle"])
