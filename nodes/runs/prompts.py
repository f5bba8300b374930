"""Prompts as a graph writes them: CLIP reads each line with ComfyUI's syntax, and rewards read its words.

(red:1.3), ((red)) and \\( are read as by ComfyUI's tokenizer. The words are its text without weights, without the names
of embeddings, and without BREAK, which some custom nodes read as a separator.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.clean_text import clean, one_line
from comfy_tdpo.prompts.files import prompt_lines
from comfy_tdpo.prompts.markup import check_words

from ...trainer.run.folder import spread as evenly

WRITTEN = "comfyui-prompts.json"  # in a run's folder: `written` of its prompts, if there are any
EXPECTED = "words, with ComfyUI's weights or without"
_ESCAPED = {"\\(": "\ufdd0", "\\)": "\ufdd1"}  # code points that are no characters, for the time of parsing
_NO_WORDS = re.compile(r"(?:^|(?<=\s))embedding:[^\s,]+,?|(?:^|(?<=[\s,]))BREAK(?:,|(?=\s|$))")


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run.

    words: what rewards read, and what names a prompt everywhere; written: for each of those that CLIP reads otherwise,
    the line as it was written.
    """

    words: list[str]
    written: dict[str, str] = field(default_factory=dict)

    def for_clip(self, words: str) -> str:
        return self.written.get(words, words)


def read_prompts(text: str, widget: str) -> Prompts:
    """The prompts in the text of a widget, see `read_lines`.

    Raises:
        ValueError: two lines differ in nothing but their syntax, so that their words would name two prompts.
    """
    written: dict[str, str] = {}
    lines = read_lines(text, widget)
    for words, line in lines:
        if written.setdefault(words, line) != line:
            raise ValueError(
                f"the text of {widget} has {line!r:.60}, which differs from an earlier line only in its weights; "
                "expected each line's words once, since rewards read nothing else: remove one of the two"
            )
    return Prompts([words for words, _ in lines], {words: line for words, line in written.items() if words != line})


def read_lines(text: str, widget: str) -> list[tuple[str, str]]:
    """The words and the whole of each line of a widget's text; blank lines and comments, which begin with #, are left
    out.

    Raises:
        ValueError: a line has no word, or another program's markup; or all lines are comments.
    """
    lines = [(place, one_line(line)) for place, line in prompt_lines(text)]
    words = [words_of(line) for _, line in lines]
    try:
        if not lines and clean(text).strip():
            raise ValueError("contains only comments; expected a prompt: add one, or delete the text")
        check_words([(place, own) for (place, _), own in zip(lines, words, strict=True)], EXPECTED)
    except ValueError as error:
        raise ValueError(f"the text of {widget} {error}") from error
    return [(own, line) for own, (_, line) in zip(words, lines, strict=True)]


def spread(prompts: list[str], count: int) -> list[str]:
    """`count` of the prompts in their order, spread evenly; at most all."""
    return evenly(prompts, min(count, len(prompts)))


def keep_written(folder: Path, prompts: Prompts) -> None:
    """Keep in a run's folder what CLIP reads, if that is not the words."""
    path, text = folder / WRITTEN, json.dumps(prompts.written, ensure_ascii=False, indent=1)
    if prompts.written:
        write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    else:
        path.unlink(missing_ok=True)


def written_in(folder: Path) -> dict[str, str]:
    """What `keep_written` kept in a run's folder.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / WRITTEN
    if not path.exists():
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or start a new run") from error
    return written if isinstance(written, dict) else {}


# --- the words


def words_of(line: str) -> str:
    """The words of a prompt in ComfyUI's syntax."""
    for escaped, sign in _ESCAPED.items():
        line = line.replace(escaped, sign)
    parts = list(_parts(line))
    bare = [_NO_WORDS.sub("", part) for part in parts]
    words = one_line("".join(bare))
    for escaped, sign in _ESCAPED.items():
        words = words.replace(sign, escaped[1])
    return words if bare == parts else words.strip(" ,")


def _parts(text: str) -> Iterator[str]:
    """The stretches of `text` between brackets of the outermost level, and those within them, without weights."""
    level = start = 0
    for i, sign in enumerate(text):
        if sign == "(":
            if level == 0:
                yield from _within(text[start:i])
                start = i
            level += 1
        elif sign == ")":
            level -= 1
            if level == 0:
                yield from _within(text[start : i + 1])
                start = i + 1
    yield from _within(text[start:])


def _within(part: str) -> Iterator[str]:
    if not (len(part) >= 2 and part[0] == "(" and part[-1] == ")"):
        yield part
        return
    inside, colon, weight = part[1:-1].rpartition(":")
    yield from _parts(inside if colon and inside and _is_number(weight) else part[1:-1])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
