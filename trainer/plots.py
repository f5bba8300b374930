"""Pictures of a run: its charts, and grids of its images.

matplotlib is imported where it draws, so that importing this module stays cheap, and only its objects are used: no
pyplot, no display, no global settings, safe on any thread.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from .config import TrainConfig
from .files import write_atomically
from .run import EpochMetrics, RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200  # 1600 pixels wide, drawn to be read at 800
WIDTH, LEFT, RIGHT = 8.0, 0.62, 0.85  # inches
HEADER, TITLE, GAP, FOOTER = 0.5, 0.34, 0.16, 0.46  # inches: above all panels, above one, below one, below all

# Of the palette of Okabe and Ito, which the colour-blind can tell apart.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, MARK, LIGHT = "#1F2328", "#656D76", "#A0A8B0", "#E8EBEE"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """A curve: the metric it shows, its colour, the metric of its +- band, and its name where a panel has several."""

    key: str
    color: str
    band: str | None = None
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes: height in inches, y limits and their unit, and whether to tell the change since epoch 1."""

    title: str
    subtitle: str
    lines: tuple[Line, ...]
    height: float = 1.05
    limits: tuple[float, float] | None = None
    unit: str = ""
    with_change: bool = True


# --- image grids ----------------------------------------------------------------------------------------------------


