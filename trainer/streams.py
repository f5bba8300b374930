"""Standard streams that a training outlives: other encodings, closed ones, and readers that go away.

A name that a console cannot show, or a pipe into `head`, must not end a training.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Inside the block stdout and stderr show what they cannot encode as escapes, and are there even if closed.

    stderr tells how a training goes, so it keeps quiet where its reader goes away.
    """
    before = sys.stdout, sys.stderr
    _occupy_closed_descriptors()
    sys.stdout, sys.stderr = _open(sys.stdout), _Unheard(_open(sys.stderr))
    try:
        with _escaping(sys.stdout), _escaping(sys.stderr):
            yield
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def unheard_stdout() -> Iterator[None]:
    """Inside the block the same for stdout: what it says is of use to a reader only."""
    before = sys.stdout
    sys.stdout = _Unheard(before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before


def hush(stream: TextIO) -> None:
    """Have a stream whose reader is gone write to nowhere, so that the interpreter's last flush does not complain."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Unheard:
    """A stream that goes on where nobody reads it: a pipe was closed, a terminal has hung up, a disk is full."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            hush(self.stream)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            hush(self.stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _occupy_closed_descriptors() -> None:
    """Else the next file that is opened would get the number of a closed stream, and what is written to that."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one


def _open(stream: TextIO | None) -> TextIO:
    return stream or io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # None where it was closed from the beginning


@contextmanager
def _escaping(stream: Any) -> Iterator[None]:
    """Inside the block characters that `stream` cannot encode become escapes."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None:  # somebody else's stream
        yield
        return
    before = stream.errors
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        try:
            reconfigure(errors=before)
        except OSError:
            hush(stream)
