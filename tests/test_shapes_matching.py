"""shapes-match: what it learns from, how it is added to a finished world, and what it can tell apart."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from comfy_tdpo.rewards import load_reward
from comfy_tdpo.shapes import WORLD, build
from comfy_tdpo.shapes.dataset import make_scenes
from comfy_tdpo.shapes.encoders import load_match_encoder, load_tokenizer, tokenize
from comfy_tdpo.shapes.gold import gold_score
from comfy_tdpo.shapes.matching import (
    BLUR,
    CHROMA,
    CONTRAST,
    Meanings,
    _blurred,
    _warped,
    clarity,
    hard_captions,
    spoil,
    spoilt_scene,
)
from comfy_tdpo.shapes.scenes import COLOURS, SHAPES, Figure, Item, Request, Scene, parse, render, sample_request

CPU = torch.device("cpu")
RED_CIRCLE = Request((Item("circle", "red"),))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(scene: Scene) -> Tensor:
    return torch.from_numpy(render(scene).copy()).permute(2, 0, 1) / 255


@pytest.fixture
def no_report(monkeypatch):
    """Builds without the report, whose images take minutes."""
    monkeypatch.setattr(build, "write_report", lambda world: None)


@pytest.mark.usefixtures("no_report")
def test_only_its_stage_can_be_trained_for_a_finished_world(tmp_path):
    world = tmp_path / "world"
    shutil.copytree(WORLD, world, ignore=shutil.ignore_patterns("match"))
    before = files(world)
    command = ["--quick", "--only", "match", "--out", str(world), "--work", str(tmp_path / "work")]
    assert build.main(command) == 0
    made = files(world)
    assert made.keys() - before.keys() == {"match/model.safetensors"}
    assert before.items() <= made.items()
    assert (tmp_path / "work" / "match.pt").exists() and len(list((tmp_path / "work").glob("*.pt"))) == 1
    assert build.main(command) == 0  # the stage is finished, so nothing changes
    assert files(world) == made


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.usefixtures("no_report")
def test_a_whole_build_makes_it_and_its_file_loads(tmp_path):
    world, work = tmp_path / "world", tmp_path / "work"
    assert build.main(["--quick", "--out", str(world), "--work", str(work)]) == 0
    trained = torch.load(work / "match.pt", weights_only=True)["network"]
    encoder = load_match_encoder(world)
    for name, weight in encoder.state_dict().items():  # float16 keeps 11 bits; its smallest step is 6e-8
        torch.testing.assert_close(weight, trained[name], rtol=2**-11, atol=6e-8)
    text = encoder.embed_tokens(tokenize(load_tokenizer(world), ["a red circle", "a blue star"]))
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(2))


def test_one_stage_needs_a_world_to_add_to(tmp_path, capsys):
    command = ["--quick", "--only", "match", "--out", str(tmp_path / "none"), "--work", str(tmp_path / "work")]
    assert build.main(command) == 2
    assert "none holds no world" in capsys.readouterr().err
    assert not (tmp_path / "none").exists() and not (tmp_path / "work").exists()


def test_captions_are_true_of_the_scenes_in_which_gold_finds_all_they_ask_for():
    """Gold reads the pixels, while the labels are derived from how the scenes were made."""
    captions, scenes, _ = make_scenes(seed=5, count=64)
    rng = random.Random(0)
    requests = [parse(caption) for caption in captions]
    requests = [request for request in requests if all(item.colour for item in request.items)]
    pictured = [
        (Scene(scene.ground, scene.figures), request)
        for scene, request in zip(scenes, map(parse, captions), strict=True)
        if request in requests
    ]
    asked = [
        c for request in requests for c in (request, replace(request, background=None), *hard_captions(request, rng))
    ]
    shown = Meanings.of([replace(request, place=request.place or place_of(scene)) for scene, request in pictured])
    labels = Meanings.of(asked).are_true_of(shown)
    for i, (scene, _) in enumerate(pictured):
        near = [*range(5 * i, 5 * i + 5), *rng.sample(range(len(asked)), 10)]
        found = [gold_score(render(scene) / 255, asked[j].caption) == 1 for j in near]
        assert labels[i, near].tolist() == found, captions[i]


def place_of(scene: Scene) -> str | None:
    """By the figures' centres, spelled out."""
    below = {figure.y > 32 for figure in scene.figures}
    right = {figure.x > 32 for figure in scene.figures}
    if len(below) == len(right) == 1:
        return f"{'bottom' if below == {True} else 'top'} {'right' if right == {True} else 'left'}"
    return None


def test_a_scenes_own_caption_is_true_of_it_and_hard_captions_are_not():
    rng = random.Random(1)
    for _ in range(300):
        request = sample_request(rng)
        _, shown = spoilt_scene(request, rng)
        captions = Meanings.of([request, *hard_captions(request, rng)])
        assert captions.are_true_of(Meanings.of([shown])).tolist() == [[True, False, False, False]], request


def test_captions_of_any_colour_are_true_of_every_colour():
    shown = Meanings.of([Request((Item("star", "red"), Item("cross", "blue")))])
    captions = ["a star and a cross", "a cross and a star", "a star", "two stars", "a circle and a star"]
    found = Meanings.of([parse(caption) for caption in captions]).are_true_of(shown)
    assert found.tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize(
    ("rgb", "ground", "expected"),
    [
        ((0.9, 0.1, 0.1), (0.5, 0.5, 0.5), 1),
        ((0.5, 0.5, 0.5), (0.0, 0.0, 0.0), 0),  # grey
        ((0.2, 0.05, 0.05), (0.0, 0.0, 0.0), (0.15 - CHROMA[0]) / (CHROMA[1] - CHROMA[0])),  # dark
        ((0.9, 0.1, 0.1), (0.9, 0.1, 0.25), (0.15 - CONTRAST[0]) / (CONTRAST[1] - CONTRAST[0])),  # like the ground
    ],
)
def test_clarity_falls_as_colours_fade(rgb, ground, expected):
    figures = (Figure("circle", rgb, 32, 32, 30), Figure("star", (0.1, 0.9, 0.1), 10, 10, 18))
    assert clarity(Scene(ground, figures), RED_CIRCLE) == pytest.approx(expected)


