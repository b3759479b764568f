"""Learning with TRL's GRPOTrainer, gated and not: the same verifiable task from random weights, several seeds.

    python benchmarks/trl_learning.py --out out/trl_learning

Copy a few digits, with partial credit (benchmarks/trl_task.py). A run ends at the target reward, or after the steps.
One file for each finished run, so that a study that was stopped goes on; then a table, and a figure of the reward
against steps, tokens differentiated and seconds.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from typing import Any

import torch
import trl_task
from transformers import TrainerCallback

from sparkjoy.integrations.trl import KondoGRPOTrainer
from sparkjoy_lab.bench import timing
from sparkjoy_lab.bench.timing import print_table
from sparkjoy_lab.studies.drawing import legend, panels
from sparkjoy_lab.training.tracking import read_json, save_figure, write_json

ARMS: dict[str, dict[str, Any]] = {
    "TRL's own": {},
    "zero advantages dropped": {"gate_price": 0.0, "gate_score": "absolute-advantage"},
    "noise 0.3": {"gate_noise": 0.3},
    "noise 1": {"gate_noise": 1.0},
    "noise 0.3 by length": {"gate_noise": 0.3, "gate_log_probs": "none"},
    "uniform 10%": {"gate_rate": 0.1, "gate_score": "uniform"},
    "gate 10%": {"gate_rate": 0.1},
    "gate 25%": {"gate_rate": 0.25},
    "gate 10%, a quarter negative": {"gate_rate": 0.1, "gate_negative_share": 0.25},
    "gate 25%, a quarter negative": {"gate_rate": 0.25, "gate_negative_share": 0.25},
}
DRAWN = ("TRL's own", "noise 0.3", "gate 25%", "gate 10%", "uniform 10%")
"""Five can be told apart."""
COSTS = ("step", "backward_tokens", "seconds")
COLUMNS = {"kept": "7.1%", "reward": "8.3f", "least": "7.3f", "step": "6.0f", "backward_tokens": "16,.0f"}
COLUMNS |= {"seconds": "9.1f"}
WINDOW = 10
"""Steps that a reported reward is the mean of."""


class Counting(KondoGRPOTrainer):
    """Counts the tokens, prompts included, of rows that are differentiated."""

    backward_tokens = 0

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.is_grad_enabled():
            self.backward_tokens += int(attention_mask.sum())
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )


class Record(TrainerCallback):  # type: ignore[misc]  # transformers' is untyped
    """Reward, tokens differentiated and CPU seconds after every step; stops the run at the target."""

    def __init__(self, target: float) -> None:
        self.target = target
        self.trainer: Any = None
        self.rows: list[dict[str, float]] = []
        self.start = time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "reward" in logs:
            self.rows.append(
                {
                    "step": state.global_step,
                    "reward": logs["reward"],
                    "backward_tokens": self.trainer.backward_tokens,
                    "seconds": time.process_time() - self.start,
                    "kept_rate": logs.get("gate/kept_rate", 1.0),
                }
            )
            if len(self.rows) >= WINDOW and smoothed(self.rows)[-1] >= self.target:
                control.should_training_stop = True


def run(arm: dict[str, Any], seed: int, steps: int, target: float) -> list[dict[str, float]]:
    """The records of one training run, until its reward is `target`, for at most `steps` steps."""
    record = Record(target)
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "per_device_train_batch_size": 32,
            "gradient_accumulation_steps": 4,
            "num_generations": 16,
            "max_completion_length": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": steps,
            "seed": seed,
        }
        model, prompts = trl_task.model(64, 2, seed, 4), trl_task.prompts(2000, 3, 3, seed, digits="01234")
        given = {"model": model, "reward_funcs": trl_task.copied, "callbacks": [record]}
        trainer = trl_task.trainer(Counting, folder, options | arm, prompts, **given)
        record.trainer = trainer
        record.start = time.process_time()
        trainer.train()
    return record.rows


def smoothed(rows: list[dict[str, float]]) -> list[float]:
    """The mean reward of the last `WINDOW` steps, at every step."""
    rewards = [row["reward"] for row in rows]
    return [statistics.fmean(rewards[max(0, end - WINDOW) : end]) for end in range(1, len(rewards) + 1)]


def table(runs: dict[str, list[list[dict[str, float]]]], target: float) -> list[dict[str, Any]]:
    """Of every arm: the reward in the end, and when the target was first reached, over its seeds."""
    rows = []
    for name, seeds in runs.items():
        final, reached = [], []
        for records in seeds:
            rewards = smoothed(records)
            final.append(rewards[-1])
            reached += [record for record, reward in zip(records, rewards, strict=True) if reward >= target][:1]
        by_all = len(reached) == len(seeds)
        to_target = {of: statistics.median(at[of] for at in reached) if by_all else None for of in COSTS}
        rows.append(
            {
                "arm": name,
                "seeds": len(seeds),
                "reward": statistics.fmean(final),
                "least": min(final),
                "reached": len(reached),
                "kept": statistics.fmean(record["kept_rate"] for records in seeds for record in records),
                **to_target,
            }
        )
    return rows


def figure(runs: dict[str, list[list[dict[str, float]]]], target: float) -> Any:
    """Reward against steps, tokens differentiated and seconds: the mean over seeds, and each seed faintly."""
    drawing, axes = panels(1, len(COSTS), 3.6, sharey=True)
    drawn = [name for name in DRAWN if name in runs] or list(runs)
    for number, (name, seeds) in enumerate((name, runs[name]) for name in drawn):
        color = f"C{number}"
        rewards = [smoothed(records) for records in seeds]
        mean = [statistics.fmean(values) for values in zip(*rewards, strict=False)]  # as far as all seeds go
        for axis, cost in zip(axes, COSTS, strict=True):
            for records, values in zip(seeds, rewards, strict=True):
                axis.plot([record[cost] for record in records], values, color=color, alpha=0.25, linewidth=0.7)
            costs = [statistics.fmean(record[cost] for record in at) for at in zip(*seeds, strict=False)]
            axis.plot(costs, mean, color=color, label=name)
    for axis, label in zip(axes, ("optimizer steps", "tokens differentiated", "CPU seconds, all of it"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(target, color="grey", linewidth=0.7, linestyle=":")
    axes[1].set_xscale("log")
    axes[0].set_ylabel(f"reward, mean of {WINDOW} steps")
    legend(drawing, axes[0])
    return drawing


def main() -> None:
    """Run what is not there yet, print the table, write the figure."""
    parser = timing.options(__doc__, out="out/trl_learning", arms=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--target", type=float, default=0.9)
    given = parser.parse_args()
    trl_task.quiet()
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in given.arms}
    for seed in given.seeds:
        for name in given.arms:
            path = given.out / f"{name.replace(' ', '_')}-{given.target}-{given.steps}-{seed}.json"
            if not path.exists():
                write_json(path, run(ARMS[name], seed, given.steps, given.target))
            runs[name].append(read_json(path))
            print(f"seed {seed}: {name}: reward {smoothed(runs[name][-1])[-1]:.3f}", flush=True)
    rows = table(runs, given.target)
    setup = timing.machine("cpu", "trl", "transformers") | {"steps": given.steps, "target": given.target}
    write_json(given.out / "summary.json", {"setup": setup, "arms": rows})
    shown = {row["arm"]: {of: math.nan if row[of] is None else row[of] for of in COLUMNS} for row in rows}
    print_table(f"to a reward of {given.target:g}, nan where not by all seeds", shown, COLUMNS)
    save_figure(figure(runs, given.target), given.out, "trl_learning")


if __name__ == "__main__":
    main()
