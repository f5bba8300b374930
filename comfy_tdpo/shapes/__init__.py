"""Shapes: a small text-to-image world that ships with the package and can be trained on any machine."""

from pathlib import Path

WORLD = Path(__file__).parent / "world"
