"""What the studies' figures have in common: five arms that can be told apart, named where their lines end."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.0
"""Inches of a figure, which a page shows at 900 pixels."""
MARKED = (("black", "o"), ("tab:blue", "s"), ("tab:orange", "^"), ("tab:green", "D"), ("tab:red", "v"))
REST = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
MARKERS = 8
"""Marks on a line."""
APART = 11.0
"""Points between the names of two lines."""


def panels(rows: int, columns: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of a page's width, and its axes in reading order, each of this height."""
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **shared).flatten()
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, list(axes)


def styles(arms: Iterable[str], first: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """A colour, a marker and a name for five arms, those in `first` before others; the rest are thin and grey."""
    arms = list(dict.fromkeys(arms))
    shown = [*(arm for arm in first if arm in arms), *(arm for arm in arms if arm not in first)][: len(MARKED)]
    drawn: dict[str, dict[str, Any]] = {arm: dict(REST) for arm in arms}
    for arm, (color, marker) in zip(shown, MARKED, strict=False):
        drawn[arm] = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.5, "label": arm}
    return drawn


def draw(axis: Axes, x: Any, y: Any, style: dict[str, Any], low: Any = None, high: Any = None) -> None:
    """A line with a few marks and, for an arm with a name, the band between `low` and `high`."""
    axis.plot(x, y, markevery=max(1, len(x) // MARKERS), **style)
    if low is not None and "label" in style:
        axis.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)


def log_axes(axis: Axes, which: str = "xy") -> None:
    """Logarithmic axes of plain numbers, at 1, 2 and 5 within two decades; call when all is drawn."""
    for name in which:
        axis.set(**{f"{name}scale": "log"})
        of_name = axis.xaxis if name == "x" else axis.yaxis
        low, high = of_name.get_view_interval()
        of_name.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        of_name.set_major_formatter("{x:g}")
        of_name.set_minor_formatter(NullFormatter())


def name_lines(axis: Axes) -> None:
    """Write each line's name where it ends, apart from the others' names; call when all is drawn."""
    lines = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
    paths = {line: np.asarray(line.get_xydata()) for line in lines}
    ends = {line: path[-1, 1] for line, path in paths.items() if len(path)}
    axis.figure.canvas.draw()  # for the height of each end, in points
    points = 72 / axis.figure.dpi
    heights = {line: axis.transData.transform((1, end))[1] * points for line, end in ends.items()}
    lowest = -np.inf
    for line in sorted(ends, key=heights.__getitem__):
        lowest = max(heights[line], lowest + APART)
        axis.annotate(
            str(line.get_label()),
            (1, ends[line]),
            xycoords=axis.get_yaxis_transform(),
            xytext=(4, lowest - heights[line]),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )


def legend(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """The names of an axis's arms, in a line above the figure."""
    handles, labels = axis.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    figure.legend(kept.values(), kept.keys(), loc="outside upper center", ncols=columns, frameon=False)


def fitted(figure: Figure, size: float = 8.0) -> Figure:
    """A wide figure of several columns brought to a page's width: letters of `size` points at most, titles in lines.

    Args:
        figure: with a constrained layout; it is changed.
        size: of letters, in points.
    """
    width, height = figure.get_size_inches()
    places = [axis.get_subplotspec() for axis in figure.axes]
    columns = max(place.get_gridspec().ncols for place in places if place is not None)
    figure.set_size_inches(WIDTH, min(height, 1.25 * height * WIDTH / width))
    letters = int(WIDTH / columns * 72 / (0.6 * size))
    for axis in figure.axes:
        axis.tick_params(labelsize=size)
        axis.set_title("\n".join(textwrap.fill(line, letters) for line in axis.get_title().splitlines()))
    for text in figure.findobj(Text):
        text.set_fontsize(min(size, text.get_fontsize()))
    return figure
