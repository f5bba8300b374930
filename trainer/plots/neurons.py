"""The critic's neurons over the epochs, as a picture and as text.

Shapes: E epochs, H neurons of a layer.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..config.schema import algorithms_using
from ..run import EpochMetrics, RunFolder
from ..run.neuron_log import NeuronRecord, read_neurons
from .drawing import BLUE, GREY, INK, SMALL, VERMILION, WIDTH, blank_figure, draw_curve, label_x, render, stack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BRIGHTEST = 3.0  # times the layer's mean; the colour scale ends here
RESET = (0.835, 0.369, 0.0, 1.0)  # VERMILION as RGBA
CHART, SHORTEST, TALLEST = 1.3, 0.45, 2.6  # heights in inches: the line chart, the smallest and largest layer
TOP, GAP, LEFT, RIGHT, BOTTOM = 0.75, 0.2, 0.95, 0.95, 0.5  # inches


def neuron_figure(run: RunFolder) -> Image.Image:
    """Activation of each neuron, layer by layer, with resets marked, above the dormant share and its overlap.

    Raises:
        ValueError: nothing was recorded, because no epoch has finished or there is no critic.
    """
    metrics, records = _recorded(run)
    return render(_figure(run, metrics, records))


def described(run: RunFolder) -> str:
    """The same as text: one line about the run, then one per epoch."""
    metrics, records = _recorded(run)
    config, count = run.config.neurons, sum(map(len, records[-1].scores.values()))  # type: ignore[attr-defined]
    often = "every epoch" if config.every == 1 else f"every {config.every} epochs"
    resets = "no resets" if config.reset == "none" else f"{config.reset} neurons are reset {often}"
    return "\n".join([f"{run.path.name}: {count} neurons in the critic; {resets}", *map(_told, metrics)])


def _told(line: EpochMetrics) -> str:
    text = f"epoch {line['epoch']}: {line['neurons/dormant_percent']:.1f} % dormant"
    if "neurons/overlap_percent" in line:
        text += f", {line['neurons/overlap_percent']:.1f} % overlap with the epoch before"
    count = int(line["neurons/reset_count"])
    return f"{text}, {count} reset" if count else text


def _recorded(run: RunFolder) -> tuple[list[EpochMetrics], list[NeuronRecord]]:
    metrics = [line for line in run.metrics() if "neurons/dormant_percent" in line]
    records = read_neurons(run.path, len(metrics))
    if not records:
        reason = "its algorithm has no critic" if run.metrics() else "no epoch has finished"
        raise ValueError(
            f"run {run.path.name!r} has no record of neurons: {reason}; expected a run of one of "
            f"{', '.join(algorithms_using('critic'))}"
        )
    return metrics, records


def _figure(run: RunFolder, metrics: list[EpochMetrics], records: list[NeuronRecord]) -> "Figure":
    layers = {name: len(scores) for name, scores in records[-1].scores.items()}
    heights = [min(max(SHORTEST, count / 400), TALLEST) for count in layers.values()] + [CHART]
    total = TOP + sum(height + GAP for height in heights) + BOTTOM
    figure = blank_figure(total)
    _head(figure, run, records, total)
    stacked = stack(figure, heights, LEFT, RIGHT, TOP, above=0, below=GAP)
    for axes, name in zip(stacked, layers, strict=False):
        _draw_layer(axes, name, records)
    _draw_shares(stacked[-1], metrics)
    for axes in stacked:
        axes.set_xlim(records[0].epoch - 0.5, records[-1].epoch + 0.5)
    label_x(stacked[-1], "epoch", ticks=10)
    return figure


def _head(figure: "Figure", run: RunFolder, records: list[NeuronRecord], total: float) -> None:
    left, first, second = LEFT / WIDTH, 1 - 0.32 / total, 1 - 0.56 / total
    title = f"Neurons of the critic: {run.path.name}"
    figure.text(left, first, title, color=INK, fontsize=13, weight="bold", va="bottom", parse_math=False)
    scale = f"white: dormant, dark: {BRIGHTEST:g} times the layer's mean activation or more"
    figure.text(left, second, scale, color=GREY, fontsize=SMALL, va="bottom")
    if any(record.reset_count for record in records):
        figure.text(1 - RIGHT / WIDTH, second, "▌ reset", color=VERMILION, fontsize=SMALL, ha="right", va="bottom")


def _draw_layer(axes: "Axes", name: str, records: list[NeuronRecord]) -> None:
    """One column per epoch, one row per neuron; reset neurons are marked at the right edge of the column."""
    first, last, rows = records[0].epoch, records[-1].epoch, len(records[-1].scores[name])
    picture = np.full((rows, last - first + 1), np.nan)  # (H, E)
    for record in records:
        picture[:, record.epoch - first] = record.scores[name]
    _show(axes, picture, (first - 0.5, last + 0.5), cmap="Blues", vmin=0, vmax=BRIGHTEST)
    for record in records:
        marks = np.zeros((rows, 1, 4))
        marks[record.reset.get(name, [])] = RESET
        if marks.any():
            _show(axes, marks, (record.epoch + 0.25, record.epoch + 0.5))
    axes.set_ylim(rows, 0)
    axes.set_yticks([])
    label = f"layer {int(name.split('.')[-1]) + 1}\n{rows}"
    axes.set_ylabel(label, color=GREY, fontsize=SMALL, rotation=0, ha="right", va="center")


def _show(axes: "Axes", picture: np.ndarray, sides: tuple[float, float], **colors: Any) -> None:
    axes.imshow(picture, extent=(*sides, len(picture), 0), aspect="auto", interpolation="nearest", **colors)


def _draw_shares(axes: "Axes", metrics: list[EpochMetrics]) -> None:
    for key, color, label in (
        ("neurons/dormant_percent", BLUE, "dormant"),
        ("neurons/overlap_percent", VERMILION, "overlap"),
    ):
        points = [(line["epoch"], line[key]) for line in metrics if key in line]
        if points:
            x, y = zip(*points, strict=True)
            draw_curve(axes, x, y, color)
            axes.annotate(label, (x[-1], y[-1]), xytext=(6, 0), textcoords="offset points", color=color, fontsize=SMALL)
    axes.set_ylim(-5, 105)
    axes.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