def save_image_grid(images: Tensor, path: Path) -> None:
    """Save images, float (B, 3, H, W) in [0, 1], as one near-square PNG with thin white gaps."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    count, height, width = pixels.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows, gap = math.ceil(count / columns), max(2, width // 64)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(image), (column * (width + gap), row * (height + gap)))
    write_atomically(path, grid.save)


# --- what there is to show ------------------------------------------------------------------------------------------


def save_plots(run: RunFolder) -> list[Path]:
    """Draw what the run has metrics for into its plots folder, and say which files were written."""
    metrics, config = run.metrics(), run.config
    panels = {
        "reward": reward_panels(metrics, config),
        "neurons": neuron_panels(metrics),
        "critic": critic_panels(metrics),
    }
    paths = []
    for name in [name for name in panels if panels[name]]:
        write_atomically(run.plot(name), _render(panels[name], metrics, config).save)
        paths.append(run.plot(name))
    return paths


def reward_figure(metrics: list[EpochMetrics], config: TrainConfig) -> Image.Image:
    """The rewards so far as an RGB image, 1600 pixels wide; without an epoch it says so."""
    return _render(reward_panels(metrics, config), metrics, config)


def reward_panels(metrics: list[EpochMetrics], config: TrainConfig) -> list[Panel]:
    """The training reward, then each one that watches: one panel each, as their units differ."""
    training = [_training_panel(name) for name in reward_names(metrics, "reward")]
    return training + [_watching_panel(name, role(name, config)) for name in reward_names(metrics, "eval")]


def role(name: str, config: TrainConfig) -> str:
    """What a reward that watches is to the training: a part of the sum that it trains on, or held out."""
    return "part of the sum" if name in config.trained_on else "held out"


def reward_names(metrics: list[EpochMetrics], kind: str) -> list[str]:
    """The rewards in the metrics; kind is "reward", what is trained on, or "eval", what only watches."""
    keys = [key for key in _keys(metrics) if key.startswith(f"{kind}/") and key.endswith("/mean")]
    return [key.removeprefix(f"{kind}/").removesuffix("/mean") for key in keys]


def _training_panel(name: str) -> Panel:
    line = Line(f"reward/{name}/mean", BLUE, band=f"reward/{name}/std")
    return Panel(name, "trained on: mean ± 1 std, and change since epoch 1", (line,), height=2.1)


def _watching_panel(name: str, role: str) -> Panel:
    return Panel(name, f"{role}: mean, and change since epoch 1", (Line(f"eval/{name}/mean", VERMILION),))


def neuron_panels(metrics: list[EpochMetrics]) -> list[Panel]:
    """Dormant neurons and their overlap with the epoch before: of the critic, and of the LoRA."""
    panels = []
    for group, title in (("neurons", "Critic neurons"), ("policy_neurons", "LoRA neurons")):
        dormant = Line(f"{group}/dormant_percent", BLUE, label="dormant")
        overlap = Line(f"{group}/overlap_percent", VERMILION, label="overlap")
        lines = tuple(line for line in (dormant, overlap) if line.key in _keys(metrics))
        if lines:
            subtitle = "share dormant, and overlap of the dormant sets of neighbouring epochs"
            panels.append(Panel(title, subtitle, lines, 1.9, limits=(-3, 103), unit=" %", with_change=False))
    return panels


def critic_panels(metrics: list[EpochMetrics]) -> list[Panel]:
    """How well the critic explains the returns; an untrained one can be far below 0, which is cut off at -1."""
    line = Line("critic/explained_variance", GREEN)
    values = _series(metrics, line.key)[1]
    if not values:
        return []
    low = min(-0.05, max(-1.0, min(values) - 0.05))
    cut = f"; below {MINUS}1 cut off" if min(values) < -1 else ""
    subtitle = f"explained variance of the returns: 1 is perfect, 0 a constant{cut}"
    return [Panel("Critic", subtitle, (line,), 2.1, limits=(low, 1.03), with_change=False)]


def _keys(metrics: list[EpochMetrics]) -> list[str]:
    return list(dict.fromkeys(key for epoch in metrics for key in epoch))


def _series(metrics: list[EpochMetrics], key: str) -> tuple[list[float], list[float]]:
    """Reward queries and values of the epochs that have `key`."""
    having = [epoch for epoch in metrics if key in epoch]
    return [epoch["reward_queries"] for epoch in having], [epoch[key] for epoch in having]


def _resets(metrics: list[EpochMetrics]) -> list[float]:
    """Reward queries at which neurons of the critic or of the LoRA were reset."""
    kinds = ("neurons/reset_count", "policy_neurons/reset_count")
    return [epoch["reward_queries"] for epoch in metrics if any(epoch.get(kind, 0) for kind in kinds)]


# --- drawing --------------------------------------------------------------------------------------------------------


def _render(panels: list[Panel], metrics: list[EpochMetrics], config: TrainConfig) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(_figure(panels, metrics, config))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _figure(panels: list[Panel], metrics: list[EpochMetrics], config: TrainConfig) -> "Figure":
    from matplotlib.figure import Figure

    height = HEADER + sum(TITLE + panel.height + GAP for panel in panels) + FOOTER
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    _draw_header(figure, config, resets=bool(_resets(metrics)))
    if not panels:
        figure.text(0.5, 0.3, "no epoch has finished yet", color=GREY, fontsize=10, ha="center")
        return figure
    stacked = list(_stack(figure, panels))
    for axes, panel in zip(stacked, panels, strict=True):
        _draw_panel(axes, panel, metrics)
    _draw_x_axis(stacked[-1], metrics)
    return figure


def _stack(figure: "Figure", panels: list[Panel]) -> Iterator["Axes"]:
    """Axes from top to bottom, of the panels' heights."""
    total, left, width = figure.get_figheight(), LEFT / WIDTH, (WIDTH - LEFT - RIGHT) / WIDTH
    bottom = total - HEADER
    for panel in panels:
        bottom -= TITLE + panel.height
        yield figure.add_axes((left, bottom / total, width, panel.height / total))
        bottom -= GAP


def _draw_header(figure: "Figure", config: TrainConfig, resets: bool) -> None:
    y = 1 - 0.33 / figure.get_figheight()
    facts = f"{Path(config.model).name} · {config.samples_per_epoch} images an epoch · seed {config.seed}"
    _write(figure, (LEFT / WIDTH, y), "figure fraction", config.algorithm.upper(), 13, facts)
    if resets:
        figure.text(1 - RIGHT / WIDTH, y, "┊ neuron reset", color=GREY, fontsize=9.5, ha="right", va="bottom")


