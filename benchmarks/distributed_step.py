"""Milliseconds of a 2-million-parameter transformer's step in two processes: dense and gated.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/distributed_step.py --out out/distributed_step.json

The dense loop has no engine: one forward, one backward, DistributedDataParallel. All arms take turns within one launch;
a step is timed from one barrier to the next, so it lasts as long as the slower process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import sparkjoy as sj
from sparkjoy_lab.bench.timing import collect, machine, options, percentiles, print_table, ratio, turns
from sparkjoy_lab.policies.transformer import Transformer
from sparkjoy_lab.training.processes import LogProbs
from sparkjoy_lab.training.tracking import write_json

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
    """Of every arm percentiles of a step's milliseconds, how many times as fast as the dense loop, and its rows.

    Rows are those the fuller process differentiated, on average.
    """
    seconds, reports = collect(turns(steps, rounds, wait=dist.barrier))
    result = {}
    for name, values in seconds.items():
        rows = torch.tensor([0 if report is None else report.backward_rows for report in reports[name]]).float()
        dist.all_reduce(rows, dist.ReduceOp.MAX)
        faster = ratio(seconds[DENSE], values)
        result[name] = {**percentiles(values, 1000), "faster": faster, "rows": float(rows.mean())}
    return result


def main() -> None:
    parser = options(__doc__, rounds=30)
    parser.add_argument("--rows", type=int, default=64, help="of each process")
    parser.add_argument("--length", type=int, default=16, help="tokens of a prompt, and of an answer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        steps, parameters = arms(arguments.rows, arguments.length)
        result = measure(steps, arguments.rounds)
        if dist.get_rank():
            return
        print_table("ms a step", result, dict.fromkeys(("p20", "p50", "p80", "faster"), "8.2f") | {"rows": "6.1f"})
        if arguments.out is not None:
            sizes = {"processes": dist.get_world_size(), "parameters": parameters, "rows": arguments.rows}
            write_json(arguments.out, {"setup": machine() | sizes, "milliseconds": result})
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
