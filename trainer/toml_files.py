"""TOML that a user wrote or edited."""

import tomllib
from pathlib import Path
from typing import Any

from comfy_tdpo.user_files import read_text

LARGEST = 2**20  # bytes; the whole configuration has a few thousand


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file; ValueError, one line that names it, where it is none."""
    try:
        return tomllib.loads(read_text(path, LARGEST))
    except (ValueError, RecursionError) as error:  # of text, of TOML, of an endless number or nesting
        raise ValueError(f"configuration '{path}' cannot be read: {error}") from error
