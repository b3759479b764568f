"""What the studies' figures have in common: five arms that can be told apart, named where their lines end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

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


def percent_axis(axis: Axes) -> None:
    """A logarithmic axis of plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")


def name_lines(axis: Axes) -> None:
    """Write each line's name where it ends, apart from the others' names; call when all is drawn."""
    lines = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_") and len(line.get_xdata())]
    ends = [(line, *_end(line)) for line in lines]
    axis.margins(x=0.02)
    axis.figure.canvas.draw()  # the place of each end, in points
    points = 72 / axis.figure.dpi
    places = [axis.transData.transform((x, y)) * points for _, x, y in ends]
    right = axis.transAxes.transform((1, 0))[0] * points
    lowest = -np.inf
    for (line, x, y), place in sorted(zip(ends, places, strict=True), key=lambda pair: pair[1][1]):
        height = max(place[1], lowest + APART)
        axis.annotate(
            str(line.get_label()),
            (x, y),
            xytext=(right - place[0] + 4, height - place[1]),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )
        lowest = height


def legend(figure: Figure, axis: Axes, columns: int = 5) -> None:
    """The names of an axis's arms, in a line above the figure."""
    handles, labels = axis.get_legend_handles_labels()
    kept = dict(zip(labels, handles, strict=True))
    figure.legend(kept.values(), kept.keys(), loc="outside upper center", ncols=columns, frameon=False)


def _end(line: Any) -> tuple[float, float]:
    xy = np.asarray(line.get_xydata(), dtype=float)
    known = xy[np.isfinite(xy).all(axis=1)]
    return tuple(known[known[:, 0].argmax()]) if len(known) else (np.nan, np.nan)
