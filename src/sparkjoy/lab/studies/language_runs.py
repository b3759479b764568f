"""The runs of the language study, and what they come to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkjoy.lab.studies.language import ARMS, DENSE, LONGEST, LanguageStudy
from sparkjoy.lab.studies.language_tasks import TASKS
from sparkjoy.lab.studies.language_training import PARTS, train_one
from sparkjoy.lab.training.folder import opened
from sparkjoy.lab.training.loop import Record
from sparkjoy.lab.training.tracking import write_json

Progress = Callable[[float, str], None]


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
        if study.tunes:
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
        long = until_seconds < math.inf
        name = f"{arm.replace(' ', '-').replace('%', 'pct').replace('|', '')}-{rate:g}-{seed}" + "-long" * long
        steps, every = study.steps * (LONGEST if long else 1), study.evaluate_every * (3 if long else 1)

        def on_step(row: Record) -> None:
            part = row["seconds"]["total"] / until_seconds if long else row["step"] / study.steps
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
            evaluate_every=every,
            until_seconds=until_seconds,
            on_step=on_step,
        )
        self.done += 1
        return records


def most_learnt(runs: dict[float, list[Record]]) -> float:
    """The learning rate with the best mean over all scores, so that soon counts too; among equals the earlier one."""
    return max(runs, key=lambda rate: float(np.mean([row["score"] for row in runs[rate] if "score" in row])))


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
        found["of_shared_prompts"] = float(np.mean([row["of_shared_prompts"] for row in last]))
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
