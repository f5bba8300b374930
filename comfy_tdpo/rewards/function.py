"""A user's own function as a reward: `python:module:function`, called with images and prompts.

Using such a name imports its module and so runs code. The name must therefore not come from a file or graph made by
somebody else. Functions are rejected until `allow_functions` is called: the command line does so, because its user has
chosen the function, and ComfyUI's nodes do not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from .answers import scores_of
from .calling import Call
from .options import Options

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "python:"
_allowed = False


def allow_functions() -> None:
    """Allow rewards named `python:module:function` in this process from now on."""
    global _allowed
    _allowed = True


def is_function(name: str) -> bool:
    return name.startswith(PREFIX)


def check_function(name: str) -> None:
    """Raise ValueError if `name` is malformed or functions are not allowed here. Nothing is imported."""
    if not _allowed:
        raise ValueError(f"got reward {name!r}, which runs code; expected that only on the command line")
    parts = _module(name).split(".")
    if not all(part.isidentifier() for part in parts) or parts[-1] == "py" or not _function(name).isidentifier():
        raise ValueError(
            f"got reward {name!r}; expected python:module:function, such as python:mine.rewards:brightness for the "
            "function brightness in mine/rewards.py"
        )


def _module(name: str) -> str:
    return name.removeprefix(PREFIX).partition(":")[0]


def _function(name: str) -> str:
    return name.removeprefix(PREFIX).partition(":")[2]


def says_gradient(name: str) -> bool:
    """Whether the function says that it keeps the gradient of its images, by an attribute `differentiable`."""
    return bool(getattr(_imported(name), "differentiable", False))


def _imported(name: str) -> Callable:
    """The function `name`, whose module is imported."""
    check_function(name)
    try:
        module = importlib.import_module(_module(name))
    except Exception as error:  # whatever the user's module does
        raise ValueError(
            f"reward {name!r} cannot be imported: {type(error).__name__}: {error}; correct it, or if it was "
            "not found, run in the folder of its file or add that folder to PYTHONPATH"
        ) from error
    function = getattr(module, _function(name), None)
    if not callable(function):
        raise ValueError(f"got reward {name!r}, but {module.__name__} has no function {_function(name)!r}")
    return function


class UserFunction:
    """Any callable of images, float (B, 3, H, W) in [0, 1], and a list of B prompts that returns B numbers.

    See calling.py for the parameters it may have, and answers.py for what it may return.
    """

    sources = ()
    embed_dim = None

    def __init__(self, name: str, options: Options):
        self.name, self.differentiable = name, says_gradient(name)
        self.elsewhere = bool(getattr(_imported(name), "elsewhere", False))
        self.call = Call(name, _imported(name), options.device)

    def embed(self, images: Tensor) -> Tensor:
        raise TypeError(f"{self.name} is a function and has no encoder")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        answer = self.call(images.clone(), list(prompts))  # copies, because the function may change its arguments
        return scores_of(self.name, answer, images)

    def check_prompts(self, prompts: list[str]) -> None:
        """Every prompt is accepted: only the function's author knows what it can score."""
