"""The versions of ComfyUI that tests run against: where they lie, how they start, and what they answer."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

import children
import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Backend:
    """A checkout of ComfyUI with an environment `.venv` in it.

    start: what starts its server, up to the folder for everything that it writes; flags: what else it needs.
    asks: whether each of its layers looks for a Cancel.
    """

    name: str
    checkout: Path
    start: tuple[str, ...]
    flags: tuple[str, ...] = ()
    asks: bool = field(kw_only=True)

    @property
    def python(self) -> Path:
        return self.checkout / ".venv" / "bin" / "python"

    @property
    def missing(self) -> str:
        """Why its tests are skipped; empty if it is there."""
        return f"no ComfyUI {self.name} with an environment: {self.python} is missing" * (not self.python.exists())

    def command(self, base: Path) -> list[str]:
        return [str(self.python), *self.start, str(base), *self.flags]


def _checkout(variable: str, name: str) -> Path:
    return Path(os.environ.get(variable, Path.home() / "comfy" / name))


OLDEST = Backend("0.3.64", _checkout("COMFYUI_PATH", "ComfyUI"), ("main.py", "--base-directory"), asks=False)
# A fork of 0.10 that can be installed as a package; as such it also loads node packs, and lists files it could download
NEWER = Backend(
    "0.10",
    _checkout("COMFYUI_NEWER_PATH", "ComfyUI-0.10"),
    ("-m", "comfy.cmd.main", "--cwd"),
    ("--disable-known-models",),
    asks=True,
)
# The newest frontend, unpacked from its wheel; each of them comes with one of its own
FRONTEND = _checkout("COMFYUI_FRONTEND_PATH", "frontend-1.58")


def skipped_without(backend: Backend) -> pytest.MarkDecorator:
    return pytest.mark.skipif(bool(backend.missing), reason=backend.missing)


def each(full: Backend | None = None) -> list[Any]:
    """For `parametrize`: each of them, skipped where it is not there; `full` is asked with -m full alone."""
    marks = {backend: [skipped_without(backend)] for backend in (OLDEST, NEWER)}
    if full and not any(other.missing for other in marks if other is not full):
        marks[full].append(pytest.mark.full)
    return [pytest.param(backend, id=backend.name, marks=marks[backend]) for backend in marks]


def ask(*question: str, backend: Backend = OLDEST) -> dict[str, Any]:
    """What inside_comfyui answers under ComfyUI's own Python."""
    return _asked(backend, *question)


@cache
def _asked(backend: Backend, *question: str) -> dict[str, Any]:
    return _answering(backend)(*question)


@cache
def _answering(backend: Backend) -> "_Answering":
    return _Answering(backend)


class _Answering:
    """A process that answers one question after the other, since its start takes longer than most answers.

    It ends with its standard input, at the latest when the tests do.
    """

    def __init__(self, backend: Backend):
        self._folder = TemporaryDirectory(ignore_cleanup_errors=True)
        self._errors = Path(self._folder.name) / "errors.txt"
        command = [backend.python, ROOT / "tests" / "inside_comfyui", backend.checkout]
        with self._errors.open("w") as errors:
            self._process = children.start(
                command, cwd=self._folder.name, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def __call__(self, *question: str) -> dict[str, Any]:
        assert self._process.poll() is None, self._errors.read_text()
        print(json.dumps(question), file=self._process.stdin, flush=True)
        too_long = Timer(900, self._process.kill)
        too_long.start()
        try:
            answer = next((line for line in self._process.stdout if line.startswith("{")), None)
        finally:
            too_long.cancel()
        assert answer, self._errors.read_text()
        found = json.loads(answer)
        assert "traceback" not in found, found["traceback"]
        return found
