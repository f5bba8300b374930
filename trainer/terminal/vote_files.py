"""Votes from files: folders of liked and disliked pictures, and tables of ratings.

A table is CSV with a header that names the columns image and rating, and may name prompt; fields are separated by
commas, semicolons or tabs. Images are paths relative to the table. The lowest rating in a table counts as disliked, the
highest as liked, and others in proportion between.

Everything is read before anything is kept, so a file that cannot be read changes nothing.
"""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from comfy_tdpo.counts import number_of
from comfy_tdpo.user_files import read_text


@dataclass(frozen=True)
class Opinion:
    """What is thought of the picture in a file: liked is from 0 to 1."""

    path: Path
    liked: float
    prompt: str = ""


def opinions_in(folder: Path, liked: float) -> list[Opinion]:
    """One for every picture in `folder`; other files, and folders in it, are passed over."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and _is_picture(path))
    except OSError as error:
        raise ValueError(
            f"got '{folder}', which cannot be read: {error.strerror}; expected a folder of pictures"
        ) from error
    if not files:
        raise ValueError(f"got '{folder}', which holds no pictures; expected files such as PNG, JPEG or WebP in it")
    return [Opinion(path, liked) for path in files]


def _is_picture(path: Path) -> bool:
    Image.init()
    return not path.name.startswith(".") and path.suffix.lower() in Image.EXTENSION


def opinions_of(table: Path) -> list[Opinion]:
    """The ratings in a table."""
    text = read_text(table)
    try:
        rows = _rows(text)
        ratings = [_rating(place, rating) for place, _, rating, _ in rows]
        low, high = min(ratings, default=0.0), max(ratings, default=0.0)
        if low == high:
            raise ValueError(
                f"has {number_of(len(rows), 'rating')} and no two that differ; expected at least two different ones"
            )
    except ValueError as error:
        raise ValueError(f"ratings '{table}' {error}") from error
    return [
        Opinion(table.parent / image, (rating - low) / (high - low), " ".join(prompt.split()))
        for rating, (_, image, _, prompt) in zip(ratings, rows, strict=True)
    ]


def _rows(text: str) -> list[tuple[str, str, str, str]]:
    """Of each row: its place in the file, image, rating and prompt."""
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        if not {"image", "rating"} <= set(columns):
            raise ValueError(f"begins with {header!r:.80}; expected a header with the columns image and rating")
        for row in reader:
            if row and len(row) != len(columns):
                raise ValueError(
                    f"has {number_of(len(row), 'field')} in line {reader.line_num}; expected {len(columns)}"
                )
            if row:
                named = dict(zip(columns, map(str.strip, row), strict=True))
                rows.append((f"line {reader.line_num}", named["image"], named["rating"], named.get("prompt", "")))
    except csv.Error as error:
        raise ValueError(
            f"cannot be parsed at line {reader.line_num}: {error}; put double quotes around texts"
        ) from error
    return rows


def _rating(place: str, text: str) -> float:
    try:
        rating = float(text)
    except ValueError:
        rating = math.nan
    if not math.isfinite(rating):
        raise ValueError(f"has the rating {text!r:.40} in {place}; expected a number")
    return rating
