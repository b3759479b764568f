"""The figures of the language study."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from sparkjoy_lab.studies.drawing import WIDTH, legend
from sparkjoy_lab.studies.frames import grouped
from sparkjoy_lab.studies.language_results import DENSE, PARTS, SHARED
from sparkjoy_lab.training.loop import Record

SHOWN = {
    DENSE: ("black", "o"),
    SHARED: ("0.5", "o"),
    "zero advantages dropped": ("tab:green", "D"),
    "noise 0.3": ("tab:blue", "s"),
    "delight 15%": ("tab:orange", "^"),
    "uniform 15%": ("tab:purple", "v"),
}
"""No more arms can be told apart; the table has them all."""
COSTS: dict[str, Callable[[Record], float]] = {
    "CPU seconds, all of a step": lambda row: float(row["seconds"]["total"]),
    "tokens differentiated": lambda row: float(row["backward_tokens"]),
    "optimizer steps": lambda row: float(row["step"]),
}
COLORS = dict(zip(PARTS, ("tab:gray", "tab:red", "tab:blue", "tab:olive"), strict=True))


def curves(rows: list[Record], target: float) -> Figure:
    """The score of held-out problems against seconds, tokens differentiated and steps: mean and seeds."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for arm in [arm for arm in SHOWN if any(row["arm"] == arm for row in rows)]:
        color, marker = SHOWN[arm]
        scored = [row for row in rows if row["arm"] == arm and "score" in row]
        runs = list(grouped(scored, "seed").values())
        scores = [100 * np.mean([row["score"] for row in at]) for at in zip(*runs, strict=False)]
        for axis, cost in zip(axes, COSTS.values(), strict=True):
            for run in runs:
                axis.plot([cost(row) for row in run], [100 * row["score"] for row in run], color=color, alpha=0.2)
            costs = [np.mean([cost(row) for row in at]) for at in zip(*runs, strict=False)]
            axis.plot(costs, scores, color=color, marker=marker, markersize=4, label=arm)
    for axis, label in zip(axes, COSTS, strict=True):
        axis.axhline(100 * target, color="black", linewidth=0.5, linestyle=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[1].set_xscale("log")  # the start, at none, is not on it
    axes[0].set_ylabel("held-out score, %")
    legend(figure, axes[0])
    return figure


def bars(found: list[Record]) -> Figure:
    """Where a step's seconds go, by arm of a table."""
    figure = Figure(figsize=(WIDTH, 1 + 0.35 * len(found)), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(found):
        left = 0.0
        for part in PARTS:
            seconds = row["seconds_a_step"][part]
            axis.barh(place, seconds, left=left, color=COLORS[part], label=part if place == 0 else None)
            left += seconds
        axis.text(left, place, f" {left:.1f} s", va="center")
    axis.set_yticks(range(len(found)), [row["arm"] for row in found])
    axis.invert_yaxis()
    axis.set_xlabel("CPU seconds of a step")
    axis.margins(x=0.08)
    legend(figure, axis)
    return figure
