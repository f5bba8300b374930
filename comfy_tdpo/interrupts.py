"""Ctrl-C in a program that calls compiled libraries."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
