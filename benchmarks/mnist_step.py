"""Milliseconds of one MNIST training step: gated, dense through the engine, and the strongest dense loop there is.

    python benchmarks/mnist_step.py --data DIR --out out/mnist_step.json

The strongest dense loop has no engine and one forward pass, which both samples and is differentiated. All arms take
turns within one process on one thread, so that their ratios compare; absolute times are this machine's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparkjoy_lab.bench.timing import collect, machine, options, percentiles, print_table, ratio, turns
from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings
from sparkjoy_lab.training.tracking import write_json

STRONGEST = "strongest dense loop"


def strongest_dense_loop(task: MnistTask) -> Callable[[], None]:
    """A plain policy-gradient step, as one would write it by hand for speed."""
    torch.manual_seed(0)
    policy = task.policy()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        rollout = task.rollout(policy, generator, graph=True)
        loss = -(rollout.advantages * rollout.log_probs).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def arms(task: MnistTask) -> dict[str, Callable[[], None]]:
    """The step function of every arm."""
    steps = {STRONGEST: strongest_dense_loop(task)}
    steps["dense, engine, the rollout's forward"] = Training(task, Settings(method="pg")).step
    own_forward = Training(task, Settings(method="pg"))
    own_forward.differentiates_rollout = False
    steps["dense, engine, its own forward"] = own_forward.step
    for rate in (0.3, 0.1, 0.03, 0.01):
        steps[f"kondo {100 * rate:g}%"] = Training(task, Settings(rate=rate)).step
    return steps


def measure(task: MnistTask, rounds: int, steps_a_round: int) -> dict[str, dict[str, float]]:
    """Of every arm percentiles of a round's milliseconds a step, and its ratio to the strongest dense loop."""

    def several(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps_a_round):
                step()

        return run

    seconds, _ = collect(turns({name: several(step) for name, step in arms(task).items()}, rounds))
    return {
        name: {**percentiles(values, 1000 / steps_a_round), "ratio": ratio(values, seconds[STRONGEST])}
        for name, values in seconds.items()
    }


def main() -> None:
    parser = options(__doc__, rounds=40)
    parser.add_argument("--data", default="embedded", help="embedded, openml, or a folder of IDX files")
    parser.add_argument("--steps-a-round", type=int, default=50, help="steps of each arm a round")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(MnistTask(MnistConfig(data=given.data)), given.rounds, given.steps_a_round)
    print_table("ms a step", result, dict.fromkeys(("p20", "p50", "p80", "ratio"), "7.3f"))
    if given.out is not None:
        write_json(given.out, {"setup": machine() | {"data": given.data}, "milliseconds": result})


if __name__ == "__main__":
    main()
