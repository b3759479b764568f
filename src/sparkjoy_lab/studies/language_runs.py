"""The runs of the language study: learning rates first, then every arm on every seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from sparkjoy_lab.studies.language import ARMS, LONGEST, LanguageStudy, by_seconds
from sparkjoy_lab.studies.language_results import DENSE, LORA, SHARED, dense_of
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
        dense = SHARED if study.share_tokens else DENSE  # which learn alike
        rate, seconds = self.chosen(dense, study.learning_rates)
        rates = dict.fromkeys(study.compared, rate)
        if study.lora:
            rate, _ = self.chosen(LORA, study.lora_learning_rates)
            rates |= {arm: rate for arm in study.compared if dense_of(arm) == LORA}
        for gate in study.tuned:
            rates[by_seconds(gate)], _ = self.chosen(gate, study.learning_rates, seconds)
        rows: list[Record] = []
        for number, seed in enumerate(study.seeds):
            of_seed: dict[str, list[Record]] = {}
            for arm in study.compared:
                if number >= len(study.seeds_of(arm)):
                    continue
                gate, timed = arm.removesuffix(by_seconds("")), arm.endswith(by_seconds(""))
                seconds = of_seed.get(dense, of_seed[DENSE])[-1]["seconds"]["total"] if timed else math.inf
                of_seed[arm] = self.one(gate, rates[arm], seed, study.steps, seconds)
                named = {"arm": arm, "seed": seed, "learning_rate": rates[arm]}
                rows += [{**named, **row} for row in of_seed[arm]]
                self.work.save(rows)
        return rows

    def chosen(self, arm: str, rates: Sequence[float], until_seconds: float = math.inf) -> tuple[float, float]:
        """The learning rate at which an arm learns the most, and that run's seconds; nothing is run for only one."""
        if len(rates) == 1:
            return rates[0], math.inf
        seed, steps = self.study.tuning_seed, self.study.tuning_steps
        runs = {rate: self.one(arm, rate, seed, steps, until_seconds) for rate in rates}
        best = most_learnt(runs)
        return best, runs[best][-1]["seconds"]["total"]

    def one(self, arm: str, rate: float, seed: int, steps: int, until_seconds: float) -> list[Record]:
        study = self.study
        long, shares = until_seconds < math.inf, (study.share_tokens and arm != DENSE) or arm == SHARED
        name = f"{arm.replace(' ', '-').replace('%', 'pct').replace('|', '')}-{rate:g}-{seed}"
        name += "-long" * long + "-shared" * shares
        steps, every = steps * (LONGEST if long else 1), study.evaluate_every * (3 if long else 1)

        def on_step(row: Record) -> None:
            part = row["seconds"]["total"] / until_seconds if long else row["step"] / steps
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
