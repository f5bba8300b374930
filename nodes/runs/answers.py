"""Answers to HTTP requests about runs and tastes: a status code, and JSON or a picture."""

from collections.abc import Callable
from typing import Any

from .registry import NoSuchRun, NotRunning, Runs
from .tastes import NoSuchTaste, tastes_beside
from .voting import add_vote, parsed

STATUS = {NoSuchRun: 404, NoSuchTaste: 404, NotRunning: 409}


def answer(runs: Runs, ask: Callable[[], Any]) -> tuple[int, Any]:
    """The HTTP status, and what `ask` returns or one sentence that says why it failed."""
    try:
        return 200, ask()
    except ValueError as error:
        return STATUS.get(type(error), 400), {"error": runs.told(" ".join(str(error).split()))}


def overview(runs: Runs) -> tuple[int, Any]:
    return answer(runs, runs.overview)


def status(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.status(runs.find(name)))


def metrics(runs: Runs, name: str, after: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.metrics(runs.find(name), _epoch(after)))


def picture(runs: Runs, name: str, which: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.picture(runs.find(name), which))


def stop(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: runs.stop(runs.find(name)))


def taste(runs: Runs, name: str) -> tuple[int, Any]:
    return answer(runs, lambda: tastes_beside(runs).status(name))


def vote(runs: Runs, name: str, body: str) -> tuple[int, Any]:
    return answer(runs, lambda: add_vote(tastes_beside(runs), runs, name, parsed(body)))


def _epoch(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ValueError(f"got after={text[:40]!r}; expected an epoch's number")
    return int(text)
