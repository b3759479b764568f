"""How much noise a budget really adds in TRL: sizes of completions against the lengths of their gradients.

    python benchmarks/trl_noise.py

The copy task of benchmarks/trl_task.py, a model of random weights and the same after some steps of training. The
gradient of each of 64 completions in TRL's loss is computed by itself. With g_i its length and q_i the probability of a
budget of 0.3 by some size, skipping adds Σ g_i² (1/q_i − 1) / Σ g_i². Sizes: "squares" (the trainer's), "sum" of the
tokens' lengths instead, "by length" (no log-probs).
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import trl_task
from torch import Tensor
from transformers import TrainerCallback

from sparkjoy import UnbiasedGate
from sparkjoy.integrations.sizes import DIVIDES_BY_LENGTH, RowSize
from sparkjoy.integrations.trl import KondoGRPOTrainer
from sparkjoy.integrations.trl.rows import loss_mask
from sparkjoy_lab.bench.timing import machine, options, print_table
from sparkjoy_lab.training.tracking import write_json

ROWS = 64


class OneByOne(KondoGRPOTrainer):
    """Each step keeps another row of the first generation, and the weights stand still."""

    first: Any = None

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if self.first is None:
            output = super()._generate_and_score_completions(inputs)
            self.first = {name: value for name, value in output.items() if not name.startswith("gate_")}
        keep = torch.arange(ROWS) == self.state.global_step
        return self.first | {"gate_keep": keep}


class Lengths(TrainerCallback):  # type: ignore[misc]  # transformers' is untyped
    """The length of every step's gradient."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
        self.values.append(float(torch.stack(squares).sum().sqrt()) if squares else 0.0)


def trainer(cls: type, model: Any, folder: str, **changes: Any) -> Any:
    """A trainer of `cls` on the copy task."""
    options = {"per_device_train_batch_size": 16, "num_generations": 8, "max_grad_norm": 0.0, **changes}
    given = {"model": model, "reward_funcs": trl_task.copied}
    return trl_task.trainer(cls, folder, options, trl_task.prompts(2048, 2, 5), **given)


def sizes(batch: Any, loss: str) -> dict[str, Tensor]:
    """(N,) each, by the sampler's log-probs."""
    size, mask, advantages = RowSize(by_length=loss in DIVIDES_BY_LENGTH), loss_mask(batch), batch["advantages"]
    log_probs = batch["sampling_per_token_logps"]
    total = (advantages[:, None].abs() * -torch.expm1(log_probs) * mask).sum(dim=1)
    return {
        "squares": size(advantages, log_probs, mask),
        "sum": total / mask.sum(dim=1) if size.by_length else total,
        "by length": size(advantages, None, mask),
    }


def measure(model: Any, loss: str, noise: float) -> dict[str, tuple[float, float]]:
    """Of each size: the noise that is really added, and the fraction kept."""
    lengths = Lengths()
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(OneByOne, model, folder, loss_type=loss, gate_noise=noise, learning_rate=0.0, max_steps=ROWS)
        run.add_callback(lengths)
        run.train()
    squares = torch.tensor(lengths.values).double().square()
    result = {}
    for name, size in sizes(run.first, loss).items():
        chance = UnbiasedGate(noise=noise)(size).probability.double()
        added = torch.where(chance > 0, squares * (1 / chance - 1), 0).sum() / squares.sum()
        result[name] = (float(added), float(chance.mean()))
    return result


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=60, help="of training before the second measurement")
    given = parser.parse_args()
    trl_task.quiet()
    model = trl_task.model()
    rows: dict[str, dict[str, float]] = {}
    for steps in (0, given.steps):
        if steps:
            with tempfile.TemporaryDirectory() as folder:
                trainer(KondoGRPOTrainer, model, folder, learning_rate=3e-3, max_steps=steps).train()
        for loss in ("dapo", "grpo"):
            for name, (added, kept) in measure(model, loss, given.noise).items():
                rows[f"{loss}, {steps} steps, {name}"] = {"noise added": added, "kept": kept}
    print_table("loss, training, sizes", rows, {"noise added": "12.2f", "kept": "7.0%"})
    if given.out is not None:
        write_json(given.out, {"setup": machine("cpu", "trl", "transformers"), "noise": given.noise, "sizes": rows})


if __name__ == "__main__":
    main()
