"""The same prompts from the same noise (rows) by the base model and by each set-up at equal reward (columns)."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..evaluation.numbers import Chosen
from ..metrics import readable, shortened
from .drawing import DPI, GREY, INK, SMALL, render

SIDE, GAP = 1.3, 0.08  # inches: of an image, and between images
LEFT, TOP, RIGHT, BOTTOM = 1.75, 1.05, 0.15, 0.1
PIXELS = round(SIDE * DPI)


def equal_reward_figure(
    training: str, prompts: Sequence[str], columns: Sequence[Chosen], files: Sequence[Sequence[Path]]
) -> Image.Image:
    """The picture as RGB; files: of each column, an image per prompt. The first column is the base model's."""
    from matplotlib.figure import Figure

    width = max(LEFT + len(columns) * (SIDE + GAP) + RIGHT, 5.0)
    height = TOP + len(prompts) * (SIDE + GAP) + BOTTOM
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def write(x: float, y: float, text: str, **look: Any) -> None:
        figure.text(x / width, y / height, text, parse_math=False, **({"fontsize": SMALL} | look))

    level = "equal" if len(columns) > 2 else "the highest"
    write(0.15, height - 0.3, f"At {level} {shortened(training, 40)}", color=INK, fontsize=13, weight="bold")
    for row, prompt in enumerate(prompts):
        middle = height - TOP - row * (SIDE + GAP) - SIDE / 2
        write(LEFT - 0.12, middle, _wrapped(prompt, 22, 5), color=INK, ha="right", va="center")
    for column, (chosen, paths) in enumerate(zip(columns, files, strict=True)):
        x = LEFT + column * (SIDE + GAP)
        epoch = "" if chosen.cell.is_base else f"epoch {chosen.cell.epoch}: "
        write(x + SIDE / 2, height - TOP + 0.25, _wrapped(chosen.label, 15, 2), color=INK, ha="center", weight="bold")
        write(x + SIDE / 2, height - TOP + 0.09, epoch + readable(chosen.reward), color=GREY, ha="center")
        for row, path in enumerate(paths):
            y = height - TOP - row * (SIDE + GAP) - SIDE
            axes = figure.add_axes((x / width, y / height, SIDE / width, SIDE / height))
            with Image.open(path) as image:
                axes.imshow(image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.LANCZOS))
            axes.set_axis_off()
    return render(figure)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder="..."))
