"""Processes that tests start: Ctrl-C reaches them as on a terminal, and none outlives its test."""

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil


def start(command: Sequence[Any], **settings: Any) -> subprocess.Popen:
    """A process that hears SIGINT, even where whoever started the tests had it ignored; to be ended by `end`."""
    with _sigint_heard():
        return subprocess.Popen([str(part) for part in command], **settings)


def end(process: subprocess.Popen) -> None:
    """Kill what still runs of a process and of those that it started, and close its pipes."""
    if process.poll() is None:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.wait()


@contextmanager
def _sigint_heard() -> Iterator[None]:
    """A child inherits that a signal is ignored, but not a handler: inside the block there is one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
