"""One noise budget everywhere, against fixed rates and against rates that move but keep the hard gate's bias.

Every arm gets its best learning rate on each task, chosen on seeds of its own. On MNIST all arms take the same steps
and the error counts; on reversal they run to the target error and the steps count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkjoy_lab.studies import budget_results
from sparkjoy_lab.studies.runs import Run, TaskConfig, folder_name
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.studies.tuning import most_accurate, soonest
from sparkjoy_lab.tasks.mnist import MnistConfig
from sparkjoy_lab.tasks.reversal import ReversalConfig
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.loop import Record, summary
from sparkjoy_lab.training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ARMS: dict[str, dict[str, Any]] = {
    "dg": {"method": "dg"},
    "noise 0.3": {"method": "unbiased", "noise": 0.3},
    "noise 1": {"method": "unbiased", "noise": 1.0},
    "hard 3%": {"method": "kondo", "rate": 0.03},
    "hard 10%": {"method": "kondo", "rate": 0.1},
    "hard 25%": {"method": "kondo", "rate": 0.25},
    "effective size / 2": {"method": "kondo", "rate": 0.5, "price_kind": "effective"},
    "half of the delight": {"method": "kondo", "rate": 0.5, "price_kind": "nucleus"},
    "uniform 10%": {"method": "uniform", "rate": 0.1},
}
MNIST: dict[str, tuple[MnistConfig, int]] = {
    "mnist": (MnistConfig(), 2_000),
    "mnist, full": (MnistConfig(data="full"), 10_000),
    "mnist, 30% wrong labels": (MnistConfig(label_noise=0.3), 2_000),
    "mnist, 8 hidden units": (MnistConfig(hidden=8), 2_000),
    "mnist, batch-mean baseline": (MnistConfig(baseline="batch-mean"), 2_000),
}
"""Tasks whose error after so many steps counts, a mean over the last evaluations."""
LAST = 5
REVERSAL = {
    f"reversal H={length} M={vocabulary}": ReversalConfig(prompt_length=length, vocab_size=vocabulary)
    for length, vocabulary in ((10, 2), (10, 5), (10, 10), (20, 2), (20, 5), (20, 10))
}
"""Tasks whose steps to the target error count."""


@dataclass(frozen=True)
class BudgetStudy(Study):
    """One noise budget everywhere, against fixed rates and others that move, each at its best learning rate."""

    extends = ("tasks", "arms", "seeds")

    tasks: tuple[str, ...] = (
        "mnist",
        "mnist, 30% wrong labels",
        "mnist, 8 hidden units",
        "mnist, batch-mean baseline",
        "reversal H=10 M=2",
        "reversal H=10 M=5",
        "reversal H=10 M=10",
        "reversal H=20 M=2",
    )
    """Tasks, by name; "mnist, full" needs --data, and "reversal H=20 M=5" and "... M=10" take hours."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Methods, by name."""
    data: str | None = None
    """The full MNIST set: openml, or a folder of IDX files."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 5e-4, 3e-3)
    """To choose from, for each task and arm; the likeliest first."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Seeds on which the learning rate is chosen."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that count."""
    reversal_steps: int = 1_500
    """The most steps of a run of reversal."""
    target_error: float = 0.01
    """Error of reversal that counts as learnt."""

    def __post_init__(self) -> None:
        for name in ("tasks", "arms", "learning_rates", "tuning_seeds", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')}: expected at least one.")
        for flag, given, known in (("tasks", self.tasks, (*MNIST, *REVERSAL)), ("arms", self.arms, tuple(ARMS))):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"--{flag} {unknown[0]!r}: expected some of {'; '.join(known)}.")
        if self.reversal_steps < 1:
            raise ValueError(f"--reversal-steps {self.reversal_steps}: expected at least 1.")
        if "mnist, full" in self.tasks and self.data is None:
            raise ValueError("--tasks 'mnist, full' needs --data: openml, or a folder of IDX files.")
        if set(self.tuning_seeds) & set(self.seeds):
            raise ValueError("--tuning-seeds and --seeds share one; the learning rate is chosen on seeds of its own.")
        for arm in self.arms:
            for rate in self.learning_rates:
                Settings(learning_rate=rate, target_error=self.target_error, **ARMS[arm])
        reversal = (any(task in REVERSAL for task in self.tasks), "a reversal among --tasks")
        full = ("mnist, full" in self.tasks, "'mnist, full' among --tasks")
        refuse_idle(self, {"data": full, "reversal_steps": reversal, "target_error": reversal})

    @property
    def runs(self) -> int:
        """Runs, if no learning rate is given up early."""
        tries = len(self.learning_rates) * len(self.tuning_seeds) + len(self.seeds)
        return len(self.tasks) * len(self.arms) * tries

    def run(self, work: Work) -> Rows:
        rows: Rows = []
        for of_arm in work.each(lambda case: self._arm(work, *case), product(self.tasks, self.arms)):
            rows += of_arm
            work.save(rows)
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"runs": rows, "table": budget_results.table(rows)}

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return budget_results.tables(rows)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"budget": budget_results.plot(rows)}

    def _arm(self, work: Work, task: str, arm: str) -> Rows:
        """Tune one arm on one task, then run it with every seed."""
        config, steps = self._task(task)
        batch = config.batch_size if isinstance(config, MnistConfig) else config.prompts * config.answers

        def run_one(rate: float, seed: int, samples: int) -> Record:
            settings = self._settings(task, arm, rate, seed, max(1, samples // batch))
            within = Path("runs", folder_name(task), f"learning-rate-{rate:g}")
            records = work.train(Run(settings, config, within, f"{task}: {arm}, seed {seed}"))
            last = [record["error"] for record in records[-LAST:]]
            return {**summary(records, settings.target_error), "mean_error": float(np.mean(last))}

        samples = steps * batch
        if task in MNIST:
            best = most_accurate(self.learning_rates, self.tuning_seeds, samples, run_one)
        else:
            best = soonest(self.learning_rates, self.tuning_seeds, samples, batch, run_one)
        of_arm = {"task": task, "arm": arm, "learning_rate": best, "measure": "error" if task in MNIST else "steps"}
        return [{**of_arm, **_row(run_one(best, seed, samples), task in MNIST)} for seed in self.seeds]

    def _task(self, task: str) -> tuple[TaskConfig, int]:
        """What it is built from, and the most steps of a run."""
        if task in REVERSAL:
            return REVERSAL[task], self.reversal_steps
        config, steps = MNIST[task]
        return (replace(config, data=self.data or "embedded") if config.data == "full" else config), steps

    def _settings(self, task: str, arm: str, rate: float, seed: int, steps: int) -> Settings:
        ends: dict[str, Any] = {}
        if task in REVERSAL:
            ends = {"evaluate_every": 10, "until_error": self.target_error, "target_error": self.target_error}
        return Settings(learning_rate=rate, seed=seed, steps=steps, **ends, **ARMS[arm])


def _row(record: Record, by_error: bool) -> Record:
    seconds = record["seconds"]
    return {
        "seed": record["seed"],
        "error": record["error"],
        "steps": record["step"],
        "kept": record["backward_samples"] / record["samples"],
        "seconds": seconds["total"],
        "training_seconds": seconds["screen"] + seconds["backward"] + seconds["optimizer"],
        "value": record["mean_error"] if by_error else record["to_target"] and record["to_target"]["step"],
    }
