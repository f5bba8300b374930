"""The charts of a run: its rewards, its critic, and its share of dormant neurons."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from comfy_tdpo.atomic_files import write_atomically
from comfy_tdpo.counts import number_of

from ..alarm import alarm_of
from ..config import TrainConfig
from ..metrics import keys_of, points_of, readable, reward_names, role, shortened
from ..run import EpochMetrics, RunFolder
from .drawing import (
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    MARK,
    MINUS,
    PURPLE,
    SMALL,
    VERMILION,
    WIDTH,
    blank_figure,
    draw_curve,
    label_x,
    render,
    stack,
    write_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT = 0.62, 0.85  # inches
HEADER, TITLE, GAP, FOOTER = 0.5, 0.34, 0.16, 0.46  # inches: above all panels, above one, below one, below all


@dataclass(frozen=True)
class Line:
    """A curve: the metric it shows, its colour, the metric of its ± band, and its label if a panel has several."""

    key: str
    color: str
    band: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: height in inches, y limits and their unit, and whether to show the change since epoch 1."""

    title: str
    subtitle: str
    lines: tuple[Line, ...]
    height: float = 1.05
    limits: tuple[float, float] | None = None
    unit: str = ""
    with_change: bool = True


# --- what to show ---------------------------------------------------------------------------------------------------


def save_plots(run: RunFolder) -> list[Path]:
    """Draw every chart the run has metrics for into its plots folder; returns the files written."""
    metrics, config = run.metrics(), run.config
    panels = {
        "reward": reward_panels(metrics, config),
        "neurons": neuron_panels(metrics),
        "critic": critic_panels(metrics),
    }
    paths = []
    for name in [name for name in panels if panels[name]]:
        write_atomically(run.plot(name), _draw(panels[name], metrics, config).save)
        paths.append(run.plot(name))
    return paths


def reward_figure(metrics: list[EpochMetrics], config: TrainConfig) -> Image.Image:
    """The rewards so far as an RGB image, 1600 pixels wide; says so if no epoch has finished."""
    return _draw(reward_panels(metrics, config), metrics, config)


def reward_panels(metrics: list[EpochMetrics], config: TrainConfig) -> list[Panel]:
    """The training reward, those that it sums, the guards and held-out rewards, the diversity: one panel each, as their
    units differ."""
    training = [_training_panel(name) for name in reward_names(metrics, "reward")]
    parts = reward_names(metrics, "part")
    summed = [_tracked_panel(f"reward/{name}/mean", name, role(name, config), PURPLE) for name in parts]
    tracked = [
        _tracked_panel(f"{kind}/{name}/mean", name, role(name, config), VERMILION)
        for kind in ("guard", "eval")
        for name in reward_names(metrics, kind)
        if name not in parts
    ]
    return training + summed + tracked + _diversity_panels(metrics)


def _training_panel(name: str) -> Panel:
    line = Line(f"reward/{name}/mean", BLUE, band=f"reward/{name}/std")
    return Panel(name, "trained on: mean ± 1 std, and change since epoch 1", (line,), height=2.1)


def _tracked_panel(key: str, name: str, role: str, color: str) -> Panel:
    return Panel(name, f"{role}: mean, and change since epoch 1", (Line(key, color),))


def _diversity_panels(metrics: list[EpochMetrics]) -> list[Panel]:
    """How different the images of a prompt are, in the epochs that have two images of some prompt."""
    subtitle = "mean cosine distance of two images of one prompt, and change since epoch 1"
    line = Line("diversity", GREEN)
    return [Panel("Diversity", subtitle, (line,))] if line.key in keys_of(metrics) else []


def neuron_panels(metrics: list[EpochMetrics]) -> list[Panel]:
    """Dormant neurons and their overlap with the epoch before, for the critic and for the policy."""
    panels = []
    for group, title in (("neurons", "Critic neurons"), ("policy_neurons", "Policy neurons")):
        dormant = Line(f"{group}/dormant_percent", BLUE, label="dormant")
        overlap = Line(f"{group}/overlap_percent", VERMILION, label="overlap")
        lines = tuple(line for line in (dormant, overlap) if line.key in keys_of(metrics))
        if lines:
            subtitle = "share dormant, and overlap of the dormant sets of consecutive epochs"
            panels.append(Panel(title, subtitle, lines, 1.9, limits=(-3, 103), unit=" %", with_change=False))
    return panels


def critic_panels(metrics: list[EpochMetrics]) -> list[Panel]:
    """How well the critic explains the returns; an untrained one may be far below 0, so the axis ends at -1."""
    line = Line("critic/explained_variance", GREEN)
    values = points_of(metrics, line.key)[1]
    if not values:
        return []
    low = min(-0.05, max(-1.0, min(values) - 0.05))
    cut = f"; below {MINUS}1 cut off" if min(values) < -1 else ""
    subtitle = f"explained variance of the returns: 1 is perfect, 0 a constant{cut}"
    return [Panel("Critic", subtitle, (line,), 2.1, limits=(low, 1.03), with_change=False)]


def _resets(metrics: list[EpochMetrics]) -> list[float]:
    """Reward queries at which neurons of the critic or of the policy were reset."""
    kinds = ("neurons/reset_count", "policy_neurons/reset_count")
    return [epoch["reward_queries"] for epoch in metrics if any(epoch.get(kind, 0) for kind in kinds)]


