"""Reads TOML that a user wrote or edited, and says what to do if it is invalid."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from comfy_tdpo.clean_text import UNUSUAL
from comfy_tdpo.user_files import read_text

LARGEST = 2**20  # bytes; a whole configuration has a few thousand

# Patterns of a line that cannot be read, and what to do; the first match is reported.
_ADVICE = tuple(
    (re.compile(sign), advice)
    for sign, advice in (
        (UNUSUAL, "it has an unusual space or an invisible character: type the line again"),
        ("[\u201c\u201d\u201e\u2018\u2019]", "TOML does not accept typographic quotes: type \" or ' instead"),
        (
            r"=.*\"[^\"]*\\",
            "a backslash in double quotes starts an escape: write a path in single quotes or with forward slashes",
        ),
        (r"^\s*(//|;|/\*|--)", "comments begin with #"),
        (r"^\s*-\s|^\s*[\w.-]+\s*:", "this looks like YAML: TOML has KEY = VALUE, and sections in [brackets]"),
        (r"=\s*(True|False|TRUE|FALSE|yes|no|on|off)\b", "write true or false"),
        (r"=\s*(None|null|nil|NULL|)\s*(#|$)", 'a value is missing; to unset a setting, write "none", in quotes'),
        (r"=\s*[+-]?(\.\d|\d+\.(\D|$))", "a number needs a digit on both sides of its decimal point"),
        (r"=\s*[+-]?\d+,\d", "write a decimal point, not a comma"),
        (r"=\s*[^\W\d]|=\s*[./~\\]", 'text needs quotes: KEY = "text"'),
        (r"\{[^}=]*:", "write = between a name and its value"),
        (r"\{[^}]*,\s*\}", "remove the comma before the brace"),
        (r"\{[^}]*$", "braces must close on the same line: use a [section] for longer tables"),
        (r"^\s*[^=\[]*$", "expected KEY = VALUE"),
    )
)
# tomllib's words
_TWICE = "Cannot"  # overwrite, declare, mutate
_UNCLOSED = ("Unterminated string", "Illegal character '\\n'", 'Expected "\'"')


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file; ValueError, with a one-line message that names the file, if it is invalid."""
    try:
        text = read_text(path, LARGEST)
    except ValueError as error:
        raise ValueError(f"configuration {error}") from error
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ValueError(f"configuration '{path}' cannot be read: {error}") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The values in `text`; ValueError, with a one-line message that says what to do, if it is not valid TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are nested too deeply") from error
    except ValueError as error:  # invalid TOML, or too long a number
        if text.lstrip().startswith("{") and _is_json(text):
            raise ValueError(
                "it is JSON; expected TOML, which has KEY = VALUE lines and [sections]: --print-config shows an example"
            ) from error
        raise ValueError(_explain(str(error), text)) from error


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _explain(message: str, text: str) -> str:
    found = re.search(r"\(at line (\d+), column \d+\)", message)
    lines = text.rstrip().split("\n")
    number = int(found[1]) if found else len(lines)
    for at in (number, number - 1):  # an unclosed value is noticed on the next line
        line = lines[at - 1].strip() if 0 < at <= len(lines) else ""
        if advice := line and _advice(message, line):
            return f"line {at}, '{line:.80}': {advice}"
    return message


def _advice(message: str, line: str) -> str:
    if message.startswith(_TWICE):
        return "this is defined twice: keep one of them"
    if message.startswith(_UNCLOSED) and line.count('"') % 2 + line.count("'") % 2:
        return "its quotes are not closed"
    return next((advice for sign, advice in _ADVICE if sign.search(line)), "")
