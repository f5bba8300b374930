"""Resolutions: the side of a square in pixels, or WIDTHxHEIGHT."""

import re
from typing import Any

LEAST, MOST = 8, 8192  # pixels of a side
_SIDES = re.compile(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*")


def sides(resolution: int | str) -> tuple[int, int]:
    """Width and height in pixels."""
    if isinstance(resolution, int):
        return resolution, resolution
    width, _, height = resolution.partition("x")
    return int(width), int(height)


def normalised(value: Any) -> int | str:
    """The resolution that a user gave: the side of a square as a number, any other as WIDTHxHEIGHT.

    Raises:
        ValueError: it is none, or a side is too short or too long.
    """
    pair = _SIDES.fullmatch(value) if isinstance(value, str) else None
    try:
        width, height = map(int, pair.groups()) if pair else (int(value), int(value))
    except (ValueError, TypeError, OverflowError):
        raise _wrong() from None
    if (isinstance(value, float) and value != width) or not all(LEAST <= side <= MOST for side in (width, height)):
        raise _wrong()
    return width if width == height else f"{width}x{height}"


def check_multiple(resolution: int | str, factor: int, setting: str = "resolution") -> None:
    """Raise ValueError if a side is not a positive multiple of `factor`, the pixels for each patch of a latent.

    The message names the `setting`.
    """
    if any(side <= 0 or side % factor for side in sides(resolution)):
        raise ValueError(f"got {setting} {resolution}; expected a positive multiple of {factor} pixels")


def latent_sides(resolution: int | str, factor: int, patch: int, setting: str = "resolution") -> tuple[int, int]:
    """Height and width of the latent, of which an element has `factor` pixels a side, and a patch `patch` elements.

    Raises:
        ValueError: a side is no whole number of patches; it names the `setting`.
    """
    check_multiple(resolution, factor * patch, setting)
    width, height = sides(resolution)
    return height // factor, width // factor


def _wrong() -> ValueError:
    return ValueError(f"expected a whole number from {LEAST} to {MOST}, or WIDTHxHEIGHT, such as 832x1216")
