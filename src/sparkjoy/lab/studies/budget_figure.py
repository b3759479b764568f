"""The figure of the budget study."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparkjoy.lab.studies.budget import table
from sparkjoy.lab.training.loop import Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {
    "noise 0.3": ("tab:blue", "o"),
    "noise 1": ("tab:cyan", "s"),
    "hard 10%": ("tab:orange", "^"),
    "hard 3%": ("tab:red", "v"),
    "uniform 10%": ("gray", "x"),
}
"""At most five arms can be told apart; the table has them all."""
WORST = 4.0


def plot(rows: list[Record]) -> Figure:
    """Left: error (MNIST) or steps to 1% (reversal) over DG's, mean and seeds. Right: what part was differentiated."""
    from matplotlib.figure import Figure

    found = table(rows)
    tasks = list(dict.fromkeys(row["task"] for row in found))
    arms = [arm for arm in SHOWN if any(row["arm"] == arm for row in found)]
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(tasks)), layout="constrained")
    quality, cost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for number, arm in enumerate(arms):
        color, marker = SHOWN[arm]
        offset = 0.6 * ((number + 0.5) / len(arms) - 0.5)
        for position, task in enumerate(tasks):
            dense = next((row["value"] for row in found if (row["task"], row["arm"]) == (task, "dg")), None)
            of_arm = next((row for row in found if (row["task"], row["arm"]) == (task, arm)), None)
            if of_arm is None:
                continue
            y = position + offset
            cost.plot(100 * of_arm["kept"], y, marker, color=color, label=arm if position == 0 else None)
            if dense is None:
                continue
            values = [row["value"] for row in rows if (row["task"], row["arm"]) == (task, arm)]
            seeds = [min(value / dense, WORST) for value in values if value is not None]
            quality.plot(seeds, [y] * len(seeds), ".", color=color, alpha=0.4, markersize=4)
            ratio = None if of_arm["value_of_dg"] is None else min(of_arm["value_of_dg"], WORST)
            if ratio is None:
                quality.plot(WORST, y, ">", color=color, markerfacecolor="none")
            else:
                quality.plot(ratio, y, marker, color=color)
    quality.axvline(1, color="black", linewidth=1)
    quality.axvline(1.05, color="black", linewidth=0.5, linestyle=":")
    quality.set(xscale="log", xlim=(0.6, WORST * 1.1), xlabel="error, or steps to 1% error, over DG's")
    quality.set_xticks([0.7, 1, 1.5, 2, 3, WORST], ["0.7", "1", "1.5", "2", "3", f"≥ {WORST:g}"])
    quality.minorticks_off()
    quality.set_yticks(np.arange(len(tasks)), tasks)
    quality.invert_yaxis()
    cost.set(xscale="log", xlabel="rows differentiated, %")
    cost.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    cost.minorticks_off()
    for axis in (quality, cost):
        axis.grid(alpha=0.3)
    figure.legend(*cost.get_legend_handles_labels(), loc="outside upper center", ncols=len(arms), frameon=False)
    return figure
