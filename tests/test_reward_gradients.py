"""Rewards with a gradient: the exact score, and the derivative of the same preprocessing in floats."""

import copy
from pathlib import Path

import pytest
import torch
from small_rewards import CPU, LEARNED, save_small_weights, use_small_architectures
from torch import Tensor

from comfy_tdpo.rewards import REWARDS, RewardModel, function, load_reward, load_rewards, pixels, reward_class
from comfy_tdpo.rewards.gradients import WITHOUT_GRADIENT
from comfy_tdpo.rewards.options import Options
from comfy_tdpo.rewards.pixels import CLIP_STD, pillow_pixels, torchvision_pixels

SHAPES = ("shapes-aesthetic", "shapes-alignment", "shapes-judge", "shapes-match")
DIFFERENTIABLE = (*LEARNED, *SHAPES)
STEP = 1e-8
PROMPTS = ["Two dogs & a cat, playing chess!"] * 2  # clipscore is flat where a caption fits not at all
SIZES = [(48, 40), (64, 64), (40, 90), (224, 224), (300, 250)]  # up, as it is for some, long, as it is, down


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_small_architectures(patch)
        yield save_small_weights(tmp_path_factory.mktemp("weights"))


def noise(size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(sum(size)), dtype=dtype)


def in_float64(name: str, weights: dict[str, str], patch: pytest.MonkeyPatch) -> RewardModel:
    """The reward, every number of it; what it calls float is float64 for the rest of the test."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    given = Path(weights[name]) if name in weights else None
    reward = reward_class(name)(name, Options(CPU, torch.float64, given))
    for part in {"encoder", "head"} & vars(reward).keys():
        setattr(reward, part, copy.deepcopy(getattr(reward, part)).double())  # Shapes' encoder has other users
    return reward


class FixedRounding:
    """Keeps what rounding changed at the first images, so that the scores of others differ smoothly."""

    change: Tensor | None = None

    def __call__(self, exact: Tensor, smooth: Tensor) -> Tensor:
        if self.change is None:
            self.change = (exact - smooth).detach()
        return smooth + self.change


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_gradient_is_that_of_central_differences(weights, monkeypatch, name, size):
    """In float64; the step's own error is of second order, 1e-10, and rounding's is 1e-16 / 1e-5."""
    reward = in_float64(name, weights, monkeypatch)
    images = noise(size, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    assert gradient.abs().max() > 0
    monkeypatch.setattr(pixels, "_straight_through", FixedRounding())
    reward.score(images, PROMPTS)
    for seed in range(3):
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ahead, behind = (
            reward.score((images + step * way).detach().requires_grad_(), PROMPTS).sum() for step in (STEP, -STEP)
        )
        slope = (gradient * way).sum()
        # Noise overshoots: a few pixels pass the clamp's edge within the step.
        assert (ahead - behind).item() / (2 * STEP) == pytest.approx(slope.item(), rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_score_is_the_same_with_gradient_and_without(weights, name, size):
    """To the last bit, except for HPSv2: without a gradient, torch computes open_clip's attention by another kernel,
    which sums in another order.
    """
    reward, images = load_reward(name, CPU, weights=weights), noise(size)
    with_gradient, without = (reward.score(x, PROMPTS) for x in (images.clone().requires_grad_(), images))
    assert with_gradient.requires_grad
    tolerance = 1e-5 * without.abs().max() if name.startswith("hpsv2") else 0
    assert (with_gradient - without).abs().max() <= tolerance


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("preprocess", [pillow_pixels, torchvision_pixels])
def test_pixels_are_the_same_with_gradient_and_without(preprocess, size):
    with_gradient = preprocess(noise(size).requires_grad_(), 224)
    assert with_gradient.requires_grad and torch.equal(with_gradient, preprocess(noise(size), 224))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_graph_is_kept_only_where_it_was_asked_for(weights, name):
    reward, images = load_reward(name, CPU, weights=weights), noise((48, 40))
    assert reward.differentiable
    assert not reward.score(images, PROMPTS).requires_grad
    with torch.no_grad():
        assert not reward.score(images.clone().requires_grad_(), PROMPTS).requires_grad
    if reward.embed_dim:
        assert not reward.embed(images).requires_grad
        assert reward.embed(images.clone().requires_grad_()).requires_grad


def test_every_reward_says_whether_it_has_a_gradient():
    without = {name for name in REWARDS if not reward_class(name).differentiable}
    assert without == {"jpeg-compressibility", "jpeg-incompressibility", "shapes-gold"} == WITHOUT_GRADIENT
    for name in without:
        images = noise((64, 64)).requires_grad_()
        assert not load_reward(name, CPU).score(images, ["a red circle"] * 2).requires_grad


def test_a_sum_has_a_gradient_if_all_its_parts_have_one():
    both = load_rewards({"shapes-aesthetic": 1.0, "shapes-judge": 2.0}, CPU)
    assert both.differentiable
    assert not load_rewards({"shapes-aesthetic": 1.0, "jpeg-compressibility": 2.0}, CPU).differentiable
    images = noise((64, 64)).requires_grad_()
    (whole,) = torch.autograd.grad(both.score(images, PROMPTS).sum(), images)
    parts = [torch.autograd.grad(part.score(images, PROMPTS).sum(), images)[0] for part, _, _ in both.parts]
    torch.testing.assert_close(whole, parts[0] + 2 * parts[1])


def test_a_function_keeps_the_gradient_that_it_has(tmp_path, monkeypatch):
    red = "def red(images, prompts):\n    return images[:, 0].square().mean((1, 2))\n"
    (tmp_path / "graded.py").write_text(red + "red.differentiable = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(function, "_allowed", True)
    reward, images = load_reward("python:graded:red", CPU), noise((8, 8)).requires_grad_()
    assert reward.differentiable
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS).sum(), images)
    torch.testing.assert_close(gradient[:, 0], 2 * images[:, 0] / 64)
    assert not gradient[:, 1:].any()


@pytest.mark.parametrize("size", [*SIZES, (512, 512), (9, 400)], ids=str)
@pytest.mark.parametrize("preprocess", [pillow_pixels, torchvision_pixels])
def test_the_float_path_is_close_to_the_exact_one(monkeypatch, preprocess, size):
    """Rounding after each axis moves a level by a half, which the second axis can raise to less than 2; a path without
    the clamp after the first axis would miss by 10 and more at hard edges.
    """
    images = (noise(size) > 0.5).float()
    exact = preprocess(images, 224)
    monkeypatch.setattr(pixels, "_straight_through", lambda exact, smooth: smooth if smooth.requires_grad else exact)
    smooth = preprocess(images.requires_grad_(), 224)
    levels = (smooth - exact).detach() * torch.tensor(CLIP_STD)[:, None, None] * 255
    assert smooth.requires_grad and levels.abs().max() < 2
