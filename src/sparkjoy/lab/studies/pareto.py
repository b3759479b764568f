"""Quality against cost: every method at every rate, its error against steps, backward samples and seconds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkjoy.lab.tasks.rollouts import Task
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import OnStep, Record, summary, train
from sparkjoy.lab.training.settings import Method, Settings
from sparkjoy.lab.training.tracking import save_figure, write_json, write_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OnRun = Callable[[str, Settings], OnStep]
"""Called before a run with its name; gives what to call after each of its steps."""


@dataclass(frozen=True)
class ParetoConfig:
    """Which runs to compare: one after another on the same threads, so that their seconds compare."""

    methods: tuple[Method, ...] = ("pg", "dg", "kondo", "uniform")
    """Methods to train."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Fractions of samples that kondo keeps."""
    uniform_rates: tuple[float, ...] = (0.03,)
    """Fractions that uniform keeps, rows at random: what any choice has to beat."""
    prices: tuple[float, ...] = ()
    """Fixed prices at which to train kondo too, such as 0."""
    noises: tuple[float, ...] = ()
    """Noise budgets at which to train unbiased too, such as 0.3 and 1."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each."""
    steps: int = 4_000
    """Optimizer steps a run."""
    learning_rate: float = 1e-3
    """Adam's learning rate."""
    evaluate_every: int = 100
    """Steps between evaluations."""
    target_error: float | None = None
    """Report when the error first was at or below this fraction."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        for name in ("methods", "rates", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name}: expected at least one.")
        self.arms()

    def arms(self) -> list[Settings]:
        """The settings of every arm, with the first seed."""
        shared: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("steps", "learning_rate", "evaluate_every", "target_error", "threads")
        }
        arms = []
        for method in self.methods:
            choices: list[dict[str, Any]] = [{}]
            if method == "uniform":
                choices = [{"rate": rate} for rate in self.uniform_rates]
            if method == "kondo":
                choices = [{"rate": rate} for rate in self.rates] + [{"price": price} for price in self.prices]
            arms += [Settings(method=method, seed=self.seeds[0], **choice, **shared) for choice in choices]
        arms += [Settings("unbiased", noise=noise, seed=self.seeds[0], **shared) for noise in self.noises]
        return arms


def run(
    config: ParetoConfig, task: Task, out: Path, task_config: dict[str, Any], on_run: OnRun | None = None
) -> list[Record]:
    """Train every arm with every seed, each in its own folder under `out/runs`; finished runs are not run again.

    Args:
        config: which runs.
        task: what to train on.
        out: folder of the study: config.json, records.jsonl, summary.json, pareto.png and .svg.
        task_config: what the task was built from.
        on_run: called before each run.

    Returns:
        The records of all runs.

    Raises:
        ValueError: the folder cannot be written, or holds results with other settings.
    """
    arms = [(arm, seed) for arm in config.arms() for seed in config.seeds]
    runs = [Settings(**{**asdict(arm), "seed": seed}) for arm, seed in arms]
    with opened(out, {"task": task.name, **task_config, **asdict(config)}):
        return train_all(runs, task, out, task_config, on_run)


def train_all(
    runs: list[Settings], task: Task, out: Path, task_config: dict[str, Any], on_run: OnRun | None
) -> list[Record]:
    """Train each of `runs` in its folder, and merge what they leave into `out`."""
    records: list[Record] = []
    for settings in runs:
        records += train_one(settings, task, out / "runs", task_config, on_run)
        write_json_lines(out / "records.jsonl", records)
        write_json(out / "summary.json", {"runs": summaries(records, settings.target_error)})
    return records


def train_one(
    settings: Settings, task: Task, out: Path, task_config: dict[str, Any], on_run: OnRun | None
) -> list[Record]:
    """Train one run in a folder of its own below `out`; its records, with the name of their arm."""
    name = f"{settings.label}, seed {settings.seed}"
    folder = out / name.replace("%", "pct").replace(", ", "-").replace(" ", "-")
    on_step = None if on_run is None else on_run(name, settings)
    return [{"arm": settings.label, **record} for record in train(task, settings, folder, task_config, on_step)]


def summaries(records: list[Record], target_error: float | None) -> list[Record]:
    """The last record of every run, with when it reached the target error."""
    runs: dict[tuple[str, int], list[Record]] = defaultdict(list)
    for record in records:
        runs[record["arm"], record["seed"]].append(record)
    return [summary(of_run, target_error) for of_run in runs.values()]


def plot(records: list[Record]) -> Figure:
    """Error against steps, backward samples and seconds: means over seeds, bands from the best to the worst seed.

    The dashed line is the frontier: the lowest mean error of any arm for at most that cost.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    curves = _curves(records)
    rates = {record["arm"]: record["rate"] for record in records}
    for axis, cost, label in zip(
        axes,
        ("step", "backward_samples", "seconds"),
        ("optimizer steps", "samples differentiated", "training seconds (sampling included)"),
        strict=True,
    ):
        for arm, curve in curves.items():
            style = _style(arm, rates)
            axis.plot(curve[cost], 100 * curve["error"], label=arm, **style)
            axis.fill_between(
                curve[cost], 100 * curve["best"], 100 * curve["worst"], color=style["color"], alpha=0.12, linewidth=0
            )
        _frontier(axis, curves, cost)
        axis.set(xlabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    seeds = len({record["seed"] for record in records})
    axes[0].set_ylabel("test error, %")
    figure.suptitle(f"{records[0]['task']}: quality against cost, mean and range over {seeds} seeds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def write_figure(records: list[Record], out: Path) -> None:
    """Draw `plot` into pareto.png and pareto.svg."""
    save_figure(plot(records), out, "pareto")


def _curves(records: list[Record]) -> dict[str, dict[str, np.ndarray[Any, np.dtype[np.float64]]]]:
    """Of every arm, at the steps that all its seeds reached: mean costs, mean error, best and worst seed's error."""
    by_arm: dict[str, dict[int, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_arm[record["arm"]][record["step"]].append(record)
    curves = {}
    for arm, by_step in by_arm.items():
        seeds = max(len(at_step) for at_step in by_step.values())
        steps = [step for step in sorted(by_step) if len(by_step[step]) == seeds]
        errors = np.array([[record["error"] for record in by_step[step]] for step in steps])
        seconds = [np.mean([record["seconds"]["total"] for record in by_step[step]]) for step in steps]
        backward = [np.mean([record["backward_samples"] for record in by_step[step]]) for step in steps]
        curves[arm] = {
            "step": np.array(steps, dtype=float),
            "backward_samples": np.array(backward),
            "seconds": np.array(seconds),
            "error": errors.mean(axis=1),
            "best": errors.min(axis=1),
            "worst": errors.max(axis=1),
        }
    return curves


def _frontier(axis: Axes, curves: dict[str, Any], cost: str) -> None:
    costs = np.concatenate([curve[cost] for curve in curves.values()])
    errors = np.concatenate([curve["error"] for curve in curves.values()])
    order = np.argsort(costs, kind="stable")
    axis.step(
        costs[order],
        100 * np.minimum.accumulate(errors[order]),
        where="post",
        color="tab:orange",
        linestyle="--",
        linewidth=0.8,
        label="frontier",
        zorder=5,
    )


def _style(arm: str, rates: dict[str, float | None]) -> dict[str, Any]:
    """Black for DG, gray for PG, blue for noise budgets; a colour for each rate, dotted for rows at random."""
    from matplotlib import colormaps

    if arm in ("pg", "dg"):
        return {"color": "gray" if arm == "pg" else "black", "linewidth": 2}
    budgets = sorted(name for name in rates if name.startswith("unbiased noise"))
    if arm in budgets:
        return {"color": "tab:blue", "linestyle": ("-", "--", "-.", ":")[budgets.index(arm) % 4], "linewidth": 2}
    known = sorted({rate for rate in rates.values() if rate is not None})
    rate = rates[arm]
    color = "tab:red" if rate is None else colormaps["viridis"](0.9 * known.index(rate) / max(1, len(known) - 1))
    return {"color": color, "linestyle": ":" if arm.startswith("uniform") else "-"}
