"""Prompt sets: plain text files, one prompt a line.

`simple-animals` (45) is the set the paper trains on; `unseen-animals` and `complex` are those it evaluates on
(arXiv 2402.08552, Section 5.3). `shapes`, `shapes-unseen` and `shapes-complex` are the same for the embedded world.
"""

from pathlib import Path
from textwrap import shorten

_FOLDER = Path(__file__).parent
NEEDS_A_COPY = {
    "hpd-photo": "the 802 photo prompts of Human Preference Dataset v2 (huggingface.co/datasets/zhwang/HPDv2)",
}


def prompt_sets() -> list[str]:
    """The names of the sets that ship with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.txt"))


def load_prompts(source: str) -> list[str]:
    """The prompts of a shipped set, or of a text file with one prompt a line.

    Raises:
        ValueError: there is no such set or file, or it holds no prompt.
    """
    path = _FOLDER / f"{source}.txt" if source in prompt_sets() else Path(source).expanduser()
    if not _is_file(path):
        if source in NEEDS_A_COPY:
            raise ValueError(
                f"prompt set {source!r}, {NEEDS_A_COPY[source]}, does not ship with this package: save it as a text "
                "file, one prompt a line, and give that file's path"
            )
        raise ValueError(
            f"got prompts {shorten(source, 200)!r}; expected a text file with one prompt a line, or one of "
            + ", ".join(prompt_sets())
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"prompts {source!r} cannot be read as UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {source!r} is empty; expected at least one line of text")
    return prompts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # its name is too long to be one
        return False
