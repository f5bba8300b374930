"""Writing files so that none is ever found half written."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, flush it to the disk, and put it in place; never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial{path.suffix}")
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
    """Inside the block an OSError that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def flush_to_disk(path: Path) -> None:
    """fsync a file, or a folder where the system can."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