# --- drawing --------------------------------------------------------------------------------------------------------


def _draw(panels: list[Panel], metrics: list[EpochMetrics], config: TrainConfig) -> Image.Image:
    figure = blank_figure(HEADER + sum(TITLE + panel.height + GAP for panel in panels) + FOOTER)
    legend = ["shaded: overoptimisation"] if alarm_of(metrics) else []
    _draw_header(figure, config, "   ".join(legend + (["┊ neuron reset"] if _resets(metrics) else [])))
    if not panels:
        figure.text(0.5, 0.3, "no epoch has finished yet", color=GREY, fontsize=10, ha="center")
        return render(figure)
    stacked = stack(figure, [panel.height for panel in panels], LEFT, RIGHT, HEADER, above=TITLE, below=GAP)
    for axes, panel in zip(stacked, panels, strict=True):
        _draw_panel(axes, panel, metrics)
    _draw_x_axis(stacked[-1])
    return render(figure)


def _draw_header(figure: "Figure", config: TrainConfig, legend: str) -> None:
    y = 1 - 0.33 / figure.get_figheight()
    images = number_of(config.samples_per_epoch, "image")
    facts = f"{Path(config.model).name} · {images} an epoch · seed {config.seed}"
    write_title(figure, (LEFT / WIDTH, y), "figure fraction", config.algorithm.upper(), 13, facts)
    figure.text(1 - RIGHT / WIDTH, y, legend, color=GREY, fontsize=SMALL, ha="right", va="bottom")


def _draw_panel(axes: "Axes", panel: Panel, metrics: list[EpochMetrics]) -> None:
    _style(axes, panel)
    corner = (0, 1 + 0.07 / panel.height)
    write_title(axes, corner, "axes fraction", shortened(panel.title, 44), 10.5, panel.subtitle)
    for x in _resets(metrics):
        axes.axvline(x, color=MARK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    _shade_overoptimisation(axes, metrics)
    for line in panel.lines:
        _draw_line(axes, line, metrics)
    axes.set_xlim(0, metrics[-1]["reward_queries"] * 1.01)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    _label_ends(axes, panel, metrics)


def _shade_overoptimisation(axes: "Axes", metrics: list[EpochMetrics]) -> None:
    """Shade the epochs since the run overoptimises."""
    if alarm := alarm_of(metrics):
        begin = next(line["reward_queries"] for line in metrics if line["epoch"] == alarm.since)
        axes.axvspan(begin, metrics[-1]["reward_queries"], color=VERMILION, alpha=0.08, linewidth=0, zorder=0)


def _style(axes: "Axes", panel: Panel) -> None:
    """Show only horizontal grid lines and grey numbers."""
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5 if panel.height > 1.5 else 3)
    if panel.unit:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}{panel.unit}")
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _draw_line(axes: "Axes", line: Line, metrics: list[EpochMetrics]) -> None:
    x, y = points_of(metrics, line.key)
    queries, values = [e["reward_queries"] for e in metrics], [e.get(line.key, math.nan) for e in metrics]
    draw_curve(axes, queries, values, line.color, dots=len(x) <= 30)
    if line.band:
        spread = points_of(metrics, line.band)[1]
        low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0)
        if len(x) == 1:
            axes.vlines(x, low, high, color=line.color, alpha=0.3, linewidth=5)


def _label_ends(axes: "Axes", panel: Panel, metrics: list[EpochMetrics]) -> None:
    """Label the end of each line with its name or last value, in its colour; move apart labels that would overlap."""
    low, high = axes.get_ylim()
    series = [points_of(metrics, line.key)[1] for line in panel.lines]
    ends = _apart([min(max(values[-1], low), high) for values in series], gap=(high - low) * 0.38 / panel.height)
    for y, values, line in zip(ends, series, panel.lines, strict=True):
        first_row, second_row = _end_rows(panel, line, values)
        _annotate_end(axes, y, first_row, line.color, 7 if second_row else 0, "bold")
        _annotate_end(axes, y, second_row, line.color, -7, "normal")


def _end_rows(panel: Panel, line: Line, values: list[float]) -> tuple[str, str]:
    if line.label:
        return line.label, f"{values[-1]:.0f}{panel.unit}"
    if not panel.with_change or len(values) == 1:
        return readable(values[-1]), ""
    return readable(values[-1]), readable(values[-1] - values[0], like=values[-1], sign="+")


def _annotate_end(axes: "Axes", y: float, text: str, color: str, up: float, weight: str) -> None:
    axes.annotate(
        text.replace("-", MINUS),
        (1, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, up),
        textcoords="offset points",
        color=color,
        fontsize=SMALL,
        weight=weight,
        va="center",
    )


def _apart(heights: list[float], gap: float) -> list[float]:
    """One or two heights, moved at least `gap` apart."""
    if len(heights) < 2 or abs(heights[0] - heights[1]) >= gap:
        return heights
    middle, sign = sum(heights) / 2, 1 if heights[0] >= heights[1] else -1
    return [middle + sign * gap / 2, middle - sign * gap / 2]


def _draw_x_axis(axes: "Axes") -> None:
    label_x(axes, "reward queries (images scored)", ticks=8)
    axes.tick_params(axis="x", pad=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
