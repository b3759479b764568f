"""The figure of the frictions study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparkjoy.lab.studies.frictions import STRENGTHS, table
from sparkjoy.lab.training.loop import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = {
    "methods that differentiate everything": {
        "dg": ("black", "o"),
        "importance": ("tab:green", "s"),
        "ppo": ("tab:purple", "^"),
        "pmpo": ("tab:brown", "v"),
        "pg": ("gray", "x"),
    },
    "gates": {
        "dg": ("black", "o"),
        "noise 0.3": ("tab:blue", "s"),
        "price 0": ("tab:cyan", "D"),
        "hard 10%": ("tab:orange", "^"),
        "hard 3%": ("tab:red", "v"),
    },
}
"""Five arms a row can be told apart."""
TITLES = {
    "delay": "delay, steps",
    "bug": "bugs, % of answers",
    "corrupt": "coins for rewards, %",
    "discover": "discoveries, %",
    "all": "all four",
}
LEAST = 0.05
"""Error in percent below which the axis is linear."""


def plot(rows: list[Record], prompt_length: int) -> Figure:
    """Error at the end against the strength of each friction, means over seeds; above all methods, below the gates."""
    from matplotlib.figure import Figure

    found = [row for row in table(rows) if row["prompt_length"] == prompt_length]
    shown = [name for name in TITLES if any(row["friction"] == name for row in found)]
    figure = Figure(figsize=(9, 6), layout="constrained")
    widths = [1 if name == "all" else 2 for name in shown]
    axes = figure.subplots(len(SHOWN), len(shown), sharey=True, squeeze=False, width_ratios=widths)
    for number, (title, arms) in enumerate(SHOWN.items()):
        of_row = axes[number]
        for axis, friction in zip(of_row, shown, strict=True):
            for arm, (color, marker) in arms.items():
                _draw(axis, [row for row in found if row["arm"] == arm], friction, color, marker, arm)
            axis.set_yscale("symlog", linthresh=LEAST, linscale=0.5)
            axis.set_yticks([0, 0.1, 1, 10, 50], ["0", "0.1", "1", "10", "50"])
            axis.set_ylim(-0.02, 80)
            axis.grid(alpha=0.3)
            axis.minorticks_off()
        of_row[0].set_ylabel("error at the end, %")
        labels = of_row[0].get_legend_handles_labels()
        of_row[0].figure.legend(
            *labels,
            loc=f"outside {'lower' if number else 'upper'} center",
            ncols=len(arms),
            frameon=False,
            title=title,
        )
    for axis, friction in zip(axes[-1], shown, strict=True):
        axis.set_xlabel(TITLES[friction])
    return figure


def _draw(axis: Axes, rows: list[Record], friction: str, color: str, marker: str, arm: str) -> None:
    levels = sorted((row for row in rows if row["friction"] == friction), key=lambda row: row["level"])
    of_friction = {row["level"] + 1: row for row in levels}
    without = [] if friction == "all" else [row for row in rows if row["friction"] == "none"]
    points = dict(enumerate(without)) | of_friction
    axis.plot(
        list(points),
        [100 * row["error"] for row in points.values()],
        color=color,
        marker=marker,
        markersize=5,
        linewidth=1.2,
        label=arm,
    )
    if friction in STRENGTHS:
        scale = 1 if friction == "delay" else 100
        axis.set_xticks(range(4), ["0", *(f"{scale * strength:g}" for strength in STRENGTHS[friction])])
    else:
        names = {1: "weak", 2: "middle", 3: "strong"}
        axis.set_xticks(list(of_friction), [names[level] for level in of_friction])
