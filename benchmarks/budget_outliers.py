"""Does the noise budget hold after an outlier among the advantages? By the sizes of runs as `study budget` makes them.

pip install -e '.[cli]'
python benchmarks/budget_outliers.py                  # five tasks, a minute of one core
"""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import sparkjoy as sj
from sparkjoy.noise import expected_noise
from sparkjoy_lab.bench.timing import options
from sparkjoy_lab.studies.budget import ARMS, MNIST, REVERSAL
from sparkjoy_lab.studies.runs import task_of
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings
from sparkjoy_lab.training.tracking import write_json

STEPS = {
    "mnist": 800,
    "mnist, 30% wrong labels": 800,
    "mnist, batch-mean baseline": 800,
    "reversal H=10 M=2": 160,
    "reversal H=10 M=5": 200,
}
AFTER = 10
Batch = tuple[Tensor, Tensor | None]


def recorded(task: str, seed: int) -> list[Batch]:
    """Sizes and costs of every step of a run at a budget of 0.3."""
    config = REVERSAL[task] if task in REVERSAL else MNIST[task][0]
    settings = Settings(
        seed=seed, steps=STEPS[task], evaluate_every=STEPS[task], learning_rate=1e-3, **ARMS["noise 0.3"]
    )
    training, seen = Training(task_of(config), settings), []

    decide = sj.UnbiasedGate.__call__

    def noting(gate: sj.UnbiasedGate, score: Tensor, cost: Tensor | None = None) -> sj.Decision:
        seen.append((score.clone(), cost))
        return decide(gate, score, cost)

    with patch.object(sj.UnbiasedGate, "__call__", noting):
        for _ in range(STEPS[task]):
            training.step()
    return seen


def replayed(seen: list[Batch], outlier: float = 0.0, at: int = -1) -> Tensor:
    """(steps, 3) rows kept on average, second moment added and own; a row `outlier` times the usual in one step."""
    gate, found = sj.UnbiasedGate(noise=0.3), []
    for number, (score, cost) in enumerate(seen):
        if number == at:
            score = score.index_fill(0, torch.tensor([0]), outlier * float(score.square().mean().sqrt()))
        own = float(score.double().square().sum())
        probability = gate(score, cost).probability
        found.append((float(probability.sum()), expected_noise(score, probability) * own, own))
    return torch.tensor(found, dtype=torch.float64)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--tasks", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--at", nargs="+", type=int, default=[0, 40, 60, 80, 100])
    parser.add_argument("--outliers", nargs="+", type=float, default=[10.0, 1e3, 1e6])
    given, results = parser.parse_args(), {}
    for task in given.tasks:
        seen = recorded(task, seed=0)
        plain = replayed(seen)
        result: dict[str, Any] = {
            "kept": float(plain[:, 0].sum()) / sum(len(score) for score, _ in seen),
            "noise": float(plain[:, 1].sum() / plain[:, 2].sum()),
        }
        for outlier in given.outliers:
            worst = 0.0
            for at in given.at:
                after = slice(at + 1, at + 1 + AFTER)
                added = replayed(seen[: at + 1 + AFTER], outlier, at)[after, 1].sum() / plain[after, 1].sum()
                worst = max(worst, float(added))
            result[f"after an outlier of {outlier:g}"] = worst
        results[task] = result
        print(f"{task}:", ", ".join(f"{name} {value:.3g}" for name, value in result.items()), flush=True)
    if given.out is not None:
        write_json(given.out, results)


if __name__ == "__main__":
    main()
