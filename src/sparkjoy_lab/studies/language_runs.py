"""The runs of the language study: learning rates first, then every arm on every seed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from sparkjoy_lab.studies.language import ARMS, LONGEST, LanguageStudy
from sparkjoy_lab.studies.language_results import DENSE
from sparkjoy_lab.studies.language_tasks import TASKS
from sparkjoy_lab.studies.language_training import train_one
from sparkjoy_lab.studies.study import Rows, Work
from sparkjoy_lab.training.loop import Record


def run(study: LanguageStudy, work: Work) -> Rows:
    """Tune, then run every arm on every seed; finished runs are not run again, and a killed one goes on.

    Args:
        study: what is run.
        work: its folder; `summary.json` there is written after every run, and `runs/` has the records of each.

    Returns:
        One record for each step of the runs that count, with "arm" and "seed".
    """
    return _Runs(study, work).all()


class _Runs:
    def __init__(self, study: LanguageStudy, work: Work) -> None:
        self.study, self.work, self.done = study, work, 0

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
                self.work.save(rows)
            if longer:
                allowed = next(row for row in reversed(rows) if (row["arm"], row["seed"]) == (DENSE, seed))
                of_gate = self.one(longer["arm"], longer["rate"], seed, allowed["seconds"]["total"])
                named = {"arm": longer["name"], "seed": seed, "learning_rate": longer["rate"]}
                rows += [{**named, **row} for row in of_gate]
                self.work.save(rows)
        return rows

    def one(self, arm: str, rate: float, seed: int, until_seconds: float = math.inf) -> list[Record]:
        study = self.study
        long, shares = until_seconds < math.inf, study.share_tokens and arm != DENSE
        name = f"{arm.replace(' ', '-').replace('%', 'pct').replace('|', '')}-{rate:g}-{seed}"
        name += "-long" * long + "-shared" * shares
        steps, every = study.steps * (LONGEST if long else 1), study.evaluate_every * (3 if long else 1)

        def on_step(row: Record) -> None:
            part = row["seconds"]["total"] / until_seconds if long else row["step"] / study.steps
            said = f"{arm}, rate {rate:g}, seed {seed}: step {row['step']}, {row['seconds']['total']:.0f} s"
            said += f", reward {row['reward']:.2f}" if "reward" in row else ""
            self.work.progress(min(1.0, (self.done + part) / study.runs), said)

        records = train_one(
            ARMS[arm] | ({"share_tokens": True} if shares else {}),
            TASKS[study.task],
            self.work.out / "runs" / name,
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
