"""Milliseconds of one MNIST training step: gated, dense through the engine, and the strongest dense loop there is.

    python benchmarks/mnist_step.py --data DIR --out out/mnist_step.json

The strongest dense loop has no engine and one forward pass, which both samples and is differentiated. All arms take
turns within one process on one thread, so that their ratios compare; absolute times are this machine's.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkjoy.lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy.lab.training.loop import Training
from sparkjoy.lab.training.settings import Settings
from sparkjoy.lab.training.tracking import write_json

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
    """Of every arm the 20th, 50th and 80th percentile of a round's milliseconds a step, and its median ratio.

    The ratio is to the strongest dense loop within the same round.
    """
    steps = arms(task)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(steps_a_round):
                step()
            if round_number >= 2:  # the first two warm up
                times[name].append(1000 * (time.perf_counter() - start) / steps_a_round)
    result = {}
    for name, values in times.items():
        p20, p50, p80 = np.percentile(values, [20, 50, 80])
        ratio = float(np.median(np.array(values) / np.array(times[STRONGEST])))
        result[name] = {"p20": float(p20), "p50": float(p50), "p80": float(p80), "ratio": ratio}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="embedded", help="embedded, openml, or a folder of IDX files")
    parser.add_argument("--rounds", type=int, default=40, help="rounds measured")
    parser.add_argument("--steps-a-round", type=int, default=50, help="steps of each arm a round")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(MnistTask(MnistConfig(data=arguments.data)), arguments.rounds, arguments.steps_a_round)
    print(f"{'ms a step':40} {'p20':>7} {'p50':>7} {'p80':>7} {'ratio':>7}")
    for name, row in result.items():
        print(f"{name:40} {row['p20']:7.3f} {row['p50']:7.3f} {row['p80']:7.3f} {row['ratio']:7.3f}")
    if arguments.out is not None:
        setup: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        write_json(arguments.out, {"setup": {**setup, "threads": 1, "data": arguments.data}, "milliseconds": result})


if __name__ == "__main__":
    main()