def test_figures_stay_inside_and_apart_whatever_their_size():
    rng = random.Random(2)
    sizes = []
    for _ in range(300):
        scene, _ = spoilt_scene(sample_request(rng), rng)
        count = len(scene.figures)
        covered = sum(render(Scene((0, 0, 0), (replace(f, rgb=(1, 1, 1)),))).any(-1).astype(int) for f in scene.figures)
        labels = ndimage.label(covered, np.ones((3, 3)))[1]
        assert covered.max() == 1 and labels == count, scene
        sizes += [figure.side for figure in scene.figures]
    assert max(sizes) > 50  # `sample_scene` draws up to 48


def test_blur_is_gaussian():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = ndimage.gaussian_filter(image.numpy(), (0, 0, 1.7, 1.7), mode="nearest")
    # scipy cuts its kernel off at 4 standard deviations and this one at 3, beyond which lies 0.3 % of the weight
    np.testing.assert_allclose(_blurred(image, 1.7).numpy(), expected, atol=5e-3)


def test_a_warp_by_whole_pixels_moves_the_image():
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shift = torch.stack([torch.full((64, 64), 3.0), torch.full((64, 64), -2.0)])[None]
    expected = image.roll((2, -3), dims=(2, 3))
    torch.testing.assert_close(_warped(image, shift)[..., 2:, :-3], expected[..., 2:, :-3], atol=1e-4, rtol=0)


def test_spoilt_images_keep_the_label_of_what_can_still_be_seen():
    """Spoilt twice with the same numbers, beside a figure so large that neither blur nor warp destroys it."""
    images = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    spoilt = [spoil(images, torch.full((64,), side), torch.Generator().manual_seed(1)) for side in (18.0, 18.0, 1e3)]
    assert torch.equal(spoilt[0][0], spoilt[1][0]) and torch.equal(spoilt[0][1], spoilt[1][1])
    assert (spoilt[2][1] == 1).all()
    assert ((spoilt[0][1] >= 0) & (spoilt[0][1] <= 1)).all() and spoilt[0][1].min() < 1 and BLUR[0] > BLUR[1]


@pytest.fixture(scope="module")
def fresh():
    """Captions that name colours, scenes and scores of shapes-match: nothing was trained on these scenes."""
    captions, scenes, images = make_scenes(seed=123_456_789, count=256)
    named = [i for i, caption in enumerate(captions) if parse(caption).items[0].colour]
    captions, scenes = [captions[i] for i in named], [scenes[i] for i in named]
    return captions, scenes, load_reward("shapes-match", CPU).score(images[named].float() / 255, captions)


def changed(scene: Scene, rng: random.Random, kind: str) -> Scene:
    """`scene` with one figure's colour or shape changed to one that no other figure and not the ground has."""
    index = rng.randrange(len(scene.figures))
    figure = scene.figures[index]
    if kind == "colour":
        taken = [scene.ground, *(f.rgb for f in scene.figures)]
        far = [rgb for rgb in COLOURS.values() if all(np.linalg.norm(np.subtract(rgb, t)) > 0.4 for t in taken)]
        figure = replace(figure, rgb=rng.choice(far))
    elif kind == "shape":
        figure = replace(figure, shape=rng.choice([s for s in SHAPES if s not in {f.shape for f in scene.figures}]))
    elif kind == "too dark to see":
        figure = replace(figure, rgb=tuple(0.08 * value for value in figure.rgb))
    else:
        figure = replace(figure, rgb=(sum(figure.rgb) / 3,) * 3)
    return replace(scene, figures=(*scene.figures[:index], figure, *scene.figures[index + 1 :]))


@pytest.mark.parametrize("kind", ["colour", "shape", "too dark to see", "grey"])
def test_a_figure_that_is_wrong_or_cannot_be_recognised_lowers_the_score(fresh, kind):
    captions, scenes, scores = fresh
    rng = random.Random(3)
    images = torch.stack([picture(changed(scene, rng, kind)) for scene in scenes])
    worse = load_reward("shapes-match", CPU).score(images, captions) < scores
    # measured 0.98 to 1.0; with 204 scenes the standard error is 0.01; by chance 0.5
    assert worse.float().mean() > 0.95


def test_a_scenes_own_caption_is_ranked_first(fresh):
    captions, scenes, _ = fresh
    reward = load_reward("shapes-match", CPU)
    images = torch.stack([picture(scene) for scene in scenes])
    text = reward.encoder.embed_tokens(tokenize(reward.tokenizer, captions))
    cosines = reward.embed(images) @ text.T
    groups = torch.arange(len(captions) // 16 * 16).split(16)
    first = torch.cat([cosines[rows][:, rows].argmax(1) == torch.arange(16) for rows in groups])
    # measured 0.95 here, and 0.90 on the report's scenes, where a perfect reward has 0.95; by chance 0.06. With 192
    # scenes the standard error is 0.02: three below the report's
    assert first.float().mean() > 0.84
