"""Sharing one instance of a model between its users, and freeing it after the last use."""

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

P = ParamSpec("P")
Model = TypeVar("Model")


def shared_while_used(make: Callable[P, Model]) -> Callable[P, Model]:
    """Make `make`, called with the same hashable arguments, return the previous instance while that is still alive."""
    alive: WeakValueDictionary = WeakValueDictionary()
    lock = RLock()  # ComfyUI's executor and a training thread may call at the same time

    @wraps(make)
    def shared(*args: P.args, **kwargs: P.kwargs) -> Model:
        key = (args, tuple(sorted(kwargs.items())))
        with lock:
            model = alive.get(key)
            if model is None:
                model = alive[key] = make(*args, **kwargs)
            return model

    return shared
