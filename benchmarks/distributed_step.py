"""Milliseconds of a 2-million-parameter transformer's step in two processes: dense and gated.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/distributed_step.py --out out/distributed_step.json

The dense loop has no engine: one forward, one backward, DistributedDataParallel. All arms take turns within one launch;
a step is timed from one barrier to the next, so it lasts as long as the slower process.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import sparkjoy as sj
from sparkjoy.lab.policies.transformer import Transformer
from sparkjoy.lab.training.processes import LogProbs
from sparkjoy.lab.training.tracking import write_json

DENSE = "dense, DDP alone"
Batch = tuple[dict[str, Tensor], Tensor, Tensor]


def arms(rows: int, length: int) -> tuple[dict[str, Callable[[], sj.BackwardReport | None]], int]:
    """The step of every arm, and the number of parameters."""
    torch.manual_seed(0)
    policy = Transformer(64, positions=2 * length - 1, layers=4, width=256, heads=4, feed_forward=512)
    module = DistributedDataParallel(LogProbs(policy))
    generator = torch.Generator().manual_seed(dist.get_rank())

    def sample() -> Batch:
        """Random answers and advantages: what a step costs does not depend on what it learns."""
        batch = {name: torch.randint(64, (rows, length), generator=generator) for name in ("prompts", "answers")}
        log_probs = -4 * torch.rand(rows, length, generator=generator)
        return batch, torch.randn(rows, generator=generator), log_probs

    def dense() -> None:
        batch, advantages, _ = sample()
        loss: Tensor = -(advantages[:, None] * module(batch)).mean()
        loss.backward()
        module.zero_grad()

    def gated(known: bool, price: float | None = None) -> Callable[[], sj.BackwardReport]:
        gate = sj.KondoGate(rate=0.1, price=price)
        step = sj.GatedBackward(gate, module=module)

        def run() -> sj.BackwardReport:
            batch, advantages, log_probs = sample()
            report = step(module, batch, advantages, log_probs=log_probs if known else None)
            module.zero_grad()
            return report

        return run

    engine = sj.GatedBackward(None, module=module)

    def everything() -> sj.BackwardReport:
        batch, advantages, _ = sample()
        report = engine(module, batch, advantages)
        module.zero_grad()
        return report

    steps: dict[str, Callable[[], sj.BackwardReport | None]] = {
        DENSE: dense,
        "dense, engine": everything,
        "10%, screened": gated(known=False),
        "10%, known log-probs": gated(known=True),
        "nothing kept: deciding alone": gated(known=True, price=1e9),
    }
    return steps, sum(parameter.numel() for parameter in policy.parameters())


def measure(steps: dict[str, Callable[[], sj.BackwardReport | None]], rounds: int) -> dict[str, dict[str, float]]:
    """Of every arm the 20th, 50th and 80th percentile of a step's milliseconds, its median ratio, and its rows.

    The ratio is of the dense loop's time to the arm's, within the same round; rows are those the fuller process
    differentiated, on average.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    rows: dict[str, list[int]] = {name: [] for name in steps}
    for round_number in range(rounds + 2):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            report = step()
            dist.barrier()
            if round_number >= 2:  # the first two warm up, and count FLOPs
                times[name].append(1000 * (time.perf_counter() - start))
                most = torch.tensor(0 if report is None else report.backward_rows)
                dist.all_reduce(most, dist.ReduceOp.MAX)
                rows[name].append(int(most))
    result = {}
    for name, values in times.items():
        p20, p50, p80 = np.percentile(values, [20, 50, 80])
        ratio = float(np.median(np.array(times[DENSE]) / np.array(values)))
        mean_rows = float(np.mean(rows[name]))
        result[name] = {"p20": float(p20), "p50": float(p50), "p80": float(p80), "ratio": ratio, "rows": mean_rows}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds measured")
    parser.add_argument("--rows", type=int, default=64, help="of each process")
    parser.add_argument("--length", type=int, default=16, help="tokens of a prompt, and of an answer")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        steps, parameters = arms(arguments.rows, arguments.length)
        result = measure(steps, arguments.rounds)
        if dist.get_rank():
            return
        print(f"{'ms a step':32} {'p20':>8} {'p50':>8} {'p80':>8} {'faster':>8} {'rows':>6}")
        for name, row in result.items():
            figures = " ".join(f"{row[key]:8.2f}" for key in ("p20", "p50", "p80", "ratio"))
            print(f"{name:32} {figures} {row['rows']:6.1f}")
        if arguments.out is not None:
            setup = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
            sizes = {"processes": dist.get_world_size(), "parameters": parameters, "rows": arguments.rows}
            write_json(arguments.out, {"setup": {**setup, **sizes, "threads": 1}, "milliseconds": result})
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
