"""Rewards that another program computes, named by their address. Light: names are checked before anything is loaded.

A reward service is `http://host:port` (service.py), and a vision-language model behind an OpenAI-compatible server is
`judge:http://host:port/v1#model` (judge.py).

Images are sent to the address, so a graph made by somebody else must not choose it. Addresses are rejected until
`allow_addresses` is called: the command line allows all of them, because its user has chosen the address, and
ComfyUI's nodes allow those that the owner of the server has listed.
"""

import re
from collections.abc import Iterable
from urllib.parse import urlsplit

JUDGE = "judge:"
_SERVICE = ("http://", "https://")
# Neither a user and password nor a query, which could be secrets: names are written to files.
_ADDRESS = r"https?://[\w.:\[\]-]+(/[\w.~%/+-]*)?"
_NAME = re.compile(rf"{_ADDRESS}|{JUDGE}{_ADDRESS}#[\w.:/@+-]+", re.ASCII)

_allowed: frozenset[str] | None = frozenset()  # None: all of them


def allow_addresses(names: Iterable[str] | None = None) -> None:
    """From now on, allow the rewards of these names in this process, or of any address."""
    global _allowed
    _allowed = None if names is None else frozenset(names)


def is_remote(name: str) -> bool:
    return name.startswith((*_SERVICE, JUDGE))


def check_remote(name: str) -> None:
    """Raise ValueError if `name` is malformed or its address is not allowed here. Nothing is sent."""
    if _allowed is not None and name not in _allowed:
        raise ValueError(
            f"got reward {name[:200]!r}, which sends images to an address; expected that only on the command line"
        )
    if not _NAME.fullmatch(name) or not _has_host_and_port(address_of(name)):
        raise ValueError(
            f"got reward {name[:200]!r}; expected the address of a service, such as http://127.0.0.1:8765, or of a "
            "judge with its model, such as judge:http://127.0.0.1:8000/v1#model; neither a password nor a query"
        )


def address_of(name: str) -> str:
    return name.removeprefix(JUDGE).partition("#")[0]


def model_of(name: str) -> str:
    """The model of a judge."""
    return name.partition("#")[2]


def class_of(name: str) -> str:
    """The class of the remote reward `name`, as in the registry."""
    module = "judge:Judge" if name.startswith(JUDGE) else "service:Service"
    return f"comfy_tdpo.rewards.remote.{module}"


def _has_host_and_port(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is no number below 65536, or a bracket is missing
        return False
