"""Milliseconds of sampling and of a DG update on token reversal, beside the plain cached loop and the arithmetic limit.

    python benchmarks/reversal_speed.py --out out/reversal_speed.json

10 prompts x 10 answers, papers' size, one thread. All arms take turns within one process, so that their ratios compare;
absolute times are this machine's. The limit is the FLOPs of the matrix products at the rate measured, in the same
rounds, for the product of 1,000 tokens with a feed-forward layer: what no arrangement of these products would beat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from plain_sampling import plain_sample

from sparkjoy.losses import delightful
from sparkjoy_lab.bench.timing import collect, machine, options, percentiles, print_table, ratio, turns
from sparkjoy_lab.flops import FlopCount
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.tracking import write_json

Arm = Callable[[], dict[str, float]]
RATE_SHAPE = (1000, 64, 128)
SURE = 20.0
"""What the output layer is multiplied by to make a fresh policy nearly as sure of its answers as a trained one."""


def update(task: ReversalTask, shared: bool) -> Arm:
    """A DG update on one rollout, which gives the seconds of its parts; `shared`: each prompt read once."""
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
        return dict(zip(("forward", "backward", "optimizer"), np.diff(times).tolist(), strict=True))

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
    arms: dict[str, Callable[[], Any]] = {
        "plain cached loop": lambda: plain_sample(policy, prompts, 10, prompt_length, generator),
        "sampler": lambda: policy.sample(prompts, 10, prompt_length, generator),
        "sampler, a policy nearly sure": lambda: sure.sample(prompts, 10, prompt_length, generator),
        "DG update, a prompt per row": update(task, False),
        "DG update, prompts shared": update(task, True),
        "matrix product": lambda: [left @ right for _ in range(10)],
    }
    seconds, outcomes = collect(turns(arms, rounds, warm_up=5))
    for name in [name for name in arms if name.startswith("DG")]:
        for part in outcomes[name][0]:
            seconds[f"{name}, {part}"] = [parts[part] for parts in outcomes[name]]
    milliseconds = {name: percentiles(values, 1000) for name, values in seconds.items()}
    rate = 10 * 2 * float(np.prod(RATE_SHAPE)) / milliseconds["matrix product"]["p50"]  # FLOPs a millisecond
    counted = ("sampler", "DG update, a prompt per row", "DG update, prompts shared")
    return {
        "milliseconds": milliseconds,
        "ratio": ratio(seconds["plain cached loop"], seconds["sampler"]),
        "gigaflops a second": rate / 1e6,
        "limit of the products, ms": {name: flops(arms[name]) / rate for name in counted},
    }


def main() -> None:
    parser = options(__doc__, rounds=100)
    parser.add_argument("--prompt-lengths", type=int, nargs="+", default=[10, 20], help="H of every table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for prompt_length in arguments.prompt_lengths:
        result = results[f"H={prompt_length}"] = measure(prompt_length, arguments.rounds)
        print_table(f"H = {prompt_length}, ms", result["milliseconds"], dict.fromkeys(("p20", "p50", "p80"), "7.2f"))
        print(f"sampler: {result['ratio']:.2f}x the plain loop's speed")
        limits = ", ".join(f"{name} {limit:.2f}" for name, limit in result["limit of the products, ms"].items())
        print(f"limit at {result['gigaflops a second']:.0f} GFLOP/s, ms: {limits}\n")
    if arguments.out is not None:
        write_json(arguments.out, {"setup": machine(), **results})


if __name__ == "__main__":
    main()
