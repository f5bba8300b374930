"""Stops that come while something else runs: Ctrl-C in compiled libraries, and a stop while the program waits.

What waits, or takes long, need not know for whom: `heed` and `told` reach the block of `heeding` around it.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

TICK = 0.1  # seconds between two looks whether to stop

_check: ContextVar[Callable[[], None]] = ContextVar("check", default=lambda: None)
_tell: ContextVar[Callable[[str], None]] = ContextVar("tell", default=lambda text: None)


@contextmanager
def heeding(check: Callable[[], None], tell: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Inside the block, whatever waits calls `check` many times a second through `heed`; it may raise to stop. `tell`
    hears from it, through `told`, what it waits for.

    Whatever exception that ends in leaves the block as the one that `check` raised: code in between, such as a sum of
    rewards, may take it for a failure of its own.
    """
    raised: Exception | None = None

    def ask() -> None:
        nonlocal raised
        try:
            check()
        except Exception as error:
            raised = error
            raise

    check_token, tell_token = _check.set(ask), _tell.set(tell)
    try:
        yield
    except Exception:
        if raised is not None:
            raise raised  # noqa: B904  # it is what the exception in flight began as
        raise
    finally:
        _check.reset(check_token)
        _tell.reset(tell_token)


def heed() -> None:
    """Called by what waits or takes long: raises what the `check` of the block around it raises."""
    _check.get()()


def told(text: str) -> None:
    """Called by what waits, with what it waits for, such as "waiting for a server"."""
    _tell.get()(text)


class Meanwhile(Generic[Result]):
    """What `work` returns, computed on a thread of its own, which heeds the stops of the block that begins it."""

    def __init__(self, work: Callable[[], Result]):
        self._work, self._stops, self._waits_for = work, _check.get(), ""
        self._given_up, self._done = Event(), Event()
        self._result: Result | None = None
        self._error: BaseException | None = None
        Thread(target=self._run, name="tdpo-meanwhile", daemon=True).start()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def result(self) -> Result:
        """What `work` returned, or an exception that it raised. Heeds stops while it waits."""
        while not self._done.wait(TICK):
            heed()
            if self._waits_for:
                told(self._waits_for)
                self._waits_for = ""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # it has been set

    def give_up(self) -> None:
        """End the thread as soon as it heeds; nobody waits for the result any more."""
        self._given_up.set()

    def _run(self) -> None:
        try:
            with heeding(self._check, self._hear):
                self._result = self._work()
        except BaseException as error:  # it is raised where the result is asked for
            self._error = error
        self._done.set()

    def _check(self) -> None:
        if self._given_up.is_set():
            raise InterruptedError("nobody waits for it any more")
        self._stops()

    def _hear(self, text: str) -> None:
        self._waits_for = text


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Inside the block, whatever exception Ctrl-C ends in leaves the block as KeyboardInterrupt.

    Compiled code may replace the one that Python raises: while safetensors reads a file, torch often makes of it a
    ValueError about the shape of an object.

    Raises:
        KeyboardInterrupt: SIGINT came, and an exception passed.
    """
    came = False

    def handle(_signum: int, _frame: Any) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored from the start, or handled by another program
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except Exception as error:
        if came:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
