"""The figures of the screening study, from its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from sparkjoy_lab.studies.drawing import legend, panels, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2


def plot(tables: dict[str, list[dict[str, Any]]]) -> dict[str, Figure]:
    """A figure for every part that was run."""
    draw = {"screeners": _screeners, "noise": _noise, "unbiased": _unbiased}
    return {name: draw[name](pd.DataFrame(rows)) for name, rows in tables.items() if rows}


def _screeners(found: pd.DataFrame) -> Figure:
    """Recall of every screener, and beside it what it costs."""
    drafts = found.dropna(subset=["recall", "seconds_over_forward"])
    cost = drafts["seconds_over_forward"] + drafts["learn_over_forward"].astype(float).fillna(0.0)
    name = drafts["screener"].where(drafts["verify"].notna(), drafts["screener"] + ", alone")
    drafts = drafts.assign(cost=cost, name=name)
    figure, axes = _grid(drafts["task"].unique(), 2.4)
    for axis, (task, of_task) in zip(axes, drafts.groupby("task", sort=False), strict=False):
        bars = axis.barh(of_task["name"], of_task["recall"], height=0.6)
        axis.bar_label(bars, [f"{seconds:.2g}" for seconds in of_task["cost"]], padding=4)
        axis.set_xlim(0, 1.15)
        axis.invert_yaxis()
        axis.set_title(str(task), fontsize="medium")
    said = "recall of the rows to keep; at the bar: seconds of drafting and teaching, over those of an exact pass"
    figure.supxlabel(said, fontsize="medium")
    return figure


def _noise(found: pd.DataFrame) -> Figure:
    """Mean error over training against the noise on delight."""
    found = found.assign(name=[_kept(row) for row in found.to_dict("records")], verified=found["verify"].notna())
    style = styles(found["name"])
    kinds = [(task, kind) for task in found["task"].unique() for kind in ("multiplicative", "additive")]
    figure, axes = _grid(kinds, 3.2)
    for axis, (task, kind) in zip(axes, kinds, strict=False):
        mine = found[(found["task"] == task) & ((found["noise_kind"] == kind) | (found["noise"] == 0))]
        for (name, verified), line in mine.sort_values("noise").groupby(["name", "verified"], sort=False):
            options = style[str(name)] | ({"linestyle": "--", "label": "_"} if verified else {})
            axis.errorbar(100 * line["noise"], 100 * line["mean_error"], _bars(line["mean_error_sd"]), **options)
        axis.set_title(f"{task}, {kind}", fontsize="medium")
    figure.supxlabel("noise on delight, %; dashed: verified; bars: standard deviation over seeds", fontsize="medium")
    figure.supylabel("error, mean over training, %", fontsize="medium")
    legend(figure, axes[0])
    return figure


def _unbiased(found: pd.DataFrame) -> Figure:
    """Last error of each method on every task, and against batch size at equal cost."""
    arms = found["arm"].unique()
    style = styles(arms)
    tasks = [task for task in found["task"].unique() if " of " not in task]
    figure, axes = _grid([*tasks, "batches"], 2.4)
    for axis, task in zip(axes, tasks, strict=False):
        of_task = found[found["task"] == task]
        colors = [style[arm]["color"] for arm in of_task["arm"]]
        axis.barh(of_task["arm"], 100 * of_task["error"], xerr=_bars(of_task["error_sd"]), color=colors, height=0.6)
        axis.invert_yaxis()
        axis.set_title(f"{task}: error in the end, %", fontsize="medium")
    sized = found[found["task"].str.startswith("mnist, 30% wrong labels") & ~found["task"].str.contains("three of")]
    for arm, line in sized.sort_values("batch_size").groupby("arm", sort=False):
        if len(line) > 1:
            axes[len(tasks)].errorbar(
                line["batch_size"], 100 * line["error"], _bars(line["error_sd"]), **style[str(arm)]
            )
    axes[len(tasks)].set_xscale("log", base=2)
    sizes = sorted(sized["batch_size"].unique())
    axes[len(tasks)].set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes[len(tasks)].set_title("30% wrong labels: error, %, by batch size at equal cost", fontsize="medium")
    return figure


def _bars(deviations: pd.Series[float]) -> pd.Series[float]:
    """Standard deviations over seeds, in %; none where there is one seed."""
    return 100 * deviations.astype(float).fillna(0.0)


def _kept(row: dict[str, Any]) -> str:
    if row["method"] == "dg":
        return "dg"
    return f"kondo {100 * row['rate']:g}%" if pd.notna(row["rate"]) else f"kondo, price {row['price']:g}"


def _grid(names: Any, height: float) -> tuple[Figure, list[Any]]:
    """As many panels as names, in two columns."""
    columns = min(COLUMNS, len(names))
    figure, axes = panels(-(-len(names) // columns), columns, height)
    for axis in axes[len(names) :]:
        axis.remove()
    return figure, axes
