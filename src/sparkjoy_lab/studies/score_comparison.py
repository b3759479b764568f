"""The same rate by delight and by every other score, under a baseline that tracks the policy and one that does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from sparkjoy_lab.studies.drawing import draw, legend, log_axes, panels, styles
from sparkjoy_lab.studies.frames import as_records, mean_curves
from sparkjoy_lab.studies.run_tables import last_records
from sparkjoy_lab.studies.runs import Run
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.tasks.mnist import MnistConfig
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.loop import Record
from sparkjoy_lab.training.settings import Score, Settings
from sparkjoy_lab.training.tracking import write_json, write_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Baseline = Literal["expected-confidence", "batch-mean"]
BASELINES: tuple[Baseline, ...] = ("expected-confidence", "batch-mean")


@dataclass(frozen=True)
class ScoresStudy(Study):
    """The same rate by delight and by every other score, under two baselines, on MNIST."""

    keeps_records = True
    extends = ("scores", "seeds")

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
        refuse_idle(self, {"alpha": ("additive" in self.scores, "additive among --scores")})
        self.arms()

    def arms(self) -> list[Settings]:
        """One run of every score with every seed."""
        return [
            Settings(
                rate=self.rate,
                score=score,
                alpha=self.alpha if score == "additive" else Settings.alpha,
                seed=seed,
                steps=self.steps,
                evaluate_every=self.evaluate_every,
            )
            for score in self.scores
            for seed in self.seeds
        ]

    @property
    def runs(self) -> int:
        return len(self.arms()) * len(BASELINES)

    def run(self, work: Work) -> Rows:
        arms, rows = self.arms(), Rows()
        tasks = {baseline: MnistConfig(data=self.data, baseline=baseline) for baseline in BASELINES}
        runs = [Run(arm, task, Path(baseline, "runs")) for baseline, task in tasks.items() for arm in arms]
        of_baselines: dict[str, Rows] = {baseline: [] for baseline in BASELINES}
        for run, records in zip(runs, work.each(work.train, runs), strict=True):
            baseline = run.within.parent.name
            of_baselines[baseline] += records
            rows += [{"baseline": baseline, **record} for record in records]
            work.save(rows)
        for baseline, records in of_baselines.items():
            write_json_lines(work.out / baseline / "records.jsonl", records)
            write_json(work.out / baseline / "summary.json", {"runs": last_records(records, None)})
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"scores": as_records(ends(rows))}

    def tables(self, rows: Rows) -> dict[str, pd.DataFrame]:
        found = ends(rows)
        spread = [f" ± {100 * sd:.2f}" if sd == sd else "" for sd in found["error_sd"]]
        errors = [f"{100 * error:.2f}" for error in found["error"]]
        shown = {
            "error %": [error + sd for error, sd in zip(errors, spread, strict=True)],
            "seeds": found["seeds"],
            "backward samples": [f"{samples:,.0f}" for samples in found["backward_samples"]],
        }
        return {"means over seeds, ± standard deviation": pd.DataFrame(shown, index=found.index)}

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"scores": plot(rows)}


def ends(rows: list[Record]) -> pd.DataFrame:
    """Of every baseline and score: mean and standard deviation of the last error, and the samples it cost."""
    last = pd.DataFrame(rows).groupby(["baseline", "score", "seed"], sort=False).last()
    of_score = last.groupby(level=["baseline", "score"], sort=False)
    return of_score.agg(
        error=("error", "mean"),
        error_sd=("error", "std"),
        seeds=("error", "size"),
        backward_samples=("backward_samples", "mean"),
    )


def plot(rows: list[Record]) -> Figure:
    """Error against steps for every score, one panel a baseline: means, and bands from the best to the worst seed."""
    curves = mean_curves(rows, "baseline", "score")
    style = styles([row["score"] for row in rows], ("delight", "advantage", "additive", "surprisal", "uniform"))
    figure, axes = panels(1, len(BASELINES), 4.5, sharey=True)
    for axis, baseline in zip(axes, BASELINES, strict=True):
        for score, curve in curves[curves["baseline"] == baseline].groupby("score", sort=False):
            draw(
                axis, curve["step"], 100 * curve["error"], style[str(score)], 100 * curve["best"], 100 * curve["worst"]
            )
        axis.set(xlabel="optimizer steps")
        axis.set_title(f"baseline: {baseline}", fontsize="medium")
        log_axes(axis)
    axes[0].set_ylabel(f"test error, %, {100 * rows[0]['rate']:g}% of the samples kept")
    legend(figure, axes[0])
    return figure
