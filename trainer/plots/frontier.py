"""The held-out reward against the training reward: one line per strength, through the epochs."""

from typing import TYPE_CHECKING, Any

from PIL import Image

from ..metrics import readable, shortened
from ..recommend.choice import Outcome, Recommendation
from .drawing import (
    COLORS,
    GREY,
    INK,
    LIGHT,
    MARK,
    MINUS,
    SMALL,
    VERMILION,
    WIDTH,
    blank_figure,
    render,
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 5.0, 0.85, 0.95, 0.75, 0.65  # inches


def frontier_figure(found: Recommendation) -> Image.Image:
    """The frontier as an RGB image, 1600 pixels wide."""
    figure = blank_figure(HEIGHT)
    axes = figure.add_axes(
        (LEFT / WIDTH, BOTTOM / HEIGHT, (WIDTH - LEFT - RIGHT) / WIDTH, (HEIGHT - TOP - BOTTOM) / HEIGHT)
    )
    facts = f"means of {found.images} images or more; numbers are epochs"
    write_title(figure, (LEFT / WIDTH, 1 - 0.4 / HEIGHT), "figure fraction", "Snapshots and strengths", 13, facts)
    _style(axes, found)
    for color, strength in zip(_colors(found), _strengths(found), strict=True):
        _draw_line(axes, color, strength, [o for o in found.outcomes if o.cell.strength == strength])
    _mark(axes, found.base, "base", INK, "s")
    if found.chosen is not None:
        label = f"recommended: {found.chosen.cell.label}, strength {found.chosen.cell.strength:g}"
        _mark(axes, found.chosen, label, VERMILION, "o")
    axes.legend(frameon=False, fontsize=SMALL, labelcolor="linecolor", loc="best")
    return render(figure)


def _strengths(found: Recommendation) -> list[float]:
    return sorted({outcome.cell.strength for outcome in found.outcomes})


def _colors(found: Recommendation) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(_strengths(found)))]


def _style(axes: "Axes", found: Recommendation) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=9, labelcolor=GREY)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.08)
    axes.set_xlabel(f"{shortened(found.training, 60)} (trained on)", color=GREY, fontsize=SMALL, parse_math=False)
    axes.set_ylabel(f"{shortened(found.held_out, 40)} (held out)", color=GREY, fontsize=SMALL, parse_math=False)
    least = found.base.held_out - found.allowed
    axes.axhline(least, color=MARK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    text = f"least\n{readable(least)}".replace("-", MINUS)
    axes.annotate(text, (1, least), xycoords=axes.get_yaxis_transform(), xytext=(5, 0), textcoords="offset points",
                  color=GREY, fontsize=SMALL, va="center")  # fmt: skip


def _draw_line(axes: "Axes", color: str, strength: float, outcomes: list[Outcome]) -> None:
    x, y = [outcome.training for outcome in outcomes], [outcome.held_out for outcome in outcomes]
    axes.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=4, label=f"strength {strength:g}")
    for outcome in outcomes:
        text = outcome.cell.label.removeprefix("epoch ")
        axes.annotate(text, (outcome.training, outcome.held_out), xytext=(0, 6), textcoords="offset points",
                      color=color, fontsize=8, ha="center")  # fmt: skip


def _mark(axes: "Axes", outcome: Outcome, label: str, color: str, marker: str) -> None:
    look: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.8, "color": color}
    axes.plot(outcome.training, outcome.held_out, marker, markersize=11, zorder=4, label=label, **look)
