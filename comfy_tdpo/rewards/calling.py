"""Calling a user's function: each argument goes to the parameter whose name says what it takes.

So `f(images, prompts)`, `f(prompts, images)` and `f(*, image, caption, **more)` all work, and so does the form common
to DDPO, TRL and flow_grpo, `f(images, prompts, metadata)`. Nothing is matched by position, because a function given
images and prompts in the wrong order might still return numbers.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from inspect import BoundArguments, Parameter, Signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGES, PROMPTS, METADATA = "images", "prompts", "metadata"

# Names of parameters here and in other trainers, compared without regard to case.
NAMES = {
    IMAGES: ("images", "image", "imgs", "img", "pixels", "pixel_values", "pictures", "picture"),
    PROMPTS: ("prompts", "prompt", "captions", "caption", "texts", "text"),
    METADATA: ("metadata", "prompt_metadata", "metadatas", "meta"),
}
DEVICE = "device"  # parameter that a factory may have
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_WRAP = "wrap it in a function of your own: def reward(images, prompts): return ..."


class Call:
    """A user's function whose parameters have been matched to arguments by name.

    A function without parameters, or with only a device, is a factory, as in ddpo-pytorch and flow_grpo, and so is a
    class: it is called once, and what it returns is the reward function.

    Raises ValueError if the parameters cannot be matched by name.
    """

    def __init__(self, name: str, function: Callable, device: torch.device):
        self.function, self.signature = function, _signature(name, function)
        if _is_factory(function, self.signature):
            self.function = _made(name, function, self.signature, device)
            self.signature = _signature(name, self.function)
        self.takes = _understood(name, self.signature)

    def __call__(self, images: Tensor, prompts: list[str]) -> Any:
        """Call the function with float images (B, 3, H, W) and B prompts, and return what it returns."""
        given = {IMAGES: images, PROMPTS: prompts, METADATA: [{} for _ in prompts]}
        bound = BoundArguments(self.signature, OrderedDict())
        for name, what in self.takes.items():
            bound.arguments[name] = given[what]
        more = {what: given[what] for what in (IMAGES, PROMPTS) if what not in self.takes.values()}
        for parameter in self.signature.parameters.values():
            if parameter.kind is Parameter.VAR_KEYWORD:
                bound.arguments[parameter.name] = more
        return self.function(*bound.args, **bound.kwargs)


def _signature(name: str, function: Callable) -> Signature:
    forward = None if inspect.isclass(function) else getattr(function, "forward", None)  # of a torch module
    try:
        return inspect.signature(forward if callable(forward) else function)
    except (TypeError, ValueError) as error:  # written in C, without a signature
        raise ValueError(f"got reward {name!r}, whose parameters cannot be read ({error}); {_WRAP}") from error


def _required(signature: Signature) -> list[str]:
    parameters = signature.parameters.values()
    return [p.name for p in parameters if p.default is Parameter.empty and p.kind not in _VARIADIC]


def _meaning(parameter: str) -> str | None:
    return next((what for what, names in NAMES.items() if parameter.lower() in names), None)


def _is_factory(function: Callable, signature: Signature) -> bool:
    parameters = signature.parameters.values()
    anything = any(p.kind in _VARIADIC for p in parameters) and not inspect.isclass(function)
    if anything or any(_meaning(p.name) for p in parameters):
        return False
    return set(_required(signature)) <= {DEVICE}


def _made(name: str, factory: Callable, signature: Signature, device: torch.device) -> Callable:
    try:
        made = factory(**{DEVICE: device} if DEVICE in signature.parameters else {})
    except Exception as error:  # whatever the user's code does
        raise ValueError(
            f"reward {name!r} takes no images, so it was called as a factory for the function that does, and failed: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not callable(made):
        if inspect.iscoroutine(made):
            made.close()  # prevents Python's warning that it was never awaited
        raise ValueError(
            f"reward {name!r} takes neither images nor prompts, and returned {type(made).__name__}; expected a "
            "function of (images, prompts), or one without arguments that returns such a function"
        )
    return made


def _understood(name: str, signature: Signature) -> dict[str, str]:
    """Map parameter names to what they take: for each argument the first match, and metadata only if it is required."""
    required, takes = _required(signature), dict[str, str]()
    for parameter in signature.parameters.values():
        what = _meaning(parameter.name)
        optional = what == METADATA and parameter.name not in required
        if what and what not in takes.values() and parameter.kind not in _VARIADIC and not optional:
            takes[parameter.name] = what
    everything = any(p.kind is Parameter.VAR_KEYWORD for p in signature.parameters.values())
    if not everything and not {IMAGES, PROMPTS} & set(takes.values()):
        raise ValueError(
            f"got reward {name!r} with the parameters {signature}; expected images and prompts, which are passed by "
            f"name: rename its parameters, or {_WRAP}"
        )
    if lacking := [parameter for parameter in required if parameter not in takes]:
        raise ValueError(
            f"reward {name!r} also requires {', '.join(lacking)}; expected (images, prompts) or (images, prompts, "
            f"metadata): give other parameters a default, rename those that take images and prompts, or {_WRAP}"
        )
    return takes
