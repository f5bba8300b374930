"""Text for people, on any stream: with few characters, without a reader, or missing altogether.

A failure to write it never ends a training.
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
    """`text` with each character that `encoding` lacks replaced by a similar one, or by its backslash escape.

    Undecodable bytes of file names, which Python represents as surrogates, are kept if `errors`, the stream's error
    handler, is "surrogateescape" and thus writes them unchanged.
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
    """Print on `stream`, by default the current stdout; failures are ignored."""
    print(text, file=SafeStream(stream or sys.stdout), flush=True)


class SafeStream:
    """A text stream whose writes never raise; if `stream` is None, they are discarded."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str | None:
        return getattr(self._stream, "encoding", None)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def columns(self) -> int | None:
        """The longest line that fits, one less than the terminal's width; None if there is no terminal."""
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
        except BlockingIOError:  # the reader is slow, and misses this text
            pass
        except OSError:
            hush(self._stream)


def hush(stream: TextIO) -> None:
    """Redirect a stream without a reader to the null device, so that neither prints nor the last flush fail."""
    with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


@contextmanager
def forgiving_streams() -> Iterator[None]:
    """Inside the block, stdout and stderr escape what they cannot encode, and exist even if they were closed.

    stderr only reports progress, so nothing fails when its reader goes away.
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
    """Inside the block, nothing fails when the reader of stdout goes away either."""
    before = sys.stdout
    sys.stdout = SafeStream(before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before


def _occupy_closed_descriptors() -> None:
    """Open the null device in place of closed streams, or the next opened file would get their number and output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def _open(stream: TextIO | None) -> TextIO:
    return stream or io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # None if it was closed from the start


@contextmanager
def _escaping(stream: Any) -> Iterator[None]:
    """Inside the block, characters that `stream` cannot encode become escapes."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None:  # not one of Python's own streams
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
