"""Milliseconds of sampling and of a DG update on token reversal, beside the plain cached loop and the arithmetic limit.

    python benchmarks/reversal_speed.py --out out/reversal_speed.json

10 prompts x 10 answers, papers' size, one thread. All arms take turns within one process, so that their ratios compare;
absolute times are this machine's. The limit is the FLOPs of the matrix products at the rate measured, in the same
rounds, for the product of 1,000 tokens with a feed-forward layer: what no arrangement of these products would beat.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparkjoy.engine.flops import FlopCount
from sparkjoy.lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy.lab.training.tracking import write_json
from sparkjoy.losses import delightful

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import plain_sample  # type: ignore[import-not-found]

Arm = Callable[[], dict[str, float]]
RATE_SHAPE = (1000, 64, 128)
SURE = 20.0
"""What the output layer is multiplied by to make a fresh policy nearly as sure of its answers as a trained one."""


def timed(name: str, work: Callable[[], Any]) -> Arm:
    """An arm of one part."""

    def arm() -> dict[str, float]:
        start = time.perf_counter()
        work()
        return {name: time.perf_counter() - start}

    return arm


def update(task: ReversalTask, shared: bool, name: str) -> Arm:
    """A DG update on one rollout, in parts; `shared`: each prompt read once."""
    torch.manual_seed(0)
    policy = task.policy()
    optimizer = torch.optim.Adam(policy.parameters(), 3e-4, fused=True)
    rollout = task.rollout(policy, torch.Generator().manual_seed(0), graph=False)
    rows = dict(rollout.batch)
    if not shared:
        del rows["prompt_index"]
    loss = delightful()

    def arm() -> dict[str, float]:
        times = [time.perf_counter()]
        mean = loss(policy.log_probs(rows), rollout.advantages, None, None).mean()
        times.append(time.perf_counter())
        mean.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        parts = dict(zip(("forward", "backward", "optimizer"), np.diff(times).tolist(), strict=True))
        return {name: times[-1] - times[0], **{f"{name}, {part}": seconds for part, seconds in parts.items()}}

    return arm


def flops(work: Callable[[], Any]) -> float:
    with FlopCount() as count:
        work()
    return float(count.flops)


def measure(prompt_length: int, rounds: int) -> dict[str, Any]:
    """Percentiles in milliseconds of every part of every arm, the plain loop's ratio to the sampler, and the limits."""
    task = ReversalTask(ReversalConfig(prompt_length=prompt_length))
    torch.manual_seed(0)
    policy = task.policy()
    generator = torch.Generator().manual_seed(0)
    prompts = task.sample(10, generator)
    sure = task.policy()
    sure.load_state_dict({**policy.state_dict(), "head.weight": SURE * policy.head.weight.detach()})
    left, right = torch.randn(RATE_SHAPE[:2]), torch.randn(RATE_SHAPE[1:])
    arms: list[Arm] = [
        timed("plain cached loop", lambda: plain_sample(policy, prompts, 10, prompt_length, generator)),
        timed("sampler", lambda: policy.sample(prompts, 10, prompt_length, generator)),
        timed("sampler, a policy nearly sure", lambda: sure.sample(prompts, 10, prompt_length, generator)),
        update(task, False, "DG update, a prompt per row"),
        update(task, True, "DG update, prompts shared"),
        timed("matrix product", lambda: [left @ right for _ in range(10)]),
    ]
    times: dict[str, list[float]] = {}
    for round_number in range(rounds + 5):
        for arm in arms:
            for name, seconds in arm().items():
                if round_number >= 5:  # the first ones warm up
                    times.setdefault(name, []).append(1000 * seconds)
    milliseconds = {
        name: dict(zip(("p20", "p50", "p80"), np.percentile(values, [20, 50, 80]).tolist(), strict=True))
        for name, values in times.items()
    }
    ratios = np.array(times["plain cached loop"]) / np.array(times["sampler"])
    rate = 10 * 2 * float(np.prod(RATE_SHAPE)) / milliseconds["matrix product"]["p50"]  # FLOPs a millisecond
    counted = {"sampler": arms[1], "DG update, a prompt per row": arms[3], "DG update, prompts shared": arms[4]}
    limits = {name: flops(arm) / rate for name, arm in counted.items()}
    return {
        "milliseconds": milliseconds,
        "ratio": float(np.median(ratios)),
        "gigaflops a second": rate / 1e6,
        "limit of the products, ms": limits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="rounds measured")
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[10, 20], help="H of every table")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for prompt_length in arguments.prompt_lengths:
        result = results[f"H={prompt_length}"] = measure(prompt_length, arguments.rounds)
        print(f"{f'H = {prompt_length}, ms':40} {'p20':>7} {'p50':>7} {'p80':>7}")
        for name, row in result["milliseconds"].items():
            print(f"{name:40} {row['p20']:7.2f} {row['p50']:7.2f} {row['p80']:7.2f}")
        print(f"sampler: {result['ratio']:.2f}x the plain loop's speed")
        limits = ", ".join(f"{name} {limit:.2f}" for name, limit in result["limit of the products, ms"].items())
        print(f"limit at {result['gigaflops a second']:.0f} GFLOP/s, ms: {limits}\n")
    if arguments.out is not None:
        setup = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1}
        write_json(arguments.out, {"setup": setup, **results})


if __name__ == "__main__":
    main()
