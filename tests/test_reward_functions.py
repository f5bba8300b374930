"""A user's function as a reward: the parameters it may have, and the answers it may give."""

import asyncio
import inspect
import sys
import types
import warnings
from decimal import Decimal
from fractions import Fraction
from functools import partial, wraps

import numpy as np
import pytest
import torch
from small_rewards import CPU

from comfy_tdpo.rewards import RewardError, function, score_images
from comfy_tdpo.rewards.function import UserFunction
from comfy_tdpo.rewards.options import Options

IMAGES = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a fox", "two red foxes"]
MEANS = IMAGES.mean((1, 2, 3))
LENGTHS = torch.tensor([5.0, 13.0])


@pytest.fixture
def reward(monkeypatch):
    """The reward of a Python object, as if it stood in a module of the user's."""
    module = types.ModuleType("my_functions")
    monkeypatch.setitem(sys.modules, "my_functions", module)
    monkeypatch.setattr(function, "_allowed", True)

    def load(thing):
        module.thing = thing
        return UserFunction("python:my_functions:thing", Options(CPU, torch.float32))  # load_reward would share it

    return load


def both(images, prompts):
    """A number of each image and prompt that tells which of them was given as what."""
    assert isinstance(images, torch.Tensor) and isinstance(prompts, list)
    return images.mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])


# --- parameters


