"""What all plots of a run share: colours, sizes in inches, stacked axes.

matplotlib is imported only to draw, so that importing this module stays cheap. Only its objects are used: no pyplot, no
display and no global settings, so drawing is safe on any thread.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200  # 1600 pixels wide, readable at 800
WIDTH = 8.0  # inches

# From the palette of Okabe and Ito, which is safe for colour-blind readers.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
INK, GREY, MARK, LIGHT = "#1F2328", "#656D76", "#A0A8B0", "#E8EBEE"
COLORS = (BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK)  # of several curves, VERMILION left for marks
MINUS = "\N{MINUS SIGN}"
SMALL = 9.5  # points, for all text except titles


def blank_figure(height: float) -> "Figure":
    """A white figure of `height` inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")


def stack(
    figure: "Figure", heights: Sequence[float], left: float, right: float, top: float, above: float, below: float
) -> list["Axes"]:
    """Axes of these heights from top to bottom, without frames and ticks; all lengths in inches.

    `left`, `right` and `top` are the figure's margins, `above` and `below` those of each pair of axes.
    """
    total, stacked = figure.get_figheight(), []
    bottom = total - top
    for height in heights:
        bottom -= above + height
        axes = figure.add_axes((left / WIDTH, bottom / total, (WIDTH - left - right) / WIDTH, height / total))
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=9, labelcolor=GREY, labelbottom=False)
        stacked.append(axes)
        bottom -= below
    return stacked


def label_x(axes: "Axes", label: str, ticks: int) -> None:
    """Show the x axis with its label and at most `ticks` whole numbers."""
    axes.tick_params(axis="x", labelbottom=True)
    axes.locator_params(axis="x", nbins=ticks, integer=True)
    axes.set_xlabel(label, color=GREY, fontsize=SMALL)


def draw_curve(axes: "Axes", x: Sequence[float], y: Sequence[float], color: str, dots: bool = True) -> None:
    axes.plot(x, y, color=color, linewidth=1.8, marker="o" if dots else "", markersize=3.2)


def write_title(
    place: "Figure | Axes", corner: tuple[float, float], coords: str, title: str, size: float, more: str
) -> None:
    """A bold title whose lower left corner is at `corner`, followed by grey text on the same baseline."""
    from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea

    bold = TextArea(title, textprops={"color": INK, "fontsize": size, "weight": "bold", "parse_math": False})
    grey = TextArea(more, textprops={"color": GREY, "fontsize": SMALL, "parse_math": False})
    row = HPacker(children=[bold, grey], align="baseline", pad=0, sep=8)
    place.add_artist(
        AnnotationBbox(row, corner, xycoords=coords, box_alignment=(0, 0), frameon=False, pad=0, annotation_clip=False)
    )


def render(figure: "Figure") -> Image.Image:
    """The figure as an RGB image, 1600 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
