"""What the runs of the frictions study come to: its table and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from sparkjoy_lab.studies.frames import as_records, over_arm, ratio
from sparkjoy_lab.training.loop import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STRENGTHS: dict[str, tuple[Any, Any, Any]] = {
    "delay": (10, 30, 100),
    "bug": (0.1, 0.3, 0.6),
    "corrupt": (0.1, 0.3, 0.6),
    "discover": (0.01, 0.03, 0.1),
}
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


def means(rows: list[Record]) -> pd.DataFrame:
    """Of every case and arm, means over seeds, and over those of dg where that ran; the median of steps to the target.

    `of_dg` is the ratio of the errors at the end, `whole_run_of_dg` that of the mean errors of all evaluations, which
    also tells arms apart that both end at none.
    """
    frame = pd.DataFrame(rows).astype({"steps_to_target": float})
    found = frame.groupby(["prompt_length", "friction", "level", "arm"], sort=False).agg(
        strength=("strength", "first"),
        learning_rate=("learning_rate", "first"),
        seeds=("error", "size"),
        error=("error", "mean"),
        sd=("error", "std"),
        whole_run=("whole_run", "mean"),
        solved=("steps_to_target", "count"),
        steps=("steps_to_target", "median"),
        kept=("kept", "mean"),
    )
    found["steps"] = found["steps"].where(2 * found["solved"] > found["seeds"])
    return found.assign(of_dg=over_arm(found["error"]), whole_run_of_dg=over_arm(found["whole_run"]))


def table(rows: list[Record]) -> list[Record]:
    """`means` for summary.json."""
    return as_records(means(rows))


def tables(rows: list[Record]) -> dict[str, pd.DataFrame]:
    """One row a friction, strength and arm: errors at the end and over the whole run, and steps to the target."""
    found = means(rows).reset_index()
    spread = [f" ± {100 * sd:.2f}" if sd == sd else "" for sd in found["sd"]]
    shown = {
        "H": found["prompt_length"],
        "friction": [_case(row) for row in found.to_dict("records")],
        "arm": found["arm"],
        "lr": [f"{rate:g}" for rate in found["learning_rate"]],
        "error": [f"{100 * error:.2f}{sd}" for error, sd in zip(found["error"], spread, strict=True)],
        "of dg's": found["of_dg"].map(ratio),
        "whole run": [f"{100 * error:.1f}" for error in found["whole_run"]],
        "part": found["whole_run_of_dg"].map(ratio),
        "solved": [f"{row.solved} of {row.seeds}" for row in found.itertuples()],
        "steps": found["steps"],
        "kept": [f"{100 * kept:.1f}%" for kept in found["kept"]],
    }
    title = "errors in %, means over seeds, and over dg's; steps to the target: median"
    index = ["H", "friction", "arm"]
    return {title: pd.DataFrame(shown).set_index(index).rename(columns={"part": "of dg's"})}


def _case(row: dict[str, Any]) -> str:
    if row["friction"] == "all":
        return f"all {row['level'] + 1}"
    return row["friction"] if row["friction"] not in STRENGTHS else f"{row['friction']} {row['strength']:g}"


def plot(rows: list[Record], prompt_length: int) -> Figure:
    """Error at the end against the strength of each friction, means over seeds; above all methods, below the gates."""
    every = means(rows).reset_index()
    found = every[every["prompt_length"] == prompt_length]
    shown = [name for name in TITLES if name in set(found["friction"])] or ["none"]
    figure = Figure(figsize=(9, 6), layout="constrained")
    widths = [1 if name == "all" else 2 for name in shown]
    axes = figure.subplots(len(SHOWN), len(shown), sharey=True, squeeze=False, width_ratios=widths)
    for number, (title, arms) in enumerate(SHOWN.items()):
        of_row = axes[number]
        for axis, friction in zip(of_row, shown, strict=True):
            for arm, (color, marker) in arms.items():
                _draw(axis, found[found["arm"] == arm], friction, color, marker)
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
        axis.set_xlabel(TITLES.get(friction, "no friction"))
    return figure


def _draw(axis: Axes, found: pd.DataFrame, friction: str, color: str, marker: str) -> None:
    if found.empty:
        return
    levels = found[found["friction"] == friction].sort_values("level")
    without = found[(found["friction"] == "none") & (friction in STRENGTHS)]
    places = [0] * len(without) + [level + 1 for level in levels["level"]]
    errors = 100 * pd.concat([without["error"], levels["error"]])
    axis.plot(places, errors, color=color, marker=marker, markersize=5, linewidth=1.2, label=found["arm"].iloc[0])
    if friction in STRENGTHS:
        scale = 1 if friction == "delay" else 100
        axis.set_xticks(range(4), ["0", *(f"{scale * strength:g}" for strength in STRENGTHS[friction])])
    else:
        names = {1: "weak", 2: "middle", 3: "strong"}
        axis.set_xticks(places, [names[place] for place in places])
