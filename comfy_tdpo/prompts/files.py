"""Prompts from a user's file: plain text, or a table with named columns.

- .txt and any suffix not listed here: one prompt per line. Blank lines are skipped, and so are lines that begin with
  "#", which are comments as in kohya's sample prompts and in wildcard files.
- .csv, .tsv: a header with one of COLUMNS; fields separated by commas, semicolons or tabs.
- .json: an array of prompts, or of objects with one of COLUMNS as a key. .jsonl, .ndjson: the same, one per line.

A prompt that occurs twice is drawn twice as often. Signs that nobody sees are left out, and whitespace inside a prompt
is reduced to single spaces. Nothing else is changed or skipped: prompts that cannot be used word for word are rejected.
"""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..clean_text import clean, one_line
from ..counts import number_of
from ..user_files import read_text
from .markup import check_words, foreign_text

COLUMNS = ("prompt", "prompts", "caption", "captions", "text")  # "prompt" takes precedence
SUFFIXES = ".txt, .csv, .tsv, .json or .jsonl"
_NO_PROMPTS = {
    **dict.fromkeys((".yaml", ".yml"), "YAML"),
    ".toml": "TOML",
    ".ini": "INI",
    ".xml": "XML",
    ".html": "HTML",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}

Found = tuple[str, Any]  # place in the file, value


def read_prompts(path: Path) -> list[str]:
    """The prompts in the file `path`, in order.

    Raises:
        ValueError: the file or one of its prompts is not as described above; the message says where, and what to do.
    """
    suffix = path.suffix.lower()
    if suffix in _NO_PROMPTS:
        raise ValueError(
            f"got {_NO_PROMPTS[suffix]} as prompts, '{path}'; expected {SUFFIXES}: save one prompt per line as .txt"
        )
    text = read_text(path)
    try:
        found = list(_READERS.get(suffix, prompt_lines)(text))
        if not found:
            raise ValueError("holds no prompt; expected one per line (lines that begin with # are comments)")
        if suffix not in _READERS:
            if reason := foreign_text([prompt for _, prompt in found], text):
                raise ValueError(reason)
            check_words(found)
            found = [(place, one_line(prompt)) for place, prompt in found]
        else:
            found = [(place, _text(place, prompt)) for place, prompt in found]
            check_words(found)
    except ValueError as error:
        raise ValueError(f"prompts '{path}' {error}") from error
    return [prompt for _, prompt in found]


def prompt_lines(text: str) -> Iterator[Found]:
    """The lines of `text` that are neither empty nor comments, each with its number."""
    for number, line in enumerate(clean(text).split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", line.strip()


def _text(place: str, prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"has {prompt!r:.60} in {place}; expected a prompt as text")
    if not prompt.strip():
        raise ValueError(f"has no prompt in {place}; fill it in or remove the {place.split()[0]}")
    return one_line(prompt)


# --- tables


def _csv(text: str) -> Iterator[Found]:
    header = text.split("\n", 1)[0]
    delimiter = next((sign for sign in ",;\t" if _column(header.split(sign)) is not None), ",")
    return _rows(text, delimiter)


def _tsv(text: str) -> Iterator[Found]:
    return _rows(text, "\t")


def _rows(text: str, delimiter: str) -> Iterator[Found]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        column = _column(header)
        if column is None:
            raise ValueError(
                f"begins with {delimiter.join(header)!r:.80}; expected the names of its columns, one of them "
                f"{' or '.join(COLUMNS)}: add or rename it, or save one prompt per line as .txt"
            )
        for row in reader:
            place = f"line {reader.line_num}"
            if row and len(row) != len(header):
                raise ValueError(
                    f"has {number_of(len(row), 'field')} in {place} and {len(header)} in its header; a prompt that "
                    f"contains {delimiter!r} needs double quotes around it"
                )
            if row:
                yield place, row[column]
    except csv.Error as error:
        raise ValueError(
            f"cannot be parsed at line {reader.line_num}: {error}; double any quotes inside a prompt, and put quotes "
            "around the prompt"
        ) from error


def _column(names: list[str]) -> int | None:
    """The index of the column of prompts in `names`; None if that is not certain."""
    plain = [name.strip().strip('"').lower() for name in names]
    found = [plain.index(name) for name in COLUMNS if name in plain]
    return found[0] if len(found) == 1 or "prompt" in plain else None


# --- JSON


def _json(text: str) -> Iterator[Found]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return _json_lines(text)  # many data sets are JSON lines in a file called .json
        raise ValueError(f"is not valid JSON: {error}; correct it, or save one prompt per line as .txt") from error
    if not isinstance(values, list):
        raise ValueError(f"holds {json.dumps(values):.60}; expected an array of prompts, or of objects with a prompt")
    return (_value(f"item {number}", value) for number, value in enumerate(values, 1))


def _json_lines(text: str) -> Iterator[Found]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"is not valid JSON in line {number}: {error}; expected one object or string per line: correct it, "
                    "or rename the file to .json if it is a single array"
                ) from error
            yield _value(f"line {number}", value)


def _value(place: str, value: Any) -> Found:
    if not isinstance(value, dict):
        return place, value
    keys = list(value)
    column = _column(keys)
    if column is None:
        raise ValueError(
            f"has the keys {', '.join(keys):.80} in {place}; expected one of them to be {' or '.join(COLUMNS)}: "
            "rename the key of the prompt"
        )
    return place, value[keys[column]]


_READERS = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines}
