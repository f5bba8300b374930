"""Shapes: a small text-to-image world that ships with the package and learns on any machine."""

from pathlib import Path

WORLD = Path(__file__).parent / "world"