def _draw_panel(axes: "Axes", panel: Panel, metrics: list[EpochMetrics]) -> None:
    _style(axes, panel)
    corner = (0, 1 + 0.07 / panel.height)
    _write(axes, corner, "axes fraction", shortened(panel.title, 44), 10.5, panel.subtitle)
    for x in _resets(metrics):
        axes.axvline(x, color=MARK, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    for line in panel.lines:
        _draw_line(axes, line, metrics)
    axes.set_xlim(0, metrics[-1]["reward_queries"] * 1.01)
    if panel.limits:
        axes.set_ylim(*panel.limits)
    _label_ends(axes, panel, metrics)


def _style(axes: "Axes", panel: Panel) -> None:
    """Nothing but horizontal lines and grey numbers."""
    axes.spines[:].set_visible(False)
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=GREY, labelbottom=False)
    axes.locator_params(axis="y", nbins=5 if panel.height > 1.5 else 3)
    if panel.unit:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}{panel.unit}")
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _draw_line(axes: "Axes", line: Line, metrics: list[EpochMetrics]) -> None:
    x, y = _series(metrics, line.key)
    queries, values = [e["reward_queries"] for e in metrics], [e.get(line.key, math.nan) for e in metrics]
    axes.plot(queries, values, color=line.color, linewidth=1.8, marker="o" if len(x) <= 30 else "", markersize=3.2)
    if line.band:
        spread = _series(metrics, line.band)[1]
        low, high = ([a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=line.color, alpha=0.15, linewidth=0)
        if len(x) == 1:
            axes.vlines(x, low, high, color=line.color, alpha=0.3, linewidth=5)


def _label_ends(axes: "Axes", panel: Panel, metrics: list[EpochMetrics]) -> None:
    """What each line is or came to, to the right of its end and in its colour, moved apart where two would touch."""
    low, high = axes.get_ylim()
    series = [_series(metrics, line.key)[1] for line in panel.lines]
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


def readable(value: float, like: float | None = None, sign: str = "") -> str:
    """A reward for people: two decimals, or three where it, or what it is set beside, is below 1."""
    decimals = 3 if abs(value if like is None else like) < 1 else 2
    return f"{value:{sign}z.{decimals}f}"


def shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 3]}..."


def _annotate_end(axes: "Axes", y: float, text: str, color: str, up: float, weight: str) -> None:
    axes.annotate(
        text.replace("-", MINUS),
        (1, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(5, up),
        textcoords="offset points",
        color=color,
        fontsize=9.5,
        weight=weight,
        va="center",
    )


def _apart(heights: list[float], gap: float) -> list[float]:
    """One or two heights, at least `gap` from each other."""
    if len(heights) < 2 or abs(heights[0] - heights[1]) >= gap:
        return heights
    middle, sign = sum(heights) / 2, 1 if heights[0] >= heights[1] else -1
    return [middle + sign * gap / 2, middle - sign * gap / 2]


def _draw_x_axis(axes: "Axes", metrics: list[EpochMetrics]) -> None:
    axes.tick_params(axis="x", labelbottom=True, pad=8)
    axes.locator_params(axis="x", nbins=8, integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("reward queries (images scored)", color=GREY, fontsize=9.5)


def _write(
    place: "Figure | Axes", corner: tuple[float, float], coords: str, title: str, size: float, more: str
) -> None:
    """A bold title whose lower left corner is at `corner`, and grey words after it on the same baseline."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    bold = TextArea(title, textprops={"color": INK, "fontsize": size, "weight": "bold", "parse_math": False})
    grey = TextArea(more, textprops={"color": GREY, "fontsize": 9.5, "parse_math": False})
    row = HPacker(children=[bold, grey], align="baseline", pad=0, sep=8)
    place.add_artist(
        AnnotationBbox(row, corner, xycoords=coords, box_alignment=(0, 0), frameon=False, pad=0, annotation_clip=False)
    )
