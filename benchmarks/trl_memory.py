"""Peak memory and CPU seconds of an update in TRL's GRPOTrainer, packed for speed and for memory, against TRL's own.

    python benchmarks/trl_memory.py --out out/trl_memory.json

A Qwen2 of 2.9 million random parameters, 128 completions of 16 to 80 tokens, micro-batches of 16. The completions and
their log-probs are given (a `rollout_func`), so that a step is deciding, packing, forward and backward passes, and no
generation. Memory is above what was there before the step, and each arm's in a process of its own; gradients, which
every arm has, count. Seconds: all arms take turns within one process on one thread. Ratios compare; absolute
figures are this machine's.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from typing import Any

import trl_task
from trl_step import PLAIN, SIZE

from sparkjoy.integrations.trl import KondoGRPOTrainer
from sparkjoy_lab.bench import timing
from sparkjoy_lab.bench.timing import collect, median, print_table, turns
from sparkjoy_lab.studies.memory import peak_memory
from sparkjoy_lab.training.tracking import write_json

COLUMNS = {"kept_rate": "9.1%", "passes": "7.0f", "seconds": "8.3f", "seconds_ratio": "13.2f", "peak_mb": "8.1f"}
COLUMNS |= {"peak_mb_ratio": "13.2f"}
GATES: dict[str, dict[str, Any]] = {
    "25%": {"gate_rate": 0.25},
    "10%": {"gate_rate": 0.1},
    "10% screened": {"gate_rate": 0.1, "gate_log_probs": "exact"},
    "3%": {"gate_rate": 0.03},
    "noise 0.3": {"gate_noise": 0.3},
}
ARMS: dict[str, dict[str, Any]] = {PLAIN: {}} | {
    f"{name}, {pack_for}": gate | {"gate_pack_for": pack_for}
    for name, gate in GATES.items()
    for pack_for in ("speed", "memory")
}


class Rollouts:
    """A `rollout_func` for TRL: random completions of 16 to 80 tokens, the same whenever it is asked."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """The completions, and log-probs as of a policy that is not uniform."""
        source = random.Random(self.seed)
        lengths = [source.randint(16, 80) for _ in prompts]
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": [[*source.choices(range(3, 13), k=length - 1), 1] for length in lengths],
            "logprobs": [[-source.expovariate(0.5) for _ in range(length)] for length in lengths],
        }


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """How many of a completion's digits are above 4, out of them all."""
    return [sum(digit in "56789" for digit in text) / max(1, len(text)) for text in completions]


def prepare(arm: str, seed: int, checkpointing: bool, size: dict[str, int] = SIZE) -> Callable[[], dict[str, float]]:
    """A step of the arm, whole and again from the same weights: it returns TRL's log of it."""
    trl_task.quiet()
    options = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 8,
        "num_generations": 8,
        "max_completion_length": 80,
        "gradient_checkpointing": checkpointing,
        "learning_rate": 0.0,
        "optim": "sgd",
        "seed": seed,
    }
    given = {"model": trl_task.model(**size), "reward_funcs": reward, "rollout_func": Rollouts(seed)}
    arm_options, prompts = options | ARMS[arm], trl_task.prompts(256, 6, 10, seed)
    trainer = trl_task.trainer(KondoGRPOTrainer, tempfile.gettempdir(), arm_options, prompts, **given)

    def step() -> dict[str, float]:
        trainer._step = 0  # so that it asks for completions anew
        trainer.train()
        return next(entry for entry in reversed(trainer.state.log_history) if "reward" in entry)

    return step


def measure(arms: list[str], seeds: int, rounds: int, checkpointing: bool) -> dict[str, dict[str, float]]:
    """Medians over the seeds of every arm, and its ratios to TRL's own."""
    names = [arm for arm in ARMS if arm in arms or arm == PLAIN]
    samples: dict[str, list[dict[str, float]]] = {arm: [] for arm in names}
    for seed in range(seeds):
        steps = {arm: prepare(arm, seed, checkpointing) for arm in names}
        logs = {arm: step() for arm, step in steps.items()}
        seconds, _ = collect(turns(steps, rounds, warm_up=0, clock=time.process_time))
        for arm in names:
            peak = peak_memory(prepare, arm, seed, checkpointing, tensors=False)
            samples[arm].append(
                {
                    "kept_rate": logs[arm].get("gate/kept_rate", 1.0),
                    "passes": logs[arm].get("gate/micro_steps", 8.0),
                    "seconds": median(seconds[arm]),
                    "peak_mb": (peak.resident or math.nan) / 1e6,
                }
            )
            print(f"seed {seed}: {arm}: {samples[arm][-1]}", flush=True)
    result = {arm: {name: median([row[name] for row in rows]) for name in rows[0]} for arm, rows in samples.items()}
    for row in result.values():
        for figure in ("seconds", "peak_mb"):
            row[f"{figure}_ratio"] = result[PLAIN][figure] / row[figure]
    return result


def main() -> None:
    """Measure, print and write."""
    parser = timing.options(__doc__, rounds=3, out="out/trl_memory.json", arms=ARMS)
    parser.add_argument("--seeds", type=int, default=3, help="batches, on each of which every arm is timed")
    parser.add_argument("--checkpointing", action="store_true", help="TRL's default: activations are computed twice")
    given = parser.parse_args()
    trl_task.quiet()
    result = measure(given.arms, given.seeds, given.rounds, given.checkpointing)
    print_table("CPU seconds, MB", result, COLUMNS)
    setup = timing.machine("cpu", "trl", "transformers")
    setup |= {"seeds": given.seeds, "checkpointing": given.checkpointing}
    write_json(given.out, {"setup": setup, "arms": result})


if __name__ == "__main__":
    main()
