"""Prompt sets: plain text files, one prompt per line.

The paper trains on `simple-animals` (45 prompts) and evaluates on `unseen-animals` and `complex` (arXiv 2402.08552,
Section 5.3). `shapes`, `shapes-unseen` and `shapes-complex` are their counterparts for the embedded world.
"""

from pathlib import Path
from textwrap import shorten

from ..user_files import user_path
from .files import read_prompts

_FOLDER = Path(__file__).parent
NEEDS_A_COPY = {
    "hpd-photo": "the 802 photo prompts of Human Preference Dataset v2 (huggingface.co/datasets/zhwang/HPDv2)",
}


def prompt_sets() -> list[str]:
    """The names of the prompt sets that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def load_prompts(source: str) -> list[str]:
    """The prompts of a shipped set or of a user's file, see `files.read_prompts`.

    Raises:
        ValueError: there is no such set or file, or it is not a list of prompts.
    """
    if source in prompt_sets():
        return read_prompts(_FOLDER / f"{source}.txt")
    path = user_path(source)
    if not _exists(path):
        if source in NEEDS_A_COPY:
            raise ValueError(
                f"prompt set {source!r}, {NEEDS_A_COPY[source]}, does not ship with this package: save it as a text "
                "file, one prompt per line, and give that file's path"
            )
        raise ValueError(
            f"got prompts {shorten(source, 200)!r}; expected a text file with one prompt per line, or one of "
            + ", ".join(prompt_sets())
        )
    return read_prompts(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # the name is too long for a path, or access is denied
        return False
