"""One instance of a model for all who use it, and none once nobody does."""

from collections.abc import Callable
from functools import wraps
from threading import RLock
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

P = ParamSpec("P")
Model = TypeVar("Model")


def shared_while_used(make: Callable[P, Model]) -> Callable[P, Model]:
    """Have `make`, called with hashable arguments, give the instance it gave before while that is still alive."""
    alive: WeakValueDictionary = WeakValueDictionary()
    lock = RLock()  # ComfyUI's executor and a training may ask at once

    @wraps(make)
    def shared(*args: P.args, **kwargs: P.kwargs) -> Model:
        key = (args, tuple(sorted(kwargs.items())))
        with lock:
            model = alive.get(key)
            if model is None:
                model = alive[key] = make(*args, **kwargs)
            return model

    return shared
