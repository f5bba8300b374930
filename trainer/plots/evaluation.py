"""The rewards of an evaluation: each over the training reward, or over the reward queries, one curve per set-up."""

from collections.abc import Collection
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..evaluation.numbers import Evaluation, Point, Setup
from ..metrics import shortened
from .drawing import (
    COLORS,
    GREY,
    INK,
    LIGHT,
    MARK,
    SMALL,
    WIDTH,
    blank_figure,
    draw_curve,
    render,
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

LEFT, RIGHT, BETWEEN = 0.55, 0.2, 0.6  # inches, across: margins, and between panels
TOP, LEGEND, SET, TITLE, HEIGHT, FOOT, BOTTOM = 0.55, 0.24, 0.42, 0.3, 1.9, 0.32, 0.15  # inches, from top to bottom
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # of set-ups that have the colour of an earlier one
BASE_MARK: dict[str, Any] = {"color": INK, "marker": "s", "markersize": 6, "markerfacecolor": "none"}
PER_ROW = 3  # entries in a row of the legend


def cross_reward_figure(evaluation: Evaluation, training: str) -> Image.Image:
    """Each other reward against the training reward, from the base model on, epoch by epoch."""
    others = [reward for reward in evaluation.asked.rewards if reward != training]
    title = f"Other rewards against {shortened(training, 40)}"
    return _draw(evaluation, training, title, others, shortened(training, 30), "each dot a snapshot", training)


def efficiency_figure(evaluation: Evaluation, training: str) -> Image.Image:
    """Every reward against the reward queries of the training."""
    rewards = [training, *(reward for reward in evaluation.asked.rewards if reward != training)]
    return _draw(
        evaluation,
        training,
        "Rewards against reward queries",
        rewards,
        "reward queries",
        shortened(f"trained on {training}", 44),
        None,
    )


def _draw(
    evaluation: Evaluation, training: str, title: str, rewards: list[str], x: str, more: str, against: str | None
) -> Image.Image:
    setups = [setup for setup in evaluation.setups if setup.training == training]
    columns = 2 if len(rewards) in (1, 2, 4) else 3
    side = (WIDTH - LEFT - RIGHT - (columns - 1) * BETWEEN) / columns
    sets, rows, legend = evaluation.asked.sets, -(-len(rewards) // columns), _rows_of_legend(setups)
    total = TOP + LEGEND * legend + len(sets) * (SET + rows * (TITLE + HEIGHT + FOOT)) + BOTTOM
    figure = blank_figure(total)
    write_title(figure, (LEFT / WIDTH, 1 - 0.36 / total), "figure fraction", title, 13, more)
    _draw_legend(figure, setups, total)
    bottom = total - TOP - LEGEND * legend
    for prompts in sets:
        bottom -= SET
        drawn = evaluation.asked.told(prompts)
        write_title(figure, (LEFT / WIDTH, (bottom + 0.1) / total), "figure fraction", prompts.name, 11.5, drawn)
        for index, reward in enumerate(rewards):
            column = index % columns
            if column == 0:
                bottom -= TITLE + HEIGHT + FOOT
            left = LEFT + column * (side + BETWEEN)
            axes = figure.add_axes((left / WIDTH, (bottom + FOOT) / total, side / WIDTH, HEIGHT / total))
            _style(axes, reward, x)
            curves = [evaluation.curve(setup, prompts, reward, against) for setup in setups]
            several = {number for number, setup in enumerate(setups) if len(setup.subjects) > 1}
            draw_setups(axes, dict(enumerate(curves)), several)
    return render(figure)


def _draw_legend(figure: "Figure", setups: list[Setup], total: float) -> None:
    """The base model's mark, each set-up's line and, if there are any, what intervals are; row by row."""
    from matplotlib.lines import Line2D

    looks: list[tuple[str, dict[str, Any]]] = [("base model", BASE_MARK | {"linestyle": ""})]
    for number, setup in enumerate(setups):
        count = f" ({len(setup.subjects)} runs)" if len(setup.subjects) > 1 else ""
        looks.append((shortened(setup.label, 27) + count, _look_of(number)))
    if _has_intervals(setups):
        looks.append(("95 % interval over runs", {"color": MARK, "linewidth": 8, "alpha": 0.4}))
    for index, (label, look) in enumerate(looks):
        row, column = divmod(index, PER_ROW)
        x = (LEFT + column * (WIDTH - LEFT - RIGHT) / PER_ROW) / WIDTH
        y = 1 - (TOP + 0.1 + row * LEGEND) / total
        ends = [x + 0.1 / WIDTH] if "marker" in look else [x, x + 0.25 / WIDTH]
        figure.add_artist(Line2D(ends, [y] * len(ends), **({"linewidth": 1.8} | look)))
        place: dict[str, Any] = {"va": "center", "fontsize": SMALL, "color": INK, "parse_math": False}
        figure.text(x + 0.33 / WIDTH, y, label, **place)


def _rows_of_legend(setups: list[Setup]) -> int:
    return -(-(1 + len(setups) + _has_intervals(setups)) // PER_ROW)


def _has_intervals(setups: list[Setup]) -> bool:
    return any(len(setup.subjects) > 1 for setup in setups)


def _look_of(number: int) -> dict[str, Any]:
    """The colour and the style of the line of the set-up of this number."""
    return {"color": COLORS[number % len(COLORS)], "linestyle": STYLES[number // len(COLORS) % len(STYLES)]}


def _style(axes: "Axes", reward: str, x: str) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=GREY)
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(0.06)
    axes.locator_params(axis="x", nbins=5)
    axes.locator_params(axis="y", nbins=5)
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.set_title(shortened(reward, 26), loc="left", fontsize=10, color=INK, weight="bold", parse_math=False, pad=5)
    axes.set_xlabel(x, color=GREY, fontsize=8.5, parse_math=False, labelpad=2)


def draw_setups(axes: "Axes", curves: dict[int, list[Point]], several: Collection[int]) -> dict[int, "Line2D"]:
    """A curve for each set-up, by its number, from the mark of the base model; with intervals if it has several runs.

    Intervals are bands, or bars if a curve of the panel goes back, as bands would cross themselves. Returns the lines.
    """
    lines = {}
    back = any(after.x < before.x for points in curves.values() for before, after in pairwise(points))
    for number, points in curves.items():
        look, x, y = _look_of(number), [point.x for point in points], [point.y for point in points]
        draw_curve(axes, x, y, look["color"])
        lines[number] = axes.lines[-1]
        lines[number].set_linestyle(look["linestyle"])
        if number in several:
            low, high = [point.low for point in points], [point.high for point in points]
            if back:
                axes.vlines(x, low, high, color=look["color"], alpha=0.3, linewidth=1.2)
            else:
                axes.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.plot(x[:1], y[:1], **BASE_MARK, zorder=4)
    _limit(axes, list(curves.values()))
    return lines


def _limit(axes: "Axes", curves: list[list[Point]]) -> None:
    """Cut off intervals that are much wider than the curves are high, as those of two runs may be."""
    heights = [point.y for points in curves for point in points]
    low, high = min(heights), max(heights)
    room = (high - low) / 2 or 0.5
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - room), min(top, high + room))
