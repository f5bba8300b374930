"""Asking another program over HTTP, patiently: what fails is asked again, after pauses that grow.

Answers are data from a stranger: they are limited in size, and what is made of them must pass the caller's check.
Each attempt has a thread of its own, so that neither a server that stalls nor one that sends a byte at a time keeps the
caller from heeding a stop or the time limit. An answer that comes after its time is never looked at.
"""

import logging
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPSConnection
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from ...counts import number_of
from ...interrupts import TICK, heed, told
from ..answers import RewardError
from .protocol import json_object

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

AT_ONCE = 8  # requests in flight
LARGEST_ANSWER = 2**20  # bytes
CONNECT = 10.0  # seconds to reach the server
SAID = 300  # characters quoted of what a server says
BUSY = (408, 425, 429)  # the statuses 4xx that ask to come again later


@dataclass(frozen=True)
class Patience:
    """timeout: seconds for a whole answer; pauses: seconds before each further attempt."""

    timeout: float = 300.0
    pauses: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 60)


PATIENCE = Patience()
ONCE = Patience(timeout=60.0, pauses=())


@dataclass(frozen=True)
class Request(Generic[Answer]):
    """A POST to `url`. `read` makes of the answer's body what is asked for, or raises ValueError with a reason."""

    url: str
    body: bytes
    read: Callable[[bytes], Answer]
    headers: dict[str, str] = field(default_factory=dict)


def ask(name: str, requests: list[Request[Answer]], patience: Patience | None = None) -> list[Answer]:
    """The answers to `requests` of the reward `name`; meanwhile, a stop is heeded.

    Raises:
        RewardError: the server refused a request, or some have no valid answer after the last attempt.
    """
    patience = patience or PATIENCE
    answers: dict[int, Answer] = {}
    began, failed = time.monotonic(), 0
    while True:
        before = len(answers)
        problem = _attempt_all(name, requests, answers, patience.timeout)
        if problem is None:
            return [answers[i] for i in range(len(requests))]
        failed = 1 if len(answers) > before else failed + 1
        if failed > len(patience.pauses):
            tried = f" in {failed} attempts and {time.monotonic() - began:.0f} s, the last" if failed > 1 else ""
            raise RewardError(
                f"reward {name!r} gave no valid answer{tried}: {problem}; expected scores of "
                f"{number_of(len(requests), 'request')}: see whether its server runs and what it prints; if it is too "
                "slow, lower micro_batch"
            )
        pause = patience.pauses[failed - 1]
        logger.warning(
            "reward %r: %s; waiting %g s to ask again (%d of %d)", name, problem, pause, failed, len(patience.pauses)
        )
        told(f"waiting for reward {name!r} ({problem})")
        _sleep(pause)


def _sleep(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        heed()
        time.sleep(min(left, TICK))


def _attempt_all(name: str, requests: list[Request[Answer]], answers: dict[int, Answer], timeout: float) -> str | None:
    """Attempt the requests without an answer, once each, and add their `answers`; what went wrong last, if anything."""
    done: SimpleQueue[_Attempt] = SimpleQueue()
    waiting = deque(i for i in range(len(requests)) if i not in answers)
    running: dict[_Attempt, int] = {}
    problem = None
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                i = waiting.popleft()
                running[_Attempt(requests[i], timeout, done)] = i
            heed()
            with suppress(Empty):
                attempt = done.get(timeout=TICK)
                if (i := running.pop(attempt, -1)) >= 0:  # it is not there if it came too late
                    try:
                        answers[i] = requests[i].read(attempt.body_of_answer(name))
                    except (ValueError, OSError) as error:
                        problem = str(error)
            for attempt in [attempt for attempt in running if time.monotonic() > attempt.end]:
                problem = f"no answer within {timeout:g} s"
                del running[attempt]
                attempt.give_up()
        return problem
    finally:
        for attempt in running:
            attempt.give_up()


class _Attempt:
    """One request on a connection and a thread of its own; it puts itself into `done`."""

    def __init__(self, request: Request, timeout: float, done: SimpleQueue):
        self._request, self._done, self._timeout = request, done, timeout
        self.end = time.monotonic() + timeout
        self._socket: socket.socket | None = None
        self._error: Exception | None = None
        self._status, self._body = 0, b""
        Thread(target=self._work, name="tdpo-reward", daemon=True).start()

    def _work(self) -> None:
        try:
            self._exchange()
        except Exception as error:  # a connection that is given up meanwhile may end in any exception
            self._error = error
        self._done.put(self)

    def _exchange(self) -> None:
        parts = urlsplit(self._request.url)
        connection = (HTTPSConnection if parts.scheme == "https" else HTTPConnection)(
            str(parts.hostname), parts.port, timeout=min(CONNECT, self._timeout)
        )
        try:
            connection.connect()
            self._socket = connection.sock
            self._socket.settimeout(2 * self._timeout)  # `ask` gives up before; this ends a thread it has lost
            headers = {"Connection": "close"} | self._request.headers
            connection.request("POST", parts.path or "/", self._request.body, headers)
            response = connection.getresponse()
            self._status, self._body = response.status, response.read(LARGEST_ANSWER + 1)
        finally:
            connection.close()

    def give_up(self) -> None:
        """Close the connection, which ends the thread."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def body_of_answer(self, name: str) -> bytes:
        """The body of an answer with status 200.

        Raises:
            OSError, ValueError: there is none, or it is too large; the message is the reason.
            RewardError: the server refused the request.
        """
        if self._error is not None:
            raise OSError(f"{type(self._error).__name__}: {_printable(str(self._error))}")
        if len(self._body) > LARGEST_ANSWER:
            raise ValueError(f"an answer of more than {LARGEST_ANSWER} bytes")
        if self._status == 200:
            return self._body
        said = f"status {self._status}: {_said(self._body)}"
        if 400 <= self._status < 500 and self._status not in BUSY:
            raise RewardError(f"reward {name!r} refused what it was asked ({said})")
        raise ValueError(said)


def _said(body: bytes) -> str:
    """What an error's body says, in one line: our `error`, or OpenAI's `error.message`, or the text itself."""
    with suppress(ValueError):
        error = json_object(body).get("error")
        return _printable(str(error.get("message", "")) if isinstance(error, dict) else str(error))
    return _printable(body.decode("utf-8", "replace")) or "no reason given"


def _printable(text: str) -> str:
    """`text` on one line without control characters, which could write anywhere on a terminal."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= SAID else line[:SAID] + "..."
