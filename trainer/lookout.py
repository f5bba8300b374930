"""How processes look after one another while they train together, on a thread of each.

One that is asked to stop passes it on to the others. One that is frozen, or whose machine is gone, cannot be waited for
in any other way than from outside: a process that waits for it inside a library hears nothing else.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from typing import Self

import torch.distributed as dist

from comfy_tdpo.processes import Processes

from .terminal import FAILED

PERIOD = 1.0  # seconds between two looks
GONE = "gone"  # the sign of a process that has left in order
PATIENCE = 30.0  # seconds without a sign of life after which a process counts as gone

_OF_THE_STORE = "the first process, or the launcher,"

_trainings = count()  # so that the signs of one training are not taken for those of the next


class Lookout:
    """Inside the block, processes pass `stop` on to one another, and all end if one of them shows no sign of life.

    Args:
        advice: gives what to tell users after the sentence that says which process is gone.
    """

    def __init__(self, processes: Processes, stop: threading.Event, advice: Callable[[], str]):
        self.processes, self.stop, self.advice = processes, stop, advice
        self._end = threading.Event()
        self._looked = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._guard)]

    def __enter__(self) -> Self:
        if self.processes.count > 1:
            store = dist.distributed_c10d._get_default_store().clone()  # a connection for this thread alone
            self._store = dist.PrefixStore(f"comfy_tdpo/{next(_trainings)}", store)
            self._looked = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.processes.count > 1:
            self._end.set()
            self._threads[0].join(PATIENCE)

    def _watch(self) -> None:
        seen: dict[int, tuple[bytes, float]] = {}  # the last sign of life of each other process, and since when
        try:
            for number in count():
                self._store.set(str(self.processes.rank), str(number))
                self._pass_on()
                now = time.monotonic()
                if now - self._looked > PATIENCE / 2:  # this process was frozen itself, perhaps with all the others
                    seen.clear()
                self._looked = now
                for rank in range(self.processes.count):
                    self._look_at(rank, seen, now)
                if self._end.wait(PERIOD):
                    self._store.set(str(self.processes.rank), GONE)
                    return
        except RuntimeError:  # the store's, whose process is gone
            if not self._end.is_set():
                self._give_up(f"{_OF_THE_STORE} is gone")

    def _guard(self) -> None:
        """End this process if the store does not answer, as when the process that has it is frozen."""
        woke = time.monotonic()
        while not self._end.wait(PERIOD):
            now = time.monotonic()
            if now - woke > PATIENCE / 2:
                self._looked = now
            woke = now
            if now - self._looked > PATIENCE:
                self._give_up(f"{_OF_THE_STORE} has shown no sign of life for {PATIENCE:.0f} s")

    def _pass_on(self) -> None:
        if self.stop.is_set():
            self._store.set("stop", "")
        elif self._store.check(["stop"]):
            self.stop.set()

    def _look_at(self, rank: int, seen: dict[int, tuple[bytes, float]], now: float) -> None:
        if rank == self.processes.rank or not self._store.check([str(rank)]):
            return
        sign = self._store.get(str(rank))
        before, since = seen.get(rank, (None, now))
        if sign != before or sign == GONE.encode():
            seen[rank] = sign, now
        elif now - since > PATIENCE:
            self._give_up(f"process {rank} has shown no sign of life for {PATIENCE:.0f} s")

    def _give_up(self, why: str) -> None:
        """End this process at once: its main thread may wait for ever."""
        print(f"comfy_tdpo: {why}; {self.advice()}", file=sys.stderr, flush=True)
        os._exit(FAILED)
