"""The same rate by delight and by every other score, under a baseline that tracks the policy and one that does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparkjoy.lab.studies.pareto import OnRun, train_all
from sparkjoy.lab.tasks.mnist import MnistTask
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import Record
from sparkjoy.lab.training.settings import Score, Settings
from sparkjoy.lab.training.tracking import write_json, write_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Baseline = Literal["expected-confidence", "batch-mean"]
BASELINES: tuple[Baseline, ...] = ("expected-confidence", "batch-mean")


@dataclass(frozen=True)
class ScoresStudy:
    """MNIST at one rate, ranked by every score."""

    data: str = "embedded"
    """embedded, openml, or a folder of IDX files."""
    rate: float = 0.03
    """Fraction of samples kept."""
    scores: tuple[Score, ...] = (
        "delight",
        "advantage",
        "additive",
        "absolute-advantage",
        "surprisal",
        "uniform",
    )
    """What to rank by."""
    alpha: float = 0.5
    """Weight of the advantage in the additive score."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of every arm for each."""
    steps: int = 3_000
    """Optimizer steps a run."""
    evaluate_every: int = 100
    """Steps between evaluations."""

    def __post_init__(self) -> None:
        if not self.scores or not self.seeds:
            raise ValueError("--scores and --seeds: expected at least one of each.")
        self.arms()

    def arms(self) -> list[Settings]:
        """One run of every score with every seed."""
        return [
            Settings(
                rate=self.rate,
                score=score,
                alpha=self.alpha,
                seed=seed,
                steps=self.steps,
                evaluate_every=self.evaluate_every,
            )
            for score in self.scores
            for seed in self.seeds
        ]


def run(study: ScoresStudy, task: MnistTask, out: Path, on_run: OnRun | None = None) -> list[Record]:
    """Train every score under both baselines on `task`; finished runs are not run again.

    Returns:
        The records of all runs, each with its "baseline".
    """
    records: list[Record] = []
    with opened(out, asdict(study)):
        for baseline in BASELINES:
            task.config = replace(task.config, baseline=baseline)
            of_baseline = train_all(study.arms(), task, out / baseline, asdict(task.config), on_run)
            records += [{"baseline": baseline, **record} for record in of_baseline]
        write_json_lines(out / "records.jsonl", records)
        write_json(out / "summary.json", {"scores": table(records)})
    return records


def table(records: list[Record]) -> list[dict[str, Any]]:
    """Of every baseline and score: mean and standard deviation of the last error, and the samples it cost."""
    rows = []
    for baseline in dict.fromkeys(record["baseline"] for record in records):
        for score in dict.fromkeys(record["score"] for record in records):
            last: dict[int, Record] = {}
            for record in records:
                if record["baseline"] == baseline and record["score"] == score:
                    last[record["seed"]] = record
            errors = [record["error"] for record in last.values()]
            rows.append(
                {
                    "baseline": baseline,
                    "score": score,
                    "error": float(np.mean(errors)),
                    "error_sd": float(np.std(errors, ddof=1)) if len(errors) > 1 else None,
                    "seeds": len(errors),
                    "backward_samples": float(np.mean([record["backward_samples"] for record in last.values()])),
                }
            )
    return rows


def plot(records: list[Record]) -> Figure:
    """Error against steps for every score, one panel a baseline: means, and bands from the best to the worst seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.subplots(1, len(BASELINES), sharey=True)
    for axis, baseline in zip(axes, BASELINES, strict=True):
        for score in dict.fromkeys(record["score"] for record in records):
            chosen = [r for r in records if r["baseline"] == baseline and r["score"] == score]
            steps = sorted({record["step"] for record in chosen})
            errors = np.array([[r["error"] for r in chosen if r["step"] == step] for step in steps])
            (line,) = axis.plot(steps, 100 * errors.mean(axis=1), label=score)
            axis.fill_between(
                steps,
                100 * errors.min(axis=1),
                100 * errors.max(axis=1),
                color=line.get_color(),
                alpha=0.15,
                linewidth=0,
            )
        axis.set(title=f"baseline: {baseline}", xlabel="optimizer steps", xscale="log", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("test error, %")
    rate = records[0]["rate"]
    figure.suptitle(f"MNIST, {100 * rate:g}% of the samples kept by the highest score")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure
