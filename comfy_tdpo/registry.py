"""Registries map names to "module:attribute", so that a class is imported only when it is used."""

from importlib import import_module
from typing import Any


def look_up(place: str) -> Any:
    """Import the module in `place`, "module:attribute", and return the attribute."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


def entry(registry: dict[str, Any], kind: str, name: str) -> Any:
    """The entry `name` of `registry`; `kind` names such an entry in the error message.

    Raises:
        ValueError: there is no such entry; the message lists those that exist.
    """
    if name not in tuple(registry):  # from a file, `name` may be a list, which cannot be looked up in a dictionary
        raise ValueError(f"got {kind} {name!r}; expected one of {', '.join(registry)}")
    return registry[name]
