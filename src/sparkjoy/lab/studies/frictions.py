"""Late, broken, corrupted and lucky actors, one at a time and all at once: which method stands what, on token reversal.

Every arm has its own learning rate, chosen where it is hardest, under all frictions at once, on seeds of its own. All
runs take the same steps; what counts is the learner's error on fresh answers of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sparkjoy.lab.studies.pareto import OnRun, train_one
from sparkjoy.lab.studies.tuning import most_accurate
from sparkjoy.lab.tasks.reversal import ReversalConfig, ReversalTask, Shaping
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import Record, summary
from sparkjoy.lab.training.settings import Settings
from sparkjoy.lab.training.tracking import write_json

ARMS: dict[str, dict[str, Any]] = {
    "dg": {"method": "dg"},
    "noise 0.3": {"method": "unbiased", "noise": 0.3},
    "price 0": {"method": "kondo", "price": 0.0},
    "hard 10%": {"method": "kondo", "rate": 0.1},
    "hard 3%": {"method": "kondo", "rate": 0.03},
    "pg": {"method": "pg"},
    "importance": {"method": "importance"},
    "ppo": {"method": "ppo"},
    "pmpo": {"method": "pmpo"},
    "dg of answers": {"method": "dg", "dg_unit": "sample"},
    "noise 0.3 of answers": {"method": "unbiased", "noise": 0.3, "dg_unit": "sample"},
    "noise 0.3, recorded sizes": {"method": "unbiased", "noise": 0.3, "screen": "recorded"},
    "noise 0.3, recorded, floor": {"method": "unbiased", "noise": 0.3, "screen": "recorded", "floor": 0.05},
}
DEFAULT_ARMS = tuple(ARMS)[:9]
"""The others answer single questions."""
Friction = Literal["none", "delay", "bug", "corrupt", "discover", "all"]
STRENGTHS: dict[str, tuple[Any, Any, Any]] = {
    "delay": (10, 30, 100),
    "bug": (0.1, 0.3, 0.6),
    "corrupt": (0.1, 0.3, 0.6),
    "discover": (0.01, 0.03, 0.1),
}
MIDDLE = 1
LAST = 3
"""Evaluations at the end whose mean error counts."""


@dataclass(frozen=True)
class FrictionsStudy:
    """Which frictions, how strong, and who has to stand them."""

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


def strengths_of(friction: Friction, level: int) -> dict[str, Any]:
    """One friction, or all, at one of three strengths, by their flags.

    >>> strengths_of("bug", 0), strengths_of("all", 1)
    ({'bug': 0.1}, {'delay': 30, 'bug': 0.3, 'corrupt': 0.3, 'discover': 0.03})
    """
    names = tuple(STRENGTHS) if friction == "all" else tuple(name for name in STRENGTHS if name == friction)
    return {name: STRENGTHS[name][level] for name in names}


def run(study: FrictionsStudy, out: Path, on_run: OnRun | None = None) -> list[Record]:
    """Tune, then run seed by seed; finished runs are not run again. The result is in `out/summary.json` too.

    Returns:
        One record per prompt length, friction, strength, arm and seed.
    """
    rows: list[Record] = []
    with opened(out, asdict(study)):
        for length in study.lengths:
            rates = {arm: _tuned(study, length, arm, out, on_run) for arm in study.arms}
            for seed in study.seeds:
                for friction, level in study.cases:
                    for arm in study.arms:
                        found = _trained(study, length, friction, level, arm, rates[arm], seed, out, on_run)
                        rows.append(found)
                write_json(out / "summary.json", {"runs": rows, "table": table(rows)})
    return rows


def _tuned(study: FrictionsStudy, length: int, arm: str, out: Path, on_run: OnRun | None) -> float:
    if len(study.learning_rates) == 1:
        return study.learning_rates[0]

    def run_one(rate: float, seed: int, samples: int) -> Record:
        found = _trained(study, length, "all", MIDDLE, arm, rate, seed, out / "tuning", on_run)
        return {"mean_error": found["error"]}

    return most_accurate(study.learning_rates, study.tuning_seeds, 0, run_one)


def _trained(
    study: FrictionsStudy,
    length: int,
    friction: Friction,
    level: int,
    arm: str,
    rate: float,
    seed: int,
    out: Path,
    on_run: OnRun | None,
) -> Record:
    shape: dict[str, Any] = {"vocab_size": study.vocab_size, "shaping": study.shaping}
    config = ReversalConfig(prompt_length=length, **shape, **strengths_of(friction, level))
    strength = STRENGTHS[friction][level] if friction in STRENGTHS else None
    name = f"H={length} {friction}" + ("" if friction == "none" else f" {level + 1}")
    steps = study.steps_per_token * length
    settings = Settings(
        steps=steps,
        evaluate_every=max(1, steps // 10),
        learning_rate=rate,
        seed=seed,
        target_error=study.target_error,
        **ARMS[arm],
    )
    named = None if on_run is None else (lambda _, of_run: on_run(f"{name}: {arm}, seed {seed}", of_run))
    case = f"{name} {arm}".replace(" ", "-").replace("%", "pct").replace(",", "")
    folder = out / "runs" / case / f"learning-rate-{rate:g}"
    records = train_one(settings, ReversalTask(config), folder, asdict(config), named)
    end = summary(records, study.target_error)
    errors = [record["error"] for record in records]
    return {
        "prompt_length": length,
        "friction": friction,
        "level": level,
        "strength": strength,
        "arm": arm,
        "seed": seed,
        "learning_rate": rate,
        "error": float(np.mean(errors[-LAST:])),
        "whole_run": float(np.mean(errors)),
        "steps_to_target": end["to_target"] and end["to_target"]["step"],
        "kept": end["backward_samples"] / end["samples"],
        "seconds": end["seconds"]["total"],
    }


def table(rows: list[Record]) -> list[Record]:
    """Of every case and arm, means over seeds, and over those of dg where that ran; the median of steps to the target.

    `of_dg` is the ratio of the errors at the end, `whole_run_of_dg` that of the mean errors of all evaluations, which
    also tells arms apart that both end at none.
    """
    keys = ("prompt_length", "friction", "level")
    result: list[Record] = []
    for *case, arm in dict.fromkeys((*(row[key] for key in keys), row["arm"]) for row in rows):
        mine = _of(rows, case, arm)
        dense = _of(rows, case, "dg")
        errors = [row["error"] for row in mine]
        steps = [row["steps_to_target"] for row in mine if row["steps_to_target"] is not None]
        found = {
            **{key: mine[0][key] for key in (*keys, "strength", "arm", "learning_rate")},
            "seeds": len(mine),
            "error": float(np.mean(errors)),
            "sd": float(np.std(errors, ddof=1)) if len(errors) > 1 else None,
            "whole_run": float(np.mean([row["whole_run"] for row in mine])),
            "solved": len(steps),
            "steps": float(np.median(steps)) if 2 * len(steps) > len(mine) else None,
            "kept": float(np.mean([row["kept"] for row in mine])),
        }
        for key, ratio in (("error", "of_dg"), ("whole_run", "whole_run_of_dg")):
            other = float(np.mean([row[key] for row in dense])) if dense else 0.0
            found[ratio] = found[key] / other if other else None
        result.append(found)
    return result


def _of(rows: list[Record], case: list[Any], arm: str) -> list[Record]:
    keys = ("prompt_length", "friction", "level")
    return [row for row in rows if [row[key] for key in keys] == case and row["arm"] == arm]
