"""Files with one JSON object a line, which a process may be ended in the middle of writing."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from comfy_tdpo.atomic_files import naming
from comfy_tdpo.user_files import read_text

Line = dict[str, Any]


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append `lines` to the file, which is made if there is none, and flush it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, check: Callable[[Line], None], remedy: str) -> list[Line]:
    """The lines of the file, none if there is none; a last line that was cut off mid-write is removed from it.

    check: raises ValueError, KeyError or TypeError for what is no line of such a file; remedy: what to do then.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    end = whole.rfind(b"\n") + 1
    if end < len(whole):
        os.truncate(path, end)
    try:
        lines = [json.loads(line) for line in read_text(path).splitlines()]
        for line in lines:
            check(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
    return lines
