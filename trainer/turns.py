"""One job trains on a device at a time; later ones wait for their turn, in the order in which they came."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

Who = TypeVar("Who")


class Turns(Generic[Who]):
    """The queues of all devices; thread-safe."""

    def __init__(self) -> None:
        self._queues: dict[torch.device, list[Who]] = {}
        self._changed = threading.Condition()

    def join(self, device: torch.device, who: Who) -> None:
        with self._changed:
            self._queues.setdefault(device, []).append(who)

    def leave(self, device: torch.device, who: Who) -> None:
        with self._changed:
            self._queues[device].remove(who)
            self._changed.notify_all()

    def first(self, device: torch.device) -> Who | None:
        """Whose turn it is."""
        with self._changed:
            return next(iter(self._queues.get(device, [])), None)

    def wait(self, device: torch.device, who: Who, given_up: Callable[[], bool]) -> bool:
        """Wait for the turn of `who`, or until it has `given_up`; whether it is its turn. See `look_again`."""
        with self._changed:
            self._changed.wait_for(lambda: given_up() or self._queues[device][0] is who)
        return not given_up()

    def look_again(self) -> None:
        """Let everybody who waits ask again whether it has given up."""
        with self._changed:
            self._changed.notify_all()

    def everybody(self) -> list[Who]:
        with self._changed:
            return [who for queue in self._queues.values() for who in queue]
