"""Which rewards have a gradient, for the algorithms that back-propagate it. Light: names are checked before anything is
loaded.
"""

from __future__ import annotations

from .function import is_function, says_gradient
from .remote import is_remote

WITHOUT_GRADIENT = {"jpeg-compressibility", "jpeg-incompressibility", "shapes-gold"}


def check_gradients(names: list[str], algorithm: str) -> None:
    """Raise ValueError for those of `names` that have no gradient; of functions, whose modules are not imported, none
    is rejected."""
    for name in names:
        check_has_gradient(name, name not in WITHOUT_GRADIENT and not is_remote(name), algorithm)


def check_functions(names: list[str], algorithm: str) -> None:
    """Raise ValueError for a user's function among `names` that does not say that it keeps the gradient; imports it."""
    for name in filter(is_function, names):
        check_has_gradient(name, says_gradient(name), algorithm)


def check_has_gradient(name: str, has: bool, algorithm: str) -> None:
    if has:
        return
    if is_function(name):
        function = name.rpartition(":")[2]
        raise ValueError(
            f"got reward {name!r} for algorithm {algorithm}, which needs its gradient; expected a function that says "
            f"that it keeps the gradient: if it computes with torch alone, write {function}.differentiable = True "
            "below it, or choose another algorithm, such as tdpo-r"
        )
    raise ValueError(
        f"got reward {name!r}, which has no gradient, for algorithm {algorithm}, which needs it; expected a learned "
        "reward, such as aesthetic or shapes-aesthetic: choose one, or another algorithm, such as tdpo-r"
    )
