"""CPU seconds of a whole step of TRL's GRPO on a real model, with and without sharing tokens, gated and not.

    python benchmarks/shared_tokens.py --task sums --out out/shared_sums.json
    python benchmarks/shared_tokens.py --task 256+64 --prompts 1 --arms "TRL's own" "TRL's own, shared"

SmolLM2-135M-Instruct learns sums as in `sparkjoy study language`, or answers prompts of so many tokens with so many.
All arms take turns within one process on one thread. The learning rate is 0, so that all sample the same answers.
"MB": the most that autograd kept at a time for a backward pass, in the step that warms up.
"""

from __future__ import annotations

import gc
import tempfile
import time
from typing import Any

import numpy as np
import torch
import trl_task
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from sparkjoy.frontier.cost import SavedBytes
from sparkjoy.integrations.trl import KondoGRPOConfig
from sparkjoy_lab.bench import timing
from sparkjoy_lab.bench.timing import median, print_table
from sparkjoy_lab.language_model import pretrained
from sparkjoy_lab.studies.language_results import DENSE
from sparkjoy_lab.studies.language_tasks import TASKS
from sparkjoy_lab.studies.language_training import Timed
from sparkjoy_lab.training.tracking import write_json

ARMS: dict[str, dict[str, Any]] = {
    DENSE: {},
    "zero advantages dropped": {"gate_price": 0.0, "gate_score": "absolute-advantage"},
    "noise 0.3": {"gate_noise": 0.3},
    "delight 15%": {"gate_rate": 0.15},
    "uniform 15%": {"gate_rate": 0.15, "gate_score": "uniform"},
}
ARMS |= {f"{name}, shared": {**options, "share_tokens": True} for name, options in ARMS.items()}
PARTS = ("sampling", "update", "whole")
COLUMNS = {"sampling": "9.2f", "update": "9.2f", "whole": "9.2f", "of own sampling": "16.2f"}
COLUMNS |= {"of own update": "14.2f", "of own whole": "13.3f", "kept": "6.0%", "tokens": "8.0f", "MB": "7.0f"}


class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' is untyped
    """CPU seconds of every step: of sampling, of the rest, of all; and the bytes that autograd kept in the first."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.steps: list[dict[str, float]] = []
        self.kept: SavedBytes | None = None

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.kept is None:
            self.kept = SavedBytes(self.trainer.model.parameters())
            self.kept.__enter__()
        self.start, self.before = time.process_time(), dict(self.trainer.seconds)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.kept is not None
        if not self.steps:
            self.kept.__exit__(None, None, None)
        whole = time.process_time() - self.start
        sampling = self.trainer.seconds["sampling"] - self.before["sampling"]
        metrics = self.trainer._metrics["train"]
        self.steps.append(
            {
                "sampling": sampling,
                "update": whole - sampling,
                "whole": whole,
                "MB": self.kept.peak / 1e6,
                "kept": metrics["gate/kept_rate"][-1] if metrics.get("gate/kept_rate") else 1.0,
                "tokens": metrics["shared/distinct_tokens"][-1] if metrics.get("shared/distinct_tokens") else np.nan,
            }
        )


def problems_of(task: str, tokenizer: Any) -> tuple[list[dict[str, str]], Any, dict[str, Any]]:
    """Prompts, reward function and options of the trainer; of a task by name, or of tokens, "P+A"."""
    if task in TASKS:
        known = TASKS[task]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer("\n", add_special_tokens=False).input_ids[-1])
        return known.problems()[500:2500], known.reward, {"max_completion_length": known.max_tokens}
    prompt, answer = map(int, task.split("+"))
    words = [tokenizer.decode([token]) for token in range(1000, 1400)]
    words = [word for word in words if len(tokenizer(word * 2).input_ids) == 2]
    chosen = torch.randint(len(words), (200, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    options = {"max_completion_length": answer, "generation_kwargs": {"min_new_tokens": answer}}
    return [{"prompt": "".join(words[word] for word in row)} for row in chosen], letters, options


def letters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between answers."""
    return [float(len(completion)) for completion in completions]


def run(arm: dict[str, Any], given: Any, folder: str) -> list[dict[str, float]]:
    """The steps of a run after its first."""
    model, tokenizer = pretrained(None)
    problems, reward, options = problems_of(given.task, tokenizer)
    clock = Clock()
    trainer = Timed(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(problems),
        args=KondoGRPOConfig(
            output_dir=folder,
            seed=given.seed,
            max_steps=1 + given.steps,
            learning_rate=0.0,
            per_device_train_batch_size=min(given.micro_batch, 8 * given.prompts),
            gradient_accumulation_steps=max(1, 8 * given.prompts // given.micro_batch),
            num_generations=8,
            bf16=given.bf16,
            use_cpu=True,
            gradient_checkpointing=given.checkpointing,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
            **arm,
        ),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    clock.trainer = trainer
    trainer.train()
    return clock.steps[1:]


def main() -> None:
    """Measure, print and write."""
    parser = timing.options(__doc__, rounds=3, out="out/shared_tokens.json", arms=ARMS)
    parser.add_argument("--task", default="sums", help=f"{', '.join(TASKS)}; or tokens of prompts and answers, 256+64")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step, each with 8 answers")
    parser.add_argument("--micro-batch", type=int, default=16, help="rows of a pass")
    parser.add_argument("--steps", type=int, default=1, help="steps measured a round, after one that warms up")
    parser.add_argument("--bf16", action="store_true", help="mixed precision, TRL's default; float32 without")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, TRL's default")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    trl_task.quiet()
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS if name in given.arms or name == DENSE}
    for number in range(given.rounds):
        for name, steps in samples.items():
            with tempfile.TemporaryDirectory() as folder:
                steps += run(ARMS[name], given, folder)
            gc.collect()
            print(f"round {number + 1} of {given.rounds}: {name}: {steps[-1]['whole']:.2f} s", flush=True)
    table: dict[str, dict[str, float]] = {}
    for name, steps in samples.items():
        table[name] = {figure: median([step[figure] for step in steps]) for figure in steps[0]}
        for part in PARTS:
            of_own = [step[part] / own[part] for step, own in zip(steps, samples[DENSE], strict=True)]
            table[name][f"of own {part}"] = median(of_own)
    print_table(f"{given.task}, {'bfloat16' if given.bf16 else 'float32'}", table, COLUMNS)
    write_json(
        given.out,
        {
            "setup": timing.machine("cpu", "trl", "transformers") | vars(given) | {"out": str(given.out)},
            "arms": table,
            "steps": samples,
        },
    )


if __name__ == "__main__":
    main()
