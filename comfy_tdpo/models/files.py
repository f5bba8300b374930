"""The files of a model's folder: each is there, is what it should be, or is named in one ValueError."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

EXPECTED = "expected Stable Diffusion 1.x or 2.x: a diffusers folder, its hub id, or a whole .safetensors checkpoint"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def required(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} lacks {name}; {EXPECTED}; fetch or save the whole folder again")
    return folder / name


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch or save the whole folder again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {shorten(repr(values), 60)}; expected a JSON object; fetch the folder again")
    return values


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside the block whatever a library makes of a bad configuration becomes one error that names `path`."""
    try:
        yield
    except Exception as error:  # a constructor fed with odd values raises anything
        reason = shorten(str(error), 300)
        raise ValueError(f"{path} cannot be loaded: {reason}; {EXPECTED}; fetch or save it again") from error
