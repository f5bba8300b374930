"""Atomic file writes, so that no file is ever left half-written."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import get_ident


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` create a temporary file beside `path`, flush it to disk, and rename it to `path`.

    Of several that write `path` at the same time, the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.partial{path.suffix}")
    try:
        with naming(path):
            write(beside)
            flush_to_disk(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    flush_to_disk(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block, an OSError without a file name, such as that of a full disk, gets the name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder if the system supports it."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
