"""Text for people, on whatever stream there is: one that knows few characters, one that nobody reads any more, none.

What is written here is never worth ending a training for.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

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

    def _try(self, act: Callable[[TextIO], object]) -> None:
        if self._stream is None or self._stream.closed:
            return
        try:
            act(self._stream)
        except BlockingIOError:  # whoever reads is slow, and misses this
            pass
        except OSError:
            _send_nowhere(self._stream)


def _send_nowhere(stream: TextIO) -> None:
    """Let nobody's print, and no flush at the end of the program, fail on a stream that nobody reads any more."""
    with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())
