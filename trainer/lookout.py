"""How processes look after one another while they train together, on a thread of each.

One that is asked to stop passes it on to the others. One that is frozen, or whose machine is gone, cannot be waited for
in any other way than from outside: a process that waits for it inside a library hears nothing else. So it is with one
that lives but hangs, in an endless loop or in a file system that does not answer. Signs of progress tell it from one
that is only slow: it gives them before every model call, while it waits for a reward service, and while it reads and
writes files.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Self

import torch.distributed as dist

from comfy_tdpo.processes import Processes

from .config import TrainConfig
from .terminal import FAILED

PERIOD = 1.0  # seconds between two looks
GONE = "gone"  # the sign of a process that has left in order
PATIENCE = 30.0  # seconds without a sign of life after which a process counts as gone
LOADING = 1800.0  # seconds in which all must have loaded their models once the first one has
ENDLESS = timedelta(days=30)  # torch's own limit, which ends trainings that wait for a slow reward

WAITS = "w"  # ends the sign of progress of a process that waits

_OF_THE_STORE = "the first process, or the launcher,"

_trainings = count()  # so that the signs of one training are not taken for those of the next


@dataclass
class _Seen:
    """What was last heard of a process: its signs of life, and of progress, and since when these are the same."""

    life: bytes
    progress: bytes
    alive: float
    going: float

    @property
    def waits(self) -> bool:
        """Whether it waits for others."""
        return self.progress.endswith(WAITS.encode())


def patience(config: TrainConfig) -> float:
    """Seconds that others wait for a process without progress. Compiling gives no signs of it, as loading does not, and
    may take one process much longer than another, which has the code of an earlier run."""
    return max(config.hang_limit, LOADING if config.compile else 0)


class Lookout:
    """Inside the block, processes pass `stop` on to one another, and all end if one of them shows no sign of life, or
    none of progress while others wait for it.

    Args:
        limit: seconds that others wait for a process without progress.
        advice: gives what to tell users after the sentence that says what happened.
    """

    def __init__(self, processes: Processes, stop: threading.Event, limit: float, advice: Callable[[], str]):
        self.processes, self.stop, self.limit, self.advice = processes, stop, limit, advice
        self._end = threading.Event()
        self._began = self._looked = time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._left: set[int] = set()  # in order
        self._trains = 0  # the thread that does
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._guard)]

    def __enter__(self) -> Self:
        if self.processes.count > 1:
            _set_timeout(ENDLESS)
            store = dist.distributed_c10d._get_default_store().clone()  # a connection for this thread alone
            self._store = dist.PrefixStore(f"comfy_tdpo/{next(_trainings)}", store)
            self._began = self._looked = time.monotonic()
            self._trains = threading.get_ident()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.processes.count > 1:
            self._end.set()
            self._threads[0].join(PATIENCE)

    def _watch(self) -> None:
        processes, own = self.processes, str(self.processes.rank)
        try:
            for number in count():
                self._store.set(own, f"{number} {processes.signs}{WAITS if processes.waiting else ''}")
                self._pass_on()
                now = time.monotonic()
                if now - self._looked > PATIENCE / 2:  # this process was frozen itself, perhaps with all the others
                    self._seen.clear()
                    self._began = now
                self._looked = now
                for rank in range(processes.count):
                    self._look_at(rank, now)
                self._judge(now)
                if self._end.wait(PERIOD):
                    self._store.set(own, GONE)
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
        if self._store.check(["end"]):
            rank, _, why = self._store.get("end").decode().partition(" ")
            self._end_all(int(rank), why)

    def _look_at(self, rank: int, now: float) -> None:
        if not self._store.check([str(rank)]):
            return
        life = self._store.get(str(rank))
        if life == GONE.encode():
            self._left.add(rank)
            self._seen.pop(rank, None)
            return
        progress, before = life.partition(b" ")[2], self._seen.get(rank)
        alive = before.alive if before and before.life == life else now
        going = before.going if before and before.progress == progress else now
        self._seen[rank] = _Seen(life, progress, alive, going)

    def _judge(self, now: float) -> None:
        """End all processes if one is gone, or if this one waits for one that hangs."""
        for rank, seen in self._seen.items():
            if now - seen.alive > PATIENCE:
                self._end_all(rank, f"process {rank} has shown no sign of life for {PATIENCE:.0f} s")
        own = self._seen[self.processes.rank]
        loading = set(range(self.processes.count)) - self._left - self._seen.keys()
        if loading and own.waits and now - self._began > LOADING:
            rank = min(loading)
            self._end_all(rank, f"process {rank} has not loaded its model in {LOADING / 60:.0f} minutes")
        still = [rank for rank, seen in self._seen.items() if now - seen.going > self.limit]
        if loading or not own.waits or self.processes.rank not in still:
            return
        seconds = f"{self.limit:.0f} s (raise --hang-limit if it was only slow)"
        for rank in still:
            if not self._seen[rank].waits:
                self._end_all(rank, f"process {rank} has made no progress for {seconds}")
        if len(still) == len(self._seen):
            self._end_all(self.processes.rank, f"nothing has passed between the processes for {seconds}")

    def _end_all(self, rank: int, why: str) -> None:
        """End all processes, this one when the others have had the time to read why."""
        self._store.set("end", f"{rank} {why}")
        time.sleep(2 * PERIOD)
        hangs = rank == self.processes.rank and not self.processes.waiting
        self._give_up(f"{why}; it is {self._place()}" if hangs else why)

    def _place(self) -> str:
        """Where the training is in its code."""
        frame = sys._current_frames()[self._trains]
        return f"in {frame.f_code.co_name}, line {frame.f_lineno} of {frame.f_code.co_filename}"

    def _give_up(self, why: str) -> None:
        """End this process at once: its main thread may wait for ever."""
        print(f"comfy_tdpo: {why}; {self.advice()}", file=sys.stderr, flush=True)
        os._exit(FAILED)


def _set_timeout(timeout: timedelta) -> None:
    """Set how long torch itself lets processes wait for one another."""
    set_timeout = dist.set_timeout if hasattr(dist, "set_timeout") else dist.distributed_c10d._set_pg_timeout
    set_timeout(timeout)
