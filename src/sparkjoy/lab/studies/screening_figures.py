"""The figures of the screening study, from its tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
FREE = 1e-3
"""Where a cost of next to nothing stands on a logarithmic axis."""


def plot(tables: dict[str, list[Row]]) -> dict[str, Figure]:
    """A figure for every part that was run."""
    draw = {"screeners": _screeners, "noise": _noise, "unbiased": _unbiased}
    return {name: draw[name](rows) for name, rows in tables.items() if rows}


def _screeners(rows: list[Row]) -> Figure:
    """Recall, with and without verification, against what a screener costs."""
    drafts = [row for row in rows if row["recall"] is not None and row["seconds_over_forward"] is not None]
    tasks = list(dict.fromkeys(row["task"] for row in drafts))
    figure, axes = _figure(tasks)
    colours = _colours([row["screener"] for row in drafts])
    for axis, task in zip(axes, tasks, strict=True):
        for row in drafts:
            if row["task"] != task:
                continue
            cost = max(FREE, row["seconds_over_forward"] + (row["learn_over_forward"] or 0.0))
            style = {"color": colours[row["screener"]], "fillstyle": "none" if row["verify"] is None else "full"}
            axis.plot(cost, row["recall"], "o", **style)
        axis.axvline(1, color="0.7", linewidth=1, zorder=0)
        axis.set_title(task)
        axis.set_xscale("log")
        axis.set_xlim(FREE / 2, 20)
        axis.set_xlabel("seconds of drafting and learning\nover those of an exact forward pass")
        axis.set_ylim(0, 1.05)
    axes[0].set_ylabel("recall of the true survivors\n(filled: four times the rate proposed)")
    for name, colour in colours.items():
        axes[0].plot([], [], "o", color=colour, label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(colours))
    return figure


def _noise(rows: list[Row]) -> Figure:
    """Mean error over training against the noise on delight."""
    tasks = list(dict.fromkeys((row["task"], kind) for row in rows for kind in ("multiplicative", "additive")))
    figure, axes = _figure(tasks)
    names = list(dict.fromkeys(_kept(row) for row in rows))
    colours = _colours(names)
    for axis, (task, kind) in zip(axes, tasks, strict=True):
        for name in names:
            for verified in (False, True):
                line = sorted(
                    (100 * row["noise"], 100 * row["mean_error"])
                    for row in rows
                    if (row["task"], _kept(row), row["verify"] is not None) == (task, name, verified)
                    and (row["noise_kind"] == kind or row["noise"] == 0)
                )
                if line:
                    label = name + (", verified" if verified else "")
                    style = {"linestyle": "--" if verified else "-", "marker": "o", "markersize": 3}
                    axis.plot(*zip(*line, strict=True), color=colours[name], label=label, **style)
        axis.set_title(f"{task}, {kind}")
        axis.set_xlabel("noise on delight, %")
    axes[0].set_ylabel("error, mean over training, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _unbiased(rows: list[Row]) -> Figure:
    """Last error of each method on every task, and against batch size at equal cost."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if " of " not in task]
    figure, axes = _figure([*tasks, "batches"])
    colours = _colours(list(dict.fromkeys(row["arm"] for row in rows)))
    for axis, task in zip(axes, tasks, strict=False):
        of_task = [row for row in rows if row["task"] == task]
        positions = range(len(of_task))
        axis.bar(positions, [100 * row["error"] for row in of_task], color=[colours[row["arm"]] for row in of_task])
        axis.set_xticks(positions, [row["arm"] for row in of_task], rotation=60, ha="right")
        axis.set_title(task)
    axes[0].set_ylabel("error in the end, %")
    sized = [row for row in rows if row["task"].startswith("mnist, 30% wrong labels") and "three of" not in row["task"]]
    for arm in dict.fromkeys(row["arm"] for row in sized):
        line = sorted((row["batch_size"], 100 * row["error"]) for row in sized if row["arm"] == arm)
        if len(line) > 1:
            axes[-1].plot(*zip(*line, strict=True), "o-", color=colours[arm], label=arm)
    axes[-1].set_xscale("log", base=2)
    axes[-1].set_xlabel("batch size, at equal cost")
    axes[-1].set_title("30% wrong labels")
    if axes[-1].has_data():
        axes[-1].legend()
    return figure


def _kept(row: Row) -> str:
    if row["method"] == "dg":
        return "dg"
    return f"kondo {100 * row['rate']:g}%" if row["rate"] is not None else f"kondo, price {row['price']:g}"


def _figure(panels: list[Any]) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.8), layout="constrained")
    return figure, figure.subplots(1, len(panels), squeeze=False)[0]


def _colours(names: list[str]) -> dict[str, str]:
    return {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(names))}
