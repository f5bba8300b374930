"""Markup of other programs in prompts and prompt files, which a text encoder would read as words.

Signs that an encoder can read as they are, such as ((brackets)) and commas, are accepted.
"""

import json
import re
import unicodedata
from collections.abc import Sequence

# pattern, what it is, what to do
_MARKUP = tuple(
    (re.compile(sign), what, remedy)
    for sign, what, remedy in (
        (r"(?:^|\s)--[a-z]+\b", "options of another program", "remove them; they are settings and not words"),
        (r"\{[^{}]*\|[^{}]*\}", "alternatives of dynamic prompts", "write each alternative as a prompt of its own"),
        (r"__[\w*/.-]+__", "a wildcard", "write each choice as a prompt of its own"),
        (r"<[a-z]\w*:[^<>]*>", "a tag of a user interface", "remove it"),
        (r"\([^()]*[^\d\s():]\s*:\s*\d*\.?\d+\s*\)", "a weight of a user interface", "keep only the words"),
        (r"\[[^\[\]]*:[^\[\]]*:\s*\d*\.?\d+\s*\]", "prompt editing of a user interface", "keep only the words"),
        (r"\bembedding:\w", "an embedding of a user interface", "keep only the words"),
        (r"\{prompts?\}", "a placeholder of a style", "write the whole prompt"),
        (r"\\[()\[\]]", "an escaped bracket of a user interface", "remove the backslash"),
        (r"\)(?:\d*\.\d+|\++)(?=[\s,]|$)", "a weight of Compel", "keep only the words"),
        (r"\)\.(?:blend|and)\(", "a blend of Compel", "write each prompt on a line of its own"),
        (r"^/\w+ prompt:", "a chat command", "keep only the words"),
        (r"(?i)^negative[ _]prompts?:", "a negative prompt", "remove it; training uses none"),
        (r"^Steps: \d+, ", "settings of an image's metadata", "keep only its prompt"),
        (r"^(?://|;)\s", "a comment", "begin comments with #"),
        ("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "control characters or halves of characters", "remove them"),
    )
)
_NUMBER, _BULLET = re.compile(r"\d+[.):]\s"), re.compile(r"[-*•]\s")
_QUOTED = re.compile(r"""(?:"[^"]*"|'[^']*'|“[^“”]*”),?""")
_HEADER = re.compile(r"(?:[\w ]+[,;\t])*(?:prompts?|captions?)(?:[,;\t][\w ]+)*", re.IGNORECASE)


def check_words(prompts: Sequence[tuple[str, str]], expected: str = "plain words, read as they are") -> None:
    """Raise ValueError if any of the (place, prompt) pairs contains markup of another program, or nothing to draw."""
    for sign, what, remedy in _MARKUP:
        found = [(place, match[0]) for place, prompt in prompts if (match := sign.search(prompt))]
        if found:
            (place, example), others = found[0], len(found) - 1
            also = f" and {others} more" if others else ""
            raise ValueError(f"has {what} in {place}{also}, {example.strip(' ')!r:.60}; expected {expected}: {remedy}")
    for place, prompt in prompts:
        if not any(unicodedata.category(sign)[0] in "LN" or unicodedata.category(sign) == "So" for sign in prompt):
            raise ValueError(f"has no word in {place}, only {prompt!r:.60}; expected a prompt: remove the line")


def foreign_text(lines: list[str], text: str) -> str:
    """What the non-empty `lines` of a plain text file are, if not prompts, and what to do; empty if they are."""
    if _is_json(text.strip()):
        return "is JSON; expected one prompt per line: rename it to .json, or to .jsonl if every line is an object"
    if _HEADER.fullmatch(lines[0]) and len(lines) > 1:
        return f"begins with {lines[0]!r:.60}, as a table does; expected one prompt per line: rename it to .csv or .tsv"
    if len(lines) > 1 and all(map(_NUMBER.match, lines)):
        return f"has a number before every line, such as {lines[0]!r:.60}; expected only prompts: remove the numbers"
    if len(lines) > 1 and all(map(_BULLET.match, lines)):
        return f"has a bullet before every line, such as {lines[0]!r:.60}; expected only prompts: remove the bullets"
    if all(map(_QUOTED.fullmatch, lines)):
        return f"has every line in quotes, such as {lines[0]!r:.60}; expected only prompts: remove the quotes"
    return ""


def _is_json(text: str) -> bool:
    """Whether all of `text`, or its first line, is a JSON array or object."""
    if not text.startswith(("[", "{")):
        return False
    for part in (text.split("\n", 1)[0], text):
        try:
            json.loads(part)
        except (ValueError, RecursionError):
            continue
        return True
    return False
