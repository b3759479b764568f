"""A pre-trained language model learns with TRL's trainer: every gate beside TRL's own, in seconds.

The learning rate is chosen for TRL's own, and every arm takes it. That of one gate is chosen once more, by what it
scores after as many seconds as TRL's own takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkjoy.studies.language_tasks import TASKS
from sparkjoy.studies.language_training import PARTS, train_one
from sparkjoy.training.folder import opened
from sparkjoy.training.loop import Record
from sparkjoy.training.tracking import write_json

DENSE = "TRL's own"
ARMS: dict[str, dict[str, Any]] = {
    DENSE: {},
    "noise 0.3": {"gate_noise": 0.3},
    "delight 15%": {"gate_rate": 0.15},
    "|advantage| 15%": {"gate_rate": 0.15, "gate_score": "absolute-advantage"},
    "max variance": {"gate_rate": 0.25, "max_variance": True},
    "uniform 15%": {"gate_rate": 0.15, "gate_score": "uniform"},
    "delight 25%": {"gate_rate": 0.25},
    "zero advantages dropped": {"gate_price": 0.0, "gate_score": "absolute-advantage"},
    "noise 1": {"gate_noise": 1.0},
    "positive only": {"gate_price": 0.0},
    "noise 0.3, twice the answers": {"gate_noise": 0.3, "group": 16},
}
"""|advantage|: CPPO's rule (arXiv 2503.22342). Max variance: PODS (arXiv 2504.13818), 2 of 8 answers to a prompt."""
LONGEST = 10
"""Times the steps of a run that one may take which ends by its seconds."""
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class LanguageStudy:
    """Which task and arms."""

    task: str = "sums"
    """What is learnt: sums, sentences (without the letter e; partial credit, 40 tokens) or gym (of reasoning-gym)."""
    arms: tuple[str, ...] = tuple(ARMS)
    """What is compared, by name; TRL's own is always among them."""
    model: str | None = None
    """A causal language model's folder or name on the hub; without it SmolLM2-135M-Instruct."""
    steps: int = 24
    """Optimizer steps of a run."""
    prompts: int = 8
    """Prompts of a step."""
    group: int = 8
    """Answers to each prompt."""
    micro_batch: int = 32
    """Rows of a forward and backward pass."""
    bf16: bool = True
    """Mixed precision, as TRL has it by default; --no-bf16 for float32 throughout."""
    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-6)
    """To choose from, for TRL's own; the likeliest first."""
    tuned: str | None = "noise 0.3"
    """The gate whose learning rate is chosen once more, at the seconds of TRL's own; "none" for none."""
    tuning_seed: int = 100
    """The seed on which learning rates are chosen."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that count."""
    held_out: int = 500
    """Problems that are scored and never trained on."""
    evaluate_every: int = 3
    """Steps between two scores."""
    threads: int = 1
    """Threads of torch."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"--task {self.task!r}: expected one of {', '.join(TASKS)}.")
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown:
            raise ValueError(f"--arms {unknown[0]!r}: expected some of {'; '.join(ARMS)}.")
        if self.tuned not in (*ARMS, None, "none") or self.tuned == DENSE:
            raise ValueError(f"--tuned {self.tuned!r}: expected one of {'; '.join([*ARMS][1:])}; or none.")
        for name in ("arms", "learning_rates", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"--{name.replace('_', '-')}: expected at least one, and none twice.")
        for name in ("steps", "prompts", "group", "micro_batch", "held_out", "evaluate_every", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1.")
        if self.prompts * self.group % self.micro_batch:
            raise ValueError(
                f"--micro-batch {self.micro_batch}: expected a divisor of a step's {self.prompts * self.group} answers."
            )
        if self.tuning_seed in self.seeds:
            raise ValueError("--tuning-seed is one of --seeds; the learning rate is chosen on a seed of its own.")

    @property
    def runs(self) -> int:
        """How many there will be."""
        arms = len({DENSE, *self.arms}) + self._tunes
        return len(self.learning_rates) * (1 + self._tunes) + len(self.seeds) * arms

    @property
    def _tunes(self) -> bool:
        return self.tuned not in (None, "none")


def run(study: LanguageStudy, out: Path, progress: Progress | None = None) -> list[Record]:
    """Tune, then run every arm on every seed; finished runs are not run again, and a killed one goes on.

    Args:
        study: what is run.
        out: folder; `summary.json` there is written after every run, and `runs/` has the records of each.
        progress: `(fraction done, what goes on)`.

    Returns:
        One record for each step of the runs that count, with "arm" and "seed".
    """
    with opened(out, asdict(study)):
        return _Runs(study, out, progress or (lambda done, what: None)).all()


class _Runs:
    def __init__(self, study: LanguageStudy, out: Path, progress: Progress) -> None:
        self.study, self.out, self.progress, self.done = study, out, progress, 0

    def all(self) -> list[Record]:
        study = self.study
        torch.set_num_threads(study.threads)
        tuning = {rate: self.one(DENSE, rate, study.tuning_seed) for rate in study.learning_rates}
        best = most_learnt(tuning)
        longer: dict[str, Any] = {}
        if study._tunes:
            allowed = tuning[best][-1]["seconds"]["total"]
            gate = {rate: self.one(study.tuned, rate, study.tuning_seed, allowed) for rate in study.learning_rates}
            longer = {"name": f"{study.tuned}, as many seconds", "arm": study.tuned, "rate": most_learnt(gate)}
        rows: list[Record] = []
        for seed in study.seeds:
            for arm in dict.fromkeys([DENSE, *study.arms]):
                rows += [{"arm": arm, "seed": seed, "learning_rate": best, **row} for row in self.one(arm, best, seed)]
                self.write(rows)
            if longer:
                allowed = next(row for row in reversed(rows) if (row["arm"], row["seed"]) == (DENSE, seed))
                of_gate = self.one(longer["arm"], longer["rate"], seed, allowed["seconds"]["total"])
                named = {"arm": longer["name"], "seed": seed, "learning_rate": longer["rate"]}
                rows += [{**named, **row} for row in of_gate]
                self.write(rows)
        return rows

    def write(self, rows: list[Record]) -> None:
        write_json(self.out / "summary.json", {"table": table(rows, TASKS[self.study.task].target), "steps": rows})

    def one(self, arm: str, rate: float, seed: int, until_seconds: float = math.inf) -> list[Record]:
        study = self.study
        name = f"{arm.replace(' ', '-').replace('%', 'pct').replace('|', '')}-{rate:g}-{seed}"
        if until_seconds < math.inf:
            name += "-long"
        steps = study.steps if until_seconds == math.inf else LONGEST * study.steps

        def on_step(row: Record) -> None:
            part = row["step"] / study.steps if until_seconds == math.inf else row["seconds"]["total"] / until_seconds
            said = f"{arm}, rate {rate:g}, seed {seed}: step {row['step']}, {row['seconds']['total']:.0f} s"
            said += f", reward {row['reward']:.2f}" if "reward" in row else ""
            self.progress(min(1.0, (self.done + part) / study.runs), said)

        records = train_one(
            ARMS[arm],
            TASKS[study.task],
            self.out / "runs" / name,
            model=study.model,
            seed=seed,
            steps=steps,
            learning_rate=rate,
            prompts=study.prompts,
            group=study.group,
            micro_batch=study.micro_batch,
            bf16=study.bf16,
            held_out=study.held_out,
            evaluate_every=study.evaluate_every,
            until_seconds=until_seconds,
            on_step=on_step,
        )
        self.done += 1
        return records


def most_learnt(runs: dict[float, list[Record]]) -> float:
    """The learning rate with the best mean of the last two scores; among equals the earlier one."""
    return max(runs, key=lambda rate: float(np.mean([row["score"] for row in runs[rate] if "score" in row][-2:])))


def table(rows: list[Record], target: float) -> list[Record]:
    """Of every arm: scores, and steps, seconds and tokens to the target, means over seeds; None where a seed failed.

    The target is reached where the line between two scores crosses it.
    """
    result: list[Record] = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        runs = by_seed(rows, arm)
        final = [runs[seed][-1]["score"] for seed in runs]
        last = [run[-1] for run in runs.values()]
        found: Record = {
            "arm": arm,
            "learning_rate": last[0]["learning_rate"],
            "seeds": len(runs),
            "score": float(np.mean(final)),
            "standard_error": float(np.std(final, ddof=1) / len(final) ** 0.5) if len(final) > 1 else None,
            "kept": float(np.mean([row.get("kept", 1.0) for run in runs.values() for row in run[1:]])),
            "steps": float(np.mean([row["step"] for row in last])),
            "backward_tokens": float(np.mean([row["backward_tokens"] for row in last])),
            "seconds_a_step": {
                part: float(np.mean([row["seconds"][part] / row["step"] for row in last])) for part in (*PARTS, "total")
            },
        }
        reached = [crossing(run, target) for run in runs.values()]
        for name in ("step", "seconds", "backward_tokens"):
            to_target = [at[name] for at in reached if at is not None]
            found[f"{name}_to_target"] = float(np.mean(to_target)) if len(to_target) == len(reached) else None
            dense = found if arm == DENSE else result[0]
            known = None not in (found[f"{name}_to_target"], dense[f"{name}_to_target"])
            found[f"{name}_of_dense"] = found[f"{name}_to_target"] / dense[f"{name}_to_target"] if known else None
        result.append(found)
    return result


def by_seed(rows: list[Record], arm: str) -> dict[int, list[Record]]:
    """The records of an arm's runs."""
    mine = [row for row in rows if row["arm"] == arm]
    return {seed: [row for row in mine if row["seed"] == seed] for seed in dict.fromkeys(row["seed"] for row in mine)}


def crossing(run: list[Record], target: float) -> dict[str, float] | None:
    """Step, seconds and tokens at which the line through the scores first reaches the target; None if it never does."""
    scored = [row for row in run if "score" in row]
    for before, after in zip([scored[0], *scored], scored, strict=False):
        if after["score"] >= target:
            rise = after["score"] - before["score"]
            part = (target - before["score"]) / rise if rise > 0 else 0.0
            costs = [
                {"step": row["step"], "seconds": row["seconds"]["total"], "backward_tokens": row["backward_tokens"]}
                for row in (before, after)
            ]
            return {name: costs[0][name] + max(0.0, part) * (costs[1][name] - costs[0][name]) for name in costs[0]}
    return None
