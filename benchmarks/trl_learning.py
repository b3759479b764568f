"""Learning with TRL's GRPOTrainer, gated and not: the same verifiable task from random weights, several seeds.

    python benchmarks/trl_learning.py --out out/trl_learning

Copy a few digits, with partial credit (benchmarks/trl_task.py). A run ends at the target reward, or after the steps.
One file for each finished run, so that a study that was stopped goes on; then a table, and a figure of the reward
against steps, tokens differentiated and seconds.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl_task
from transformers import TrainerCallback

from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer
from sparkjoy.lab.training.tracking import read_json, save_figure, write_json

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
WINDOW = 10
"""Steps that a reported reward is the mean of."""


class Counting(KondoGRPOTrainer):
    """Counts the tokens, prompts included, of rows that are differentiated."""

    backward_tokens = 0

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Any, attention: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if torch.is_grad_enabled():
            self.backward_tokens += int(attention.sum())
        return super()._get_per_token_logps_and_entropies(model, ids, attention, *args, **kwargs)


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
        trainer = Counting(
            model=trl_task.model(width=64, layers=2, seed=seed, heads=4),
            reward_funcs=trl_task.copied,
            args=KondoGRPOConfig(
                **trl_task.options(
                    output_dir=folder,
                    per_device_train_batch_size=32,
                    gradient_accumulation_steps=4,
                    num_generations=16,
                    max_completion_length=4,
                    learning_rate=1e-3,
                    lr_scheduler_type="constant",
                    max_steps=steps,
                    seed=seed,
                ),
                **arm,
            ),
            train_dataset=trl_task.prompts(2000, 3, 3, seed=seed, digits="01234"),
            processing_class=trl_task.tokenizer(),
            callbacks=[record],
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
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
        to_target = {
            figure: statistics.median(record[figure] for record in reached) if len(reached) == len(seeds) else None
            for figure in ("step", "backward_tokens", "seconds")
        }
        rows.append(
            {
                "arm": name,
                "seeds": len(seeds),
                "reward": statistics.fmean(final),
                "least": min(final),
                "reached": len(reached),
                "kept": statistics.fmean(record["kept_rate"] for records in seeds for record in records),
                "to_target": to_target,
            }
        )
    return rows


def figure(runs: dict[str, list[list[dict[str, float]]]], target: float) -> Any:
    """Reward against steps, tokens differentiated and seconds: the mean over seeds, and each seed faintly."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(12, 3.8), layout="constrained")
    axes = drawing.subplots(1, 3, sharey=True)
    for number, (name, seeds) in enumerate(runs.items()):
        color = f"C{number}"
        rewards = [smoothed(records) for records in seeds]
        mean = [statistics.fmean(values) for values in zip(*rewards, strict=False)]  # as far as all seeds go
        for axis, cost in zip(axes, ("step", "backward_tokens", "seconds"), strict=True):
            for records, values in zip(seeds, rewards, strict=True):
                axis.plot([record[cost] for record in records], values, color=color, alpha=0.25, linewidth=0.7)
            costs = [statistics.fmean(record[cost] for record in at) for at in zip(*seeds, strict=False)]
            axis.plot(costs, mean, color=color, label=name)
    for axis, label in zip(axes, ("optimizer steps", "tokens differentiated", "CPU seconds, all of it"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(target, color="grey", linewidth=0.7, linestyle=":")
    axes[1].set_xscale("log")
    axes[0].set_ylabel(f"reward, mean of {WINDOW} steps")
    axes[2].legend(fontsize="small", frameon=False)
    return drawing


def main() -> None:
    """Run what is not there yet, print the table, write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/trl_learning"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--target", type=float, default=0.9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in options.arms}
    for seed in options.seeds:
        for name in options.arms:
            path = options.out / f"{name.replace(' ', '_')}-{options.target}-{options.steps}-{seed}.json"
            if not path.exists():
                write_json(path, run(ARMS[name], seed, options.steps, options.target))
            runs[name].append(read_json(path))
            print(f"seed {seed}: {name}: reward {smoothed(runs[name][-1])[-1]:.3f}", flush=True)
    rows = table(runs, options.target)
    write_json(options.out / "summary.json", {"steps": options.steps, "target": options.target, "arms": rows})
    print(f"{'':30}{'kept':>7}{'reward':>8}{'least':>7}   to {options.target}: steps, tokens differentiated, seconds")
    for row in rows:
        at = row["to_target"]
        when = (
            f"{at['step']:.0f}  {at['backward_tokens']:,.0f}  {at['seconds']:.1f}" if at["step"] else "not by all seeds"
        )
        print(f"{row['arm']:30}{row['kept']:7.1%}{row['reward']:8.3f}{row['least']:7.3f}   {when}")
    save_figure(figure(runs, options.target), options.out, "trl_learning")


if __name__ == "__main__":
    main()
