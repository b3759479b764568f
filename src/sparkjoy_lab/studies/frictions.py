"""Late, broken, corrupted and lucky actors, one at a time and all at once: which method stands what, on token reversal.

Every arm has its own learning rate, chosen where it is hardest, under all frictions at once, on seeds of its own. All
runs take the same steps; what counts is the learner's error on fresh answers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from sparkjoy_lab.studies import frictions_results
from sparkjoy_lab.studies.frictions_results import STRENGTHS
from sparkjoy_lab.studies.runs import Run, folder_name
from sparkjoy_lab.studies.study import Rows, Study, Work
from sparkjoy_lab.studies.tuning import most_accurate
from sparkjoy_lab.tasks.reversal import ReversalConfig, Shaping
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.loop import Record, summary
from sparkjoy_lab.training.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ARMS: dict[str, dict[str, Any]] = {
    "dg": {"method": "dg"},
    "noise 0.3": {"method": "unbiased", "noise": 0.3},
    "price 0": {"method": "kondo", "price": 0.0},
    "hard 10%": {"method": "kondo", "rate": 0.1},
    "hard 3%": {"method": "kondo", "rate": 0.03},
    "uniform 10%": {"method": "uniform", "rate": 0.1},
    "pg": {"method": "pg"},
    "importance": {"method": "importance"},
    "ppo": {"method": "ppo"},
    "pmpo": {"method": "pmpo"},
    "dg of answers": {"method": "dg", "dg_unit": "sample"},
    "noise 0.3 of answers": {"method": "unbiased", "noise": 0.3, "dg_unit": "sample"},
    "noise 0.3, recorded sizes": {"method": "unbiased", "noise": 0.3, "screen": "recorded"},
    "noise 0.3, recorded, floor": {"method": "unbiased", "noise": 0.3, "screen": "recorded", "floor": 0.05},
}
DEFAULT_ARMS = tuple(ARMS)[:10]
"""The others answer single questions."""
Friction = Literal["none", "delay", "bug", "corrupt", "discover", "all"]
MIDDLE = 1
LAST = 3
"""Evaluations at the end whose mean error counts."""


@dataclass(frozen=True)
class FrictionsStudy(Study):
    """Actors that are late, broken, corrupted or lucky: which method stands what, on token reversal."""

    extends = ("prompt_lengths", "frictions", "arms", "seeds")

    full: bool = False
    """Prompts of 5, 10 and 15 tokens, and all frictions at once at three strengths: hours."""
    prompt_lengths: tuple[int, ...] = (5,)
    """H, tokens of a prompt and of an answer; --full has its own."""
    vocab_size: int = 2
    """M, different tokens."""
    shaping: Shaping = "fraction"
    """Reward: fraction of right positions, of those before the first wrong one, or 1 only if all are right."""
    frictions: tuple[Friction, ...] = get_args(Friction)
    """One at a time, and all at once."""
    arms: tuple[str, ...] = DEFAULT_ARMS
    """Methods, by name."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 5e-4)
    """To choose from for each arm and prompt length, under all frictions at once; a single one is taken as it is."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Seeds on which the learning rate is chosen."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that count."""
    steps_per_token: int = 40
    """Optimizer steps of a run, for every token of an answer."""
    target_error: float = 0.01
    """Error that counts as learnt."""

    def __post_init__(self) -> None:
        for name in ("prompt_lengths", "frictions", "arms", "learning_rates", "tuning_seeds", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')}: expected at least one.")
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown:
            raise ValueError(f"--arms {unknown[0]!r}: expected some of {'; '.join(ARMS)}.")
        refuse_idle(self, {"prompt_lengths": (not self.full, "a study without --full, which has its own")})
        if self.steps_per_token < 1:
            raise ValueError(f"--steps-per-token {self.steps_per_token}: expected at least 1.")
        if set(self.tuning_seeds) & set(self.seeds):
            raise ValueError("--tuning-seeds and --seeds share one; the learning rate is chosen on seeds of its own.")
        for length in self.prompt_lengths:
            ReversalConfig(prompt_length=length, vocab_size=self.vocab_size, shaping=self.shaping)
        for arm in self.arms:
            for rate in self.learning_rates:
                Settings(learning_rate=rate, target_error=self.target_error, **ARMS[arm])

    @property
    def lengths(self) -> tuple[int, ...]:
        """H of every part."""
        return (5, 10, 15) if self.full else self.prompt_lengths

    @property
    def cases(self) -> list[tuple[Friction, int]]:
        """Frictions with the number of their strength."""
        several = {"none": (0,), "all": range(3) if self.full else (MIDDLE,)}
        return [(friction, level) for friction in self.frictions for level in several.get(friction, range(3))]

    @property
    def runs(self) -> int:
        """How many there are."""
        tuned = len(self.learning_rates) * len(self.tuning_seeds) if len(self.learning_rates) > 1 else 0
        return len(self.lengths) * len(self.arms) * (tuned + len(self.cases) * len(self.seeds))

    def run(self, work: Work) -> Rows:
        rows: Rows = []
        for length in self.lengths:
            rates = dict(zip(self.arms, work.each(partial(self._tuned, work, length), self.arms), strict=True))
            for seed in self.seeds:
                every = [(length, rates[arm], seed, *case, arm) for case, arm in product(self.cases, self.arms)]
                rows += work.each(lambda run: self._trained(work, *run), every)
                work.save(rows)
        return rows

    def summary(self, rows: Rows) -> dict[str, Any]:
        return {"runs": rows, "table": frictions_results.table(rows)}

    def tables(self, rows: Rows) -> dict[str, DataFrame]:
        return frictions_results.tables(rows)

    def figures(self, rows: Rows) -> dict[str, Figure]:
        return {f"frictions-{length}": frictions_results.plot(rows, length) for length in self.lengths}

    def _tuned(self, work: Work, length: int, arm: str) -> float:
        if len(self.learning_rates) == 1:
            return self.learning_rates[0]

        def run_one(rate: float, seed: int, samples: int) -> Record:
            found = self._trained(work, length, rate, seed, "all", MIDDLE, arm, Path("tuning"))
            return {"mean_error": found["error"]}

        return most_accurate(self.learning_rates, self.tuning_seeds, 0, run_one)

    def _trained(
        self,
        work: Work,
        length: int,
        rate: float,
        seed: int,
        friction: Friction,
        level: int,
        arm: str,
        below: Path = Path(),
    ) -> Record:
        """One run's row."""
        case = f"H={length} {friction}" + ("" if friction == "none" else f" {level + 1}")
        within = below / "runs" / folder_name(f"{case} {arm}") / f"learning-rate-{rate:g}"
        settings, task = self._settings(length, arm, rate, seed), self._task(length, friction, level)
        records = work.train(Run(settings, task, within, f"{case}: {arm}, seed {seed}"))
        end = summary(records, self.target_error)
        errors = [record["error"] for record in records]
        return {
            "prompt_length": length,
            "friction": friction,
            "level": level,
            "strength": STRENGTHS[friction][level] if friction in STRENGTHS else None,
            "arm": arm,
            "seed": seed,
            "learning_rate": rate,
            "error": float(np.mean(errors[-LAST:])),
            "whole_run": float(np.mean(errors)),
            "steps_to_target": end["to_target"] and end["to_target"]["step"],
            "kept": end["backward_samples"] / end["samples"],
            "seconds": end["seconds"]["total"],
        }

    def _task(self, length: int, friction: Friction, level: int) -> ReversalConfig:
        shape: dict[str, Any] = {"vocab_size": self.vocab_size, "shaping": self.shaping}
        return ReversalConfig(prompt_length=length, **shape, **strengths_of(friction, level))

    def _settings(self, length: int, arm: str, rate: float, seed: int) -> Settings:
        steps = self.steps_per_token * length
        return Settings(
            steps=steps,
            evaluate_every=max(1, steps // 10),
            learning_rate=rate,
            seed=seed,
            target_error=self.target_error,
            **ARMS[arm],
        )


def strengths_of(friction: Friction, level: int) -> dict[str, Any]:
    """One friction, or all, at one of three strengths, by their flags.

    >>> strengths_of("bug", 0), strengths_of("all", 1)
    ({'bug': 0.1}, {'delay': 30, 'bug': 0.3, 'corrupt': 0.3, 'discover': 0.03})
    """
    names = tuple(STRENGTHS) if friction == "all" else tuple(name for name in STRENGTHS if name == friction)
    return {name: STRENGTHS[name][level] for name in names}
