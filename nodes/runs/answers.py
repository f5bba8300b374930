"""Answers to HTTP requests about runs and tastes: a status code, and JSON or a picture."""

import re
from collections.abc import Callable
from typing import Any

from comfy_tdpo.tastes.folder import TasteFolder

from . import table as tables
from .registry import NoSuchRun, NotEnded, NotRunning, Runs
from .tastes import NoSuchTaste, tastes_beside
from .voting import add_vote, parsed

STATUS: dict[type[Exception], int] = {NoSuchRun: 404, NoSuchTaste: 404, NotRunning: 409, NotEnded: 409}


def answer(runs: Runs, ask: Callable[[], Any]) -> tuple[int, Any]:
    """The HTTP status, and what `ask` returns or one sentence that says why it failed."""
    try:
        return 200, ask()
    except (ValueError, OSError, NotImplementedError) as error:  # the last: a file system without locks
        return STATUS.get(type(error), 400), {"error": runs.told(" ".join(str(error).split()))}


def overview(runs: Runs) -> tuple[int, Any]:
    return answer(runs, runs.overview)


def status(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.status(runs.find(name)))


def metrics(runs: Runs, name: str, after: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.metrics(runs.find(name), _epoch(after)))


def picture(runs: Runs, name: str, which: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.picture(runs.find(name), which))


def grid(runs: Runs, name: str, epoch: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.grid(runs.find(name), _epoch(epoch)))


def evaluation(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.evaluation(runs.find(name)))


def at_strength(runs: Runs, name: str, epoch: str, strength: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.at_strength(runs.find(name), _epoch(epoch), _strength(strength)))


def stop(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.stop(runs.find(name)))


def table(runs: Runs) -> tuple[int, Any]:
    return answer(runs, lambda: tables.table(runs))


def delete(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: tables.delete(runs, runs.find(name)))


def taste(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: tastes_beside(runs).status(name))


def ballot(runs: Runs, name: str, shown: TasteFolder) -> tuple[int, Any]:
    return answer(runs, lambda: tastes_beside(runs).ballot(name, shown))


def vote(runs: Runs, name: str, body: str, shown: TasteFolder) -> tuple[int, Any]:
    return answer(runs, lambda: add_vote(tastes_beside(runs), runs, shown, name, parsed(body)))


def _epoch(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"got epoch {text[:40]!r}; expected a whole number")
    return int(text)


def _strength(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,9})?", text):
        raise ValueError(f"got strength {text[:40]!r}; expected a number, such as 0.75")
    return float(text)
