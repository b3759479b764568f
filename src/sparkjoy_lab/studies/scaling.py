"""How long a prompt each method can learn to reverse within a budget: of answers, backward tokens, or seconds.

Every method gets its best learning rate, chosen for each prompt length on seeds of their own. A method that no seed
brings to the target at one length is not tried at longer ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkjoy_lab.studies import scaling_results
from sparkjoy_lab.studies.runs import Run
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.studies.tuning import soonest
from sparkjoy_lab.tasks.reversal import ReversalConfig
from sparkjoy_lab.training.loop import Record, summary
from sparkjoy_lab.training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

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


@dataclass(frozen=True)
class ScalingStudy(Study):
    """The longest prompt each method learns to reverse within a budget, each at its best learning rate."""

    extends = ("prompt_lengths", "arms", "seeds")

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

    @property
    def runs(self) -> int:
        """Runs, if no learning rate is given up early and no method fails."""
        tries = len(self.learning_rates) * len(self.tuning_seeds) + len(self.seeds)
        return len(self.arms) * len(self.prompt_lengths) * tries

    def run(self, work: Work) -> Rows:
        rows: Rows = []
        best: dict[str, float] = {}
        solving = list(self.arms)
        for length in self.prompt_lengths:

            def at_length(arm: str, length: int = length) -> Rows:
                # The best of the length before comes first: the sooner one is good, the sooner the others have lost.
                rates = sorted(self.learning_rates, key=lambda rate: rate != best.get(arm))
                return self._arm_at_length(work, arm, length, rates)

            for arm, of_arm in zip(list(solving), work.each(at_length, list(solving)), strict=True):
                best[arm] = of_arm[0]["learning_rate"]
                if all(row["answers"] is None for row in of_arm):
                    solving.remove(arm)
                rows += of_arm
                work.save(rows)
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"runs": rows, "longest": scaling_results.longest(rows)}

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return scaling_results.tables(rows)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {"scaling": scaling_results.plot(rows)}

    def _arm_at_length(self, work: Work, arm: str, length: int, rates: list[float]) -> Rows:
        """The rows of one method at one length, at the best of `rates`; among equals the earlier one."""
        task = self.task(length)
        batch = task.prompts * task.answers

        def run_one(rate: float, seed: int, answers: int) -> Record:
            settings = replace(self.settings(arm, rate, seed), steps=max(1, answers // batch))
            within = Path(f"length-{length}", f"learning-rate-{rate:g}")
            records = work.train(Run(settings, task, within, f"H={length} lr={rate:g} {arm}, seed {seed}"))
            return summary(records, self.target_error)

        best = soonest(rates, self.tuning_seeds, self.answers, batch, run_one)
        of_arm = {"arm": arm, "prompt_length": length, "learning_rate": best}
        return [{**of_arm, **_row(run_one(best, seed, self.answers))} for seed in self.seeds]


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
