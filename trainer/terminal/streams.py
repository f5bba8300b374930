"""Text for people, on whatever stream there is: one that knows few characters, one that nobody reads any more, none.

What is written here is never worth ending a training for.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

FALLBACKS = {"±": "+-", "\N{MINUS SIGN}": "-", "→": "->", "…": "..."}


def encodable(text: str, encoding: str | None, errors: str | None = None) -> str:
    """`text` with a stand-in for each character that `encoding` lacks: a similar one, or its backslash escape.

    Bytes of a file name that are no text, which Python holds as surrogates, are kept for a stream that writes them as
    they were; `errors` is that stream's.
    """
    handler = "surrogateescape" if errors == "surrogateescape" else "strict"
    try:
        text.encode(encoding or "utf-8", handler)
    except UnicodeEncodeError:
        if len(text) > 1:
            return "".join(encodable(character, encoding, errors) for character in text)
        return FALLBACKS.get(text) or text.encode("ascii", "backslashreplace").decode()
    return text


def say(text: str, stream: TextIO | None = None) -> None:
    """Print on `stream`, or on stdout as it is now; where that fails, nothing happens."""
    print(text, file=SafeStream(stream or sys.stdout), flush=True)


class SafeStream:
    """A text stream whose writes never raise; where `stream` is None they go nowhere."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str | None:
        return getattr(self._stream, "encoding", None)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def columns(self) -> int | None:
        """How long a line may be, one less than the terminal is wide; None where there is no terminal."""
        if self._stream is None or not self.isatty():
            return None
        try:
            return (os.get_terminal_size(self._stream.fileno()).columns or 80) - 1
        except OSError:
            return None

    def write(self, text: str) -> None:
        fitting = encodable(text, self.encoding, getattr(self._stream, "errors", None))
        self._try(lambda stream: stream.write(fitting))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self._stream is None or self._stream.closed:
            return
        try:
            act(self._stream)
        except BlockingIOError:  # whoever reads is slow, and misses this
            pass
        except OSError:
            hush(self._stream)


def hush(stream: TextIO) -> None:
    """Have a stream that nobody reads any more write to nowhere, so that no print and no last flush fails on it."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Inside the block stdout and stderr show what they cannot encode as escapes, and are there even if closed.

    stderr tells how a training goes, so it keeps quiet where its reader goes away.
    """
    before = sys.stdout, sys.stderr
    _occupy_closed_descriptors()
    sys.stdout, sys.stderr = _open(sys.stdout), SafeStream(_open(sys.stderr))
    try:
        with _escaping(sys.stdout):
            yield
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def unheard_stdout() -> Iterator[None]:
    """Inside the block the same for stdout: what it says is of use to a reader only."""
    before = sys.stdout
    sys.stdout = SafeStream(before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before


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