def decorated(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def undocumented(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


def with_metadata(images, prompts, metadata):
    assert metadata == [{}, {}] and metadata[0] is not metadata[1]
    return both(images, prompts)


class Judge:
    def __init__(self, scale=1.0):
        self.scale = scale

    def __call__(self, image, caption):
        return self.scale * both(image, caption)

    def method(self, prompt, imgs):
        return both(imgs, prompt)


class Network(torch.nn.Module):
    def forward(self, prompts, pixel_values):
        return both(pixel_values, prompts)


def positional_only(prompts, images, /):
    return both(images, prompts)


def keywords(*, Prompts, Images, threshold=0.5):  # noqa: N803
    return both(Images, Prompts)


def catch_all(**given):
    return both(**given)


def images_and_more(images, **more):
    return both(images, **more)


def trl(images, prompts, prompt_metadata):
    return both(images, prompts), {}


def flow_grpo(images, prompts, metadata, only_strict=True):
    return both(images, prompts).numpy(), {"strict": only_strict}


def ddpo_factory():
    def _fn(images, prompts, metadata):
        return both(images, prompts).numpy(), {}

    return _fn


def flow_factory(device, scale=1.0):
    assert device == CPU
    return lambda images, prompts, metadata: (scale * both(images, prompts), {})


FORMS = {
    "in order": both,
    "swapped": lambda prompts, images: both(images, prompts),
    "of other names": lambda captions, picture: both(picture, captions),
    "metadata": with_metadata,
    "optional metadata": lambda images, prompts, metadata=None: both(images, prompts) * (metadata is None),
    "positional only": positional_only,
    "keyword only": keywords,
    "catch all": catch_all,
    "images and more": images_and_more,
    "a decorator that says so": decorated(lambda prompts, images: both(images, prompts)),
    "a decorator that does not": undocumented(lambda prompts, images: both(images, prompts)),
    "a partial": partial(lambda scale, prompts, images: scale * both(images, prompts), 1.0),
    "a partial by name": partial(lambda images, prompts, scale: scale * both(images, prompts), scale=1.0),
    "an object": Judge(),
    "a method": Judge().method,
    "a class": Judge,
    "a network": Network(),
    "a class of networks": Network,
    "TRL's": trl,
    "flow_grpo's": flow_grpo,
    "ddpo-pytorch's factory": ddpo_factory,
    "flow_grpo's factory": flow_factory,
}


@pytest.mark.parametrize("form", FORMS)
def test_arguments_go_where_the_parameters_say(reward, form):
    scores = score_images(reward(FORMS[form]), IMAGES, PROMPTS)
    torch.testing.assert_close(scores, MEANS + LENGTHS)


def test_one_of_the_two_is_enough(reward):
    torch.testing.assert_close(score_images(reward(lambda images: images.mean((1, 2, 3))), IMAGES, PROMPTS), MEANS)
    assert score_images(reward(lambda prompts: list(map(len, prompts))), IMAGES, PROMPTS).tolist() == [5, 13]


WRONG_FORMS = {
    "names that say nothing": (
        lambda a, b: [0, 0],
        r"with the parameters \(a, b\); expected images and prompts, which",
    ),
    "one of them named": (lambda images, other: [0, 0], "also requires other; expected .images, prompts. or"),
    "more than there is": (lambda images, prompts, strict: [0, 0], "also requires strict; expected"),
    "only *args": (lambda *args: [0, 0], r"with the parameters \(\*args\); expected images and prompts"),
    "a builtin": (len, r"with the parameters \(obj, /\); expected images and prompts"),
    "a builtin that keeps silent": (max, "whose parameters cannot be read .*; wrap it in a function of your own"),
    "nothing and no factory": (
        lambda: 3.0,
        "takes neither images nor prompts, and returned float; expected a function",
    ),
    "a factory of too much": (lambda device, table: None, r"with the parameters \(device, table\); expected images"),
    "a factory that fails": (
        lambda: 1 / 0,
        "called as a factory for the function that does, and failed: ZeroDivisionError",
    ),
    "a factory of factories": (lambda: lambda: both, "with the parameters .*; expected images and prompts"),
}


@pytest.mark.parametrize("form", WRONG_FORMS)
def test_a_function_that_cannot_be_called_safely_is_refused_at_once(reward, form):
    thing, complaint = WRONG_FORMS[form]
    if form == "a builtin that keeps silent":
        with pytest.raises(ValueError):
            inspect.signature(thing)
    with pytest.raises(ValueError, match=complaint):
        reward(thing)


# --- answers

ANSWERS = {
    "a tensor": MEANS,
    "float64": MEANS.double(),
    "a tensor with a graph": MEANS.clone().requires_grad_() * 1,
    "an array": MEANS.numpy(),
    "an array backwards": MEANS.numpy()[::-1].copy()[::-1],
    "a list": MEANS.tolist(),
    "a tuple": tuple(MEANS.tolist()),
    "a list of tensors": list(MEANS),
    "a list of tensors of one": list(MEANS[:, None]),
    "a list of numpy's": list(MEANS.numpy()),
    "a list of arrays of one": list(MEANS.numpy()[:, None]),
    "decimals": [Decimal(value) for value in MEANS.tolist()],
    "fractions": [Fraction(value) for value in MEANS.tolist()],
    "scores and info": (MEANS, {}),
    "a list and info": (MEANS.tolist(), {"what": "ever"}),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_numbers_are_taken_in_any_wrapping(reward, kind):
    scores = score_images(reward(lambda images, prompts: ANSWERS[kind]), IMAGES, PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.detach(), MEANS, rtol=0, atol=0)


@pytest.mark.parametrize("answer", [[True, False], np.array([True, False]), torch.tensor([1, 0]), np.uint16([1, 0])])
def test_whole_numbers_and_verdicts_are_numbers(reward, answer):
    assert score_images(reward(lambda images, prompts: answer), IMAGES, PROMPTS).tolist() == [1, 0]


async def soon(images, prompts):
    return both(images, prompts)


def one_by_one(images, prompts):
    yield from both(images, prompts)


async def one_by_one_and_soon(images, prompts):
    yield 0.0


def answering(value):
    return lambda images, prompts: value


TWO = "expected one number for each image, 2 in all, as a tensor, an array or a list"
WRONG_ANSWERS = {
    "nothing": (answering(None), f"returned None; {TWO}; does it lack a `return`"),
    "a coroutine": (soon, f"returned a coroutine; {TWO}; write `def` instead of `async def`"),
    "a generator": (one_by_one, f"returned a generator; {TWO}; return list"),
    "both": (one_by_one_and_soon, f"returned an async_generator; {TWO}"),
    "a dict": (answering({"hps": MEANS}), f"returned a dict with the keys 'hps'; {TWO}; return the entry"),
    "a text": (answering("0.5 0.7"), f"returned a str; {TWO}"),
    "texts": (answering(["0.5", "0.7"]), f"returned a list of str; {TWO}"),
    "an array of texts": (answering(np.array(["0.5", "0.7"])), f"returned a ndarray of <U3; {TWO}"),
    "objects": (answering(np.array([None, 1.0])), f"returned a ndarray of object; {TWO}"),
    "a set": (answering({0.5, 0.7}), f"returned a set; {TWO}"),
    "a gap": (answering([0.5, None]), f"returned a list of NoneType, float; {TWO}"),
    "nested": (answering([[0.5], [0.7, 1.0]]), f"returned a list of list; {TWO}"),
    "complex": (answering([1j, 2j]), f"returned a list of complex; {TWO}"),
    "two things": (answering((MEANS, "info")), f"returned a tuple of Tensor, str; {TWO}, or such numbers and a dict"),
    "nothing and info": (answering((None, {})), f"returned None; {TWO}"),
    "a number": (answering(0.5), r"returned shape \(\); expected one score per image, \(2,\)"),
    "too many": (answering([1, 2, 3]), r"returned shape \(3,\); expected one score per image, \(2,\)"),
    "none": (answering([]), r"returned shape \(0,\); expected one score per image"),
    "a column": (answering(MEANS[:, None].numpy()), r"returned shape \(2, 1\); expected one score per image"),
    "too many and info": (answering((torch.zeros(3), {})), r"returned shape \(3,\); expected one score per image"),
    "not finite": (answering([0.0, float("inf")]), "returned a score that is not finite"),
}


@pytest.mark.parametrize("kind", WRONG_ANSWERS)
def test_what_is_no_number_for_each_image_is_named(reward, kind):
    thing, complaint = WRONG_ANSWERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a coroutine that nobody awaited
        with pytest.raises(RewardError, match=f"^reward 'python:my_functions:thing' {complaint}"):
            score_images(reward(thing), IMAGES, PROMPTS)


def test_a_coroutine_can_be_run_as_the_message_says(reward):
    torch.testing.assert_close(
        score_images(reward(lambda images, prompts: asyncio.run(soon(images, prompts))), IMAGES, PROMPTS),
        MEANS + LENGTHS,
    )


def pictures(images, prompts):
    return [image.convert("L").getextrema()[1] for image in images]


def sizes(images, prompts):
    return [image.size[0] for image in images]


@pytest.mark.parametrize("function", [pictures, sizes])
def test_a_function_for_other_images_is_told_what_it_was_given(reward, function):
    with pytest.raises(RewardError, match=r"failed: (Attribute|Type)Error.*; its images were a float tensor \(2, 3, 8"):
        score_images(reward(function), IMAGES, PROMPTS)
