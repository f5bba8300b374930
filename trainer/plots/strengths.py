"""The same images at every strength (rows) and epoch (columns), beside those of the base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..recommend.choice import Recommendation
from ..recommend.files import Cell
from .drawing import DPI, GREY, INK, SMALL, VERMILION, render

SIDE, GAP = 1.25, 0.14  # inches: of a cell, and between cells
LEFT, TOP, RIGHT, BOTTOM = 1.15, 0.62, 0.15, 0.15
PIXELS = round(SIDE * DPI)


def strengths_figure(found: Recommendation, files: Mapping[Cell, list[Path]]) -> Image.Image:
    """The picture as RGB. `files` are the images of each cell, of which up to four are shown, two in a row."""
    from matplotlib.figure import Figure

    cells = {(outcome.cell.label, outcome.cell.strength): outcome.cell for outcome in found.outcomes}
    columns, rows = list(dict.fromkeys(label for label, _ in cells)), sorted({strength for _, strength in cells})
    width = LEFT + (len(columns) + 1) * (SIDE + GAP) + RIGHT
    height = TOP + len(rows) * (SIDE + GAP) + BOTTOM
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def show(column: int, row: int, cell: Cell) -> None:
        x, y = LEFT + column * (SIDE + GAP), height - TOP - row * (SIDE + GAP) - SIDE
        axes = figure.add_axes((x / width, y / height, SIDE / width, SIDE / height))
        axes.imshow(_mosaic(files[cell]), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        chosen = found.chosen is not None and cell == found.chosen.cell
        axes.spines[:].set(visible=chosen, color=VERMILION, linewidth=3)

    def write(x: float, y: float, text: str, **look: Any) -> None:
        figure.text(x / width, y / height, text, fontsize=SMALL, parse_math=False, **look)

    for row, strength in enumerate(rows):
        middle = height - TOP - row * (SIDE + GAP) - SIDE / 2
        write(LEFT - 0.12, middle, f"strength {strength:g}", color=GREY, ha="right", va="center")
        for column, label in enumerate(["base", *columns]):
            show(column, row, cells[label, strength] if column else found.base.cell)
    for column, label in enumerate(["base", *columns]):
        write(LEFT + column * (SIDE + GAP) + SIDE / 2, height - TOP + 0.09, label, color=GREY, ha="center")
    chosen = found.chosen
    text = f"recommended: {chosen.cell.label}, strength {chosen.cell.strength:g}" if chosen else "none is recommended"
    write(LEFT, height - 0.26, text, color=VERMILION if chosen else INK, weight="bold")
    return render(figure)


def _mosaic(paths: list[Path]) -> np.ndarray:
    """The images side by side, two in a row, in a white square of PIXELS."""
    side = 2 if len(paths) > 1 else 1
    gap = 2 * (side - 1)
    size = (PIXELS - gap) // side
    mosaic = Image.new("RGB", (PIXELS, PIXELS), "white")
    for index, path in enumerate(paths[: side**2]):
        row, column = divmod(index, side)
        with Image.open(path) as image:
            grown = image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
        mosaic.paste(grown, (column * (size + gap), row * (size + gap)))
    return np.asarray(mosaic)
