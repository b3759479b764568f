"""CPU seconds of an update in TRL's GRPOTrainer, gated against TRL's own: screening, forward and backward passes.

    python benchmarks/trl_step.py --out out/trl_step.json

A Qwen2 of 2.9 million random parameters, 128 completions of 48 to 80 tokens, micro-batches of 16. All arms take turns
within one process on one thread and see the same completions, so that their ratios compare; absolute times are this
machine's. The update is everything but generation and rewards; the whole step is everything. Log-probs to
decide on are recorded while transformers generates; "screened": an exact forward pass makes them instead
(`gate_log_probs="exact"`); "by length": there are none.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import numpy as np
import trl_task
from transformers import TrainerCallback

from sparkjoy.integrations.trl import KondoGRPOTrainer
from sparkjoy_lab.bench import timing
from sparkjoy_lab.bench.timing import median, print_table
from sparkjoy_lab.training.tracking import write_json

SIZE = {"width": 192, "layers": 6, "heads": 4}
PLAIN = "TRL's own"
FIGURES = {"kept_rate": 1.0, "micro_steps": 8.0, "screen_seconds": 0.0, "screened_rate": 0.0, "noise": 0.0}
"""Figures of the gate, and what a step has that does not log them."""
COLUMNS = {"kept_rate": "9.1%", "micro_steps": "11.0f", "update": "9.3f", "update_speedup": "14.2f", "whole": "9.3f"}
COLUMNS |= {"whole_speedup": "13.2f", "noise": "7.2f"}
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "rate 1": {"gate_rate": 1.0},
    "25%": {"gate_rate": 0.25},
    "25% screened": {"gate_rate": 0.25, "gate_log_probs": "exact"},
    "10%": {"gate_rate": 0.1},
    "10% screened": {"gate_rate": 0.1, "gate_log_probs": "exact"},
    "3%": {"gate_rate": 0.03},
    "3% screened": {"gate_rate": 0.03, "gate_log_probs": "exact"},
    "noise 0.3": {"gate_noise": 0.3},
    "noise 0.3 screened": {"gate_noise": 0.3, "gate_log_probs": "exact"},
    "noise 0.3 by length": {"gate_noise": 0.3, "gate_log_probs": "none"},
    "noise 1": {"gate_noise": 1.0},
    "uniform 10%": {"gate_rate": 0.1, "gate_score": "uniform"},
    "price 0": {"gate_price": 0.0},
}


class Timed(KondoGRPOTrainer):
    """The trainer with a clock of all that `training_step` does but generation and rewards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.update_seconds: list[float] = []
        self._passes = 0.0

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        loss = super().training_step(*args, **kwargs)
        self._passes += time.process_time() - start
        if self.accelerator.sync_gradients:
            self.update_seconds.append(self._passes)
            self._passes = 0.0
        return loss

    def _generate(self, *args: Any) -> Any:
        start = time.process_time()
        output = super()._generate(*args)
        self._passes -= time.process_time() - start
        return output

    def _calculate_rewards(self, *args: Any) -> Any:
        start = time.process_time()
        rewards = super()._calculate_rewards(*args)
        self._passes -= time.process_time() - start
        return rewards


class StepSeconds(TrainerCallback):  # type: ignore[misc]  # transformers' is untyped
    """The whole of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


def high_digits(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between random completions: how many of the digits are above 4, out of 64."""
    return [sum(character in "56789" for character in completion) / 64 for completion in completions]


def run(arm: dict[str, Any], steps: int, folder: str, updates: int = 1, **size: int) -> dict[str, list[float]]:
    """Seconds of every step after the first generation's, which warm up, and gate figures; the weights stand still."""
    clock = StepSeconds()
    options = {
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 8 // updates,
        "steps_per_generation": 8,
        "num_generations": 8,
        "max_completion_length": 80,
        "generation_kwargs": {"min_new_tokens": 48},
        "max_steps": updates * (steps + 1),
        "learning_rate": 0.0,
    }
    model, prompts = trl_task.model(**(size or SIZE)), trl_task.prompts(256, 6, 10)
    given = {"model": model, "reward_funcs": high_digits, "callbacks": [clock]}
    trainer = trl_task.trainer(Timed, folder, options | arm, prompts, **given)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry][1:]
    figures = {name: [float(entry.get(f"gate/{name}", default)) for entry in logs] for name, default in FIGURES.items()}
    tokens = [entry["completions/mean_length"] for entry in logs]
    update, whole = (
        np.reshape(seconds, (-1, updates)).sum(axis=1).tolist()[1:]
        for seconds in (trainer.update_seconds, clock.seconds)
    )
    return {"update": update, "whole": whole, "tokens": tokens} | figures


def measure(arms: list[str], rounds: int, steps: int, updates: int) -> dict[str, dict[str, float]]:
    """Medians of every arm over all rounds, and what TRL's own takes over them."""
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in ARMS if name in arms or name == PLAIN}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for name in samples:
                for figure, values in run(ARMS[name], steps, folder, updates).items():
                    samples[name].setdefault(figure, []).extend(values)
                print(f"round {number + 1} of {rounds}: {name}: {samples[name]['update'][-1]:.3f} s", flush=True)
    result = {name: {of: median(values) for of, values in figures.items()} for name, figures in samples.items()}
    for figures in result.values():
        figures["update_speedup"] = result[PLAIN]["update"] / figures["update"]
        figures["whole_speedup"] = result[PLAIN]["whole"] / figures["whole"]
    return result


def main() -> None:
    """Measure, print and write."""
    parser = timing.options(__doc__, rounds=3, out="out/trl_step.json", arms=ARMS)
    parser.add_argument("--steps", type=int, default=2, help="generations measured a round")
    parser.add_argument("--updates", type=int, default=1, choices=(1, 2, 4), help="optimizer steps a generation")
    given = parser.parse_args()
    trl_task.quiet()
    parameters = trl_task.model(**SIZE).num_parameters()
    result = measure(given.arms, given.rounds, given.steps, given.updates)
    print_table(f"{parameters:,} parameters", result, COLUMNS)
    setup = timing.machine("cpu", "trl", "transformers") | {"parameters": parameters, "updates": given.updates}
    write_json(given.out, {"setup": setup, "arms": result})


if __name__ == "__main__":
    main()
