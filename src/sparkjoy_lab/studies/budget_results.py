"""What the runs of the budget study come to: its table and figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sparkjoy_lab.studies.drawing import MARKED, WIDTH, legend
from sparkjoy_lab.studies.frames import as_records, over_arm, ratio
from sparkjoy_lab.training.loop import Record

SHOWN = ("noise 0.3", "noise 1", "hard 10%", "hard 3%", "uniform 10%")
"""At most five arms can be told apart; the table has them all."""
WORST = 4.0


def means(rows: list[Record]) -> pd.DataFrame:
    """Of every task and arm: means over seeds, and over those of dg where that ran; NaN where a seed failed."""
    frame = pd.DataFrame(rows).astype({"value": float})
    of_arm = frame.groupby(["task", "arm"], sort=False)
    found = of_arm.agg(
        learning_rate=("learning_rate", "first"),
        measure=("measure", "first"),
        value=("value", "mean"),
        sd=("value", "std"),
        solved=("value", "count"),
        seeds=("value", "size"),
        kept=("kept", "mean"),
        seconds=("seconds", "mean"),
    )
    failed = found["solved"] < found["seeds"]
    found.loc[failed, ["value", "sd", "seconds"]] = np.nan
    return found.assign(value_of_dg=over_arm(found["value"]), seconds_of_dg=over_arm(found["seconds"]))


def table(rows: list[Record]) -> list[Record]:
    """`means` for summary.json; None where a seed failed."""
    return as_records(means(rows))


def tables(rows: list[Record]) -> dict[str, pd.DataFrame]:
    """One row a task and arm: error or steps, that over DG's, what was kept, and seconds over DG's."""
    found = means(rows)
    shown = {
        "lr": [f"{rate:g}" for rate in found["learning_rate"]],
        "solved": [f"{row.solved} of {row.seeds}" for row in found.itertuples()],
        "error / steps": [_value(row) for row in found.to_dict("records")],
        "of dg's": found["value_of_dg"].map(ratio),
        "kept": [f"{100 * kept:.1f}%" for kept in found["kept"]],
        "seconds of dg's": found["seconds_of_dg"].map(ratio),
    }
    title = "mean over seeds; error after the same steps, or steps to the target error"
    return {title: pd.DataFrame(shown, index=found.index)}


def _value(row: Record) -> str:
    if np.isnan(row["value"]):
        return "-"
    unit, scale, digits = ("%", 100, 2) if row["measure"] == "error" else ("", 1, 0)
    spread = "" if np.isnan(row["sd"]) else f" ± {scale * row['sd']:.{digits}f}{unit}"
    return f"{scale * row['value']:.{digits}f}{unit}{spread}"


def plot(rows: list[Record]) -> Figure:
    """Left: error (MNIST) or steps to 1% (reversal) over DG's, mean and seeds. Right: what part was differentiated."""
    found, every = means(rows), pd.DataFrame(rows).astype({"value": float})
    dense = found["value"][found.index.get_level_values("arm") == "dg"].droplevel("arm")
    every["ratio"] = every["value"] / every["task"].map(dense)
    tasks = list(dict.fromkeys(every["task"]))
    arms = [arm for arm in SHOWN if arm in set(every["arm"])]
    figure = Figure(figsize=(WIDTH, 1.6 + 0.55 * len(tasks)), layout="constrained")
    quality, cost = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for number, (arm, (color, marker)) in enumerate(zip(arms, MARKED, strict=False)):
        of_arm = found.xs(arm, level="arm").reindex(tasks)
        at = np.arange(len(tasks)) + 0.6 * ((number + 0.5) / len(arms) - 0.5)
        places = dict(zip(tasks, at, strict=True))
        cost.plot(100 * of_arm["kept"], at, marker, color=color, label=arm)
        seeds = every[every["arm"] == arm]
        quality.plot(seeds["ratio"].clip(upper=WORST), seeds["task"].map(places), ".", color=color, alpha=0.4, ms=4)
        quality.plot(of_arm["value_of_dg"].clip(upper=WORST), at, marker, color=color)
        failed = of_arm["value_of_dg"].isna() & of_arm["seeds"].notna()
        quality.plot(np.full(failed.sum(), WORST), at[failed], ">", color=color, markerfacecolor="none")
    quality.axvline(1, color="black", linewidth=1)
    quality.axvline(1.05, color="black", linewidth=0.5, linestyle=":")
    quality.set(xscale="log", xlim=(0.6, WORST * 1.1), xlabel="error, or steps to 1% error, over DG's")
    quality.set_xticks([0.7, 1, 1.5, 2, 3, WORST], ["0.7", "1", "1.5", "2", "3", f"≥ {WORST:g}"])
    quality.set_yticks(np.arange(len(tasks)), tasks)
    quality.invert_yaxis()
    cost.set(xscale="log", xlabel="rows differentiated, %")
    cost.set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    for axis in (quality, cost):
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    legend(figure, cost)
    return figure
