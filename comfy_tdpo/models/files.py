"""Reading the files of a model's folder. A missing or invalid file raises a ValueError that names it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from .unsupported import Other

SUPPORTED = "Stable Diffusion 1.x, 2.x, XL, 3 or 3.5 medium, FLUX.1, or Z-Image"
EXPECTED = f"expected {SUPPORTED} (a diffusers folder, its hub id, or a .safetensors checkpoint)"
AGAIN = "download or save the whole folder again"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


def required(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} lacks {name}; {EXPECTED}; download or save the whole folder again")
    return folder / name


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows add a mark
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; download or save the whole folder again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} contains {shorten(repr(values), 60)}; expected a JSON object; download the folder again"
        )
    return values


def refused(source: Path, other: Other, how: str = "") -> ValueError:
    """The error for a model of another family; how: it is known to be of it, if that helps."""
    return ValueError(f"{source} is {other.name}{how and f' ({how})'}; {EXPECTED}; nearest to it is {other.nearest}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn any exception that a bad configuration causes inside the block into a ValueError that names `path`."""
    try:
        yield
    except Exception as error:  # constructors given bad values raise all kinds of exceptions
        reason = shorten(str(error), 300)
        raise ValueError(f"{path} cannot be loaded: {reason}; {EXPECTED}; download or save it again") from error
