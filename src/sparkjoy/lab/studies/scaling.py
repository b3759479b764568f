"""How long a prompt each method can learn to reverse within a budget: of answers, backward tokens, or seconds.

Every method gets its best learning rate, chosen for each prompt length on seeds of their own. A method that no seed
brings to the target at one length is not tried at longer ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparkjoy.lab.studies.pareto import OnRun, train_one
from sparkjoy.lab.studies.tuning import soonest
from sparkjoy.lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import Record, summary
from sparkjoy.lab.training.settings import Settings
from sparkjoy.lab.training.tracking import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS: dict[str, dict[str, Any]] = {
    "pg": {"method": "pg"},
    "ppo": {"method": "ppo"},
    "pmpo": {"method": "pmpo"},
    "dg": {"method": "dg"},
    "kondo 3%": {"method": "kondo", "rate": 0.03},
    "kondo 10%": {"method": "kondo", "rate": 0.1},
    "kondo price 0": {"method": "kondo", "price": 0.0},
    "uniform 3%": {"method": "uniform", "rate": 0.03},
}
BUDGETS = {"answers": "answers sampled", "backward_tokens": "tokens differentiated", "seconds": "seconds, all included"}


@dataclass(frozen=True)
class ScalingStudy:
    """Which prompt lengths, methods and budgets."""

    prompt_lengths: tuple[int, ...] = (5, 10, 15, 20)
    """H, in rising order."""
    vocab_size: int = 2
    """M, different tokens."""
    width: int = ReversalConfig.width
    """Width of the transformer; its feed-forward parts are twice as wide."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Methods, by name."""
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 2e-3, 3e-3)
    """To choose from, for each method and length."""
    tuning_seeds: tuple[int, ...] = (100,)
    """Seeds on which the learning rate is chosen."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds that count."""
    answers: int = 40_000
    """Largest budget: answers sampled in a run."""
    target_error: float = 0.01
    """Error at which a length counts as solved."""
    evaluate_every: int = 10
    """Steps between evaluations."""

    def __post_init__(self) -> None:
        for name in ("prompt_lengths", "arms", "learning_rates", "tuning_seeds", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')}: expected at least one.")
        if self.answers < 1:
            raise ValueError(f"--answers {self.answers}: expected at least 1.")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"--arms {unknown[0]!r}: expected some of {', '.join(ARMS)}.")
        if list(self.prompt_lengths) != sorted(set(self.prompt_lengths)):
            raise ValueError(f"--prompt-lengths {self.prompt_lengths}: expected different lengths in rising order.")
        if set(self.tuning_seeds) & set(self.seeds):
            raise ValueError("--tuning-seeds and --seeds share one; the learning rate is chosen on seeds of its own.")
        for length in self.prompt_lengths:
            self.task(length)
        for arm in self.arms:
            for rate in self.learning_rates:
                self.settings(arm, rate, 0)

    def task(self, length: int) -> ReversalConfig:
        """The task at one length."""
        return ReversalConfig(
            prompt_length=length, vocab_size=self.vocab_size, width=self.width, feed_forward=2 * self.width
        )

    def settings(self, arm: str, learning_rate: float, seed: int) -> Settings:
        """One run, stopped at the target or at the end of the budget."""
        return Settings(
            learning_rate=learning_rate,
            seed=seed,
            steps=max(1, self.answers // (ReversalConfig.prompts * ReversalConfig.answers)),
            evaluate_every=self.evaluate_every,
            until_error=self.target_error,
            target_error=self.target_error,
            **ARMS[arm],
        )


def run(study: ScalingStudy, out: Path, on_run: OnRun | None = None) -> list[Record]:
    """Tune, then run; finished runs are not run again. The result is in `out/summary.json` too.

    Returns:
        One record per method, length and seed that counts: what the target took, or null where it was not reached.
    """
    with opened(out, asdict(study)):
        return _run(study, out, on_run)


def _run(study: ScalingStudy, out: Path, on_run: OnRun | None) -> list[Record]:
    rows: list[Record] = []
    solving = dict.fromkeys(study.arms, True)
    best: dict[str, float] = {}
    for length in study.prompt_lengths:
        for arm in [name for name in study.arms if solving[name]]:
            # The best of the length before comes first: the sooner one is good, the sooner the others have lost.
            rates = _first(study.learning_rates, best.get(arm))
            of_arm = _arm_at_length(study, arm, length, rates, out, on_run)
            best[arm] = of_arm[0]["learning_rate"]
            solving[arm] = any(row["answers"] is not None for row in of_arm)
            rows += of_arm
            write_json(out / "summary.json", {"runs": rows, "longest": longest(rows)})
    return rows


def longest(rows: list[Record], budgets: int = 24) -> list[Record]:
    """The longest prompt that all seeds solved within a budget, for a range of budgets of each kind."""
    result = []
    for kind in BUDGETS:
        costs = [row[kind] for row in rows if row[kind] is not None]
        if not costs:
            continue
        for budget in np.geomspace(min(costs), max(costs), budgets).tolist():
            for arm in dict.fromkeys(row["arm"] for row in rows):
                solved = [0]
                for length in dict.fromkeys(row["prompt_length"] for row in rows if row["arm"] == arm):
                    seeds = [row for row in rows if row["arm"] == arm and row["prompt_length"] == length]
                    if all(row[kind] is not None and row[kind] <= budget * (1 + 1e-9) for row in seeds):
                        solved.append(length)
                result.append({"budget": kind, "amount": budget, "arm": arm, "prompt_length": max(solved)})
    return result


def plot(rows: list[Record]) -> Figure:
    """What the target took against the prompt length, in answers, backward tokens and seconds: means and seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    axes = figure.subplots(1, len(BUDGETS))
    for axis, (kind, label) in zip(axes, BUDGETS.items(), strict=True):
        for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows)):
            solved = [row for row in rows if row["arm"] == arm and row[kind] is not None]
            failed = {row["prompt_length"] for row in rows if row["arm"] == arm and row[kind] is None}
            lengths = sorted({row["prompt_length"] for row in solved} - failed)
            means = [np.mean([row[kind] for row in solved if row["prompt_length"] == length]) for length in lengths]
            axis.plot(lengths, means, "-", color=f"C{number}", label=arm)
            axis.plot([row["prompt_length"] for row in solved], [row[kind] for row in solved], ".", color=f"C{number}")
        axis.set(xlabel="prompt length H", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
    figure.suptitle(
        "token reversal: what 1% error takes, each method at its best learning rate. "
        "Dots: seeds that got there; lines: means where all did"
    )
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _arm_at_length(
    study: ScalingStudy, arm: str, length: int, rates: list[float], out: Path, on_run: OnRun | None
) -> list[Record]:
    """The rows of one method at one length, at the best of `rates`; among equals the earlier one."""
    config = study.task(length)
    task = ReversalTask(config)
    batch = config.prompts * config.answers

    def run_one(learning_rate: float, seed: int, answers: int) -> Record:
        settings = replace(study.settings(arm, learning_rate, seed), steps=max(1, answers // batch))
        folder = out / f"length-{length}" / f"learning-rate-{learning_rate:g}"
        named = None if on_run is None else _named(on_run, f"H={length} lr={learning_rate:g} ")
        return summary(train_one(settings, task, folder, asdict(config), named), study.target_error)

    best = soonest(rates, study.tuning_seeds, study.answers, batch, run_one)
    of_arm = {"arm": arm, "prompt_length": length, "learning_rate": best}
    return [{**of_arm, **_row(run_one(best, seed, study.answers))} for seed in study.seeds]


def _row(record: Record) -> Record:
    """What a run that counts spent, and what the target took: the same, or null where it was not reached."""
    seconds = record["seconds"]
    spent = {
        "answers": record["samples"],
        "backward_tokens": record["backward_tokens"],
        "training_seconds": seconds["screen"] + seconds["backward"] + seconds["optimizer"],
        "seconds": seconds["total"],
    }
    solved = record["to_target"] is not None
    return {
        "seed": record["seed"],
        "error": record["error"],
        **{name: value if solved else None for name, value in spent.items()},
        "spent": spent,
    }


def _first(rates: tuple[float, ...], chosen: float | None) -> list[float]:
    return sorted(rates, key=lambda rate: rate != chosen)


def _named(on_run: OnRun, prefix: str) -> OnRun:
    return lambda name, settings: on_run(prefix + name, settings)
