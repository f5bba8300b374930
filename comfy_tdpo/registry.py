"""Registries name classes without importing them: name -> "module:attribute"."""

from importlib import import_module
from typing import Any


def look_up(place: str) -> Any:
    """What the "module:attribute" in `place` names; its module is imported now."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def entry(registry: dict[str, Any], kind: str, name: str) -> Any:
    """The entry `name` of a `registry` of that `kind`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in tuple(registry):  # a file may hold a list, which no dictionary looks up
        raise ValueError(f"got {kind} {name!r}; expected one of {', '.join(registry)}")
    return registry[name]
