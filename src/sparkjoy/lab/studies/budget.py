"""One noise budget everywhere, against fixed rates and against rates that move but keep the hard gate's bias.

Every arm gets its best learning rate on each task, chosen on seeds of its own. On MNIST all arms take the same steps
and the error counts; on reversal they run to the target error and the steps count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparkjoy.lab.studies.pareto import OnRun, train_one
from sparkjoy.lab.studies.tuning import most_accurate, soonest
from sparkjoy.lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy.lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import Record, summary
from sparkjoy.lab.training.settings import Settings
from sparkjoy.lab.training.tracking import write_json

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
class BudgetStudy:
    """Which tasks and arms."""

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
                Settings(learning_rate=rate, **ARMS[arm])

    @property
    def most_runs(self) -> int:
        """Runs, if no learning rate is given up early."""
        tries = len(self.learning_rates) * len(self.tuning_seeds) + len(self.seeds)
        return len(self.tasks) * len(self.arms) * tries


def run(study: BudgetStudy, out: Path, on_run: OnRun | None = None) -> list[Record]:
    """Tune, then run; finished runs are not run again. The result is in `out/summary.json` too.

    Returns:
        One record per task, arm and seed that counts.
    """
    with opened(out, asdict(study)):
        return _run(study, out, on_run)


def _run(study: BudgetStudy, out: Path, on_run: OnRun | None) -> list[Record]:
    rows: list[Record] = []
    for name in study.tasks:
        for arm in study.arms:
            rows += _mnist(study, name, arm, out, on_run) if name in MNIST else _reversal(study, name, arm, out, on_run)
            write_json(out / "summary.json", {"runs": rows, "table": table(rows)})
    return rows


def table(rows: list[Record]) -> list[Record]:
    """Of every task and arm: means over seeds, and over those of dg where that ran; None where a seed failed."""
    result: list[Record] = []
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        values = [row["value"] for row in mine]
        solved = all(value is not None for value in values)
        kept = float(np.mean([row["kept"] for row in mine]))
        found = {
            "task": task,
            "arm": arm,
            "learning_rate": mine[0]["learning_rate"],
            "measure": mine[0]["measure"],
            "value": float(np.mean(values)) if solved else None,
            "sd": float(np.std(values, ddof=1)) if solved and len(values) > 1 else None,
            "solved": sum(value is not None for value in values),
            "seeds": len(mine),
            "kept": kept,
            "seconds": float(np.mean([row["seconds"] for row in mine])) if solved else None,
        }
        dense = next((row for row in [*result, found] if (row["task"], row["arm"]) == (task, "dg")), None)
        for name in ("value", "seconds"):
            known = dense is not None and found[name] is not None and dense[name] is not None
            found[f"{name}_of_dg"] = found[name] / dense[name] if known and dense is not None else None
        result.append(found)
    return result


def _mnist(study: BudgetStudy, name: str, arm: str, out: Path, on_run: OnRun | None) -> list[Record]:
    config, steps = MNIST[name]
    config = replace(config, data=study.data or "embedded") if config.data == "full" else config
    task = MnistTask(config)

    def run_one(learning_rate: float, seed: int, samples: int) -> Record:
        settings = Settings(learning_rate=learning_rate, seed=seed, steps=samples // config.batch_size, **ARMS[arm])
        return _trained(settings, task, name, out, asdict(config), on_run)

    samples = steps * config.batch_size
    best = most_accurate(study.learning_rates, study.tuning_seeds, samples, run_one)
    of_arm = {"task": name, "arm": arm, "learning_rate": best, "measure": "error"}
    runs = [run_one(best, seed, samples) for seed in study.seeds]
    return [{**of_arm, **_row(record), "value": record["mean_error"]} for record in runs]


def _reversal(study: BudgetStudy, name: str, arm: str, out: Path, on_run: OnRun | None) -> list[Record]:
    config = REVERSAL[name]
    task = ReversalTask(config)
    batch = config.prompts * config.answers

    def run_one(learning_rate: float, seed: int, samples: int) -> Record:
        target = study.target_error
        settings = Settings(
            learning_rate=learning_rate,
            seed=seed,
            steps=max(1, samples // batch),
            evaluate_every=10,
            until_error=target,
            target_error=target,
            **ARMS[arm],
        )
        return _trained(settings, task, name, out, asdict(config), on_run)

    samples = study.reversal_steps * batch
    best = soonest(study.learning_rates, study.tuning_seeds, samples, batch, run_one)
    of_arm = {"task": name, "arm": arm, "learning_rate": best, "measure": "steps"}
    runs = [run_one(best, seed, samples) for seed in study.seeds]
    return [{**of_arm, **_row(r), "value": r["to_target"] and r["to_target"]["step"]} for r in runs]


def _trained(
    settings: Settings, task: Any, name: str, out: Path, task_config: dict[str, Any], on_run: OnRun | None
) -> Record:
    folder = out / "runs" / name.replace(", ", "-").replace(" ", "-").replace("%", "pct")
    named = None if on_run is None else (lambda run_name, of_run: on_run(f"{name}: {run_name}", of_run))
    records = train_one(settings, task, folder / f"learning-rate-{settings.learning_rate:g}", task_config, named)
    last = [record["error"] for record in records[-LAST:]]
    return {**summary(records, settings.target_error), "mean_error": float(np.mean(last))}


def _row(record: Record) -> Record:
    seconds = record["seconds"]
    return {
        "seed": record["seed"],
        "error": record["error"],
        "steps": record["step"],
        "kept": record["backward_samples"] / record["samples"],
        "seconds": seconds["total"],
        "training_seconds": seconds["screen"] + seconds["backward"] + seconds["optimizer"],
    }
