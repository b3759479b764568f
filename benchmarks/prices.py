"""How near a rolling and a budget price come to the rate asked for, on scores that drift, jump and have heavy tails.

    python benchmarks/prices.py --out out/prices.json

Every stream of scores goes through a `KondoGate` in batches: 3,200 of one row, 200 of 8 and 200 of 64. The error is
that of the kept tokens' share of all tokens, relative to the rate; the largest of the seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sparkjoy as sj
from sparkjoy_lab.bench.timing import machine, options
from sparkjoy_lab.prices import RollingQuantile
from sparkjoy_lab.training.tracking import write_json

Stream = Callable[[int, torch.Generator], Tensor]
BATCHES = {1: 3200, 8: 200, 64: 200}


def normal(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, generator=generator, dtype=torch.float64)


def time(rows: int) -> Tensor:
    """(rows,), from 0 to 1."""
    return torch.linspace(0, 1, rows, dtype=torch.float64)


STREAMS: dict[str, Stream] = {
    "stationary": normal,
    "scale grows x1000": lambda rows, g: normal(rows, g) * 1000 ** time(rows),
    "scale falls x1000": lambda rows, g: normal(rows, g) * 1000 ** -time(rows),
    "mean rises by 20 deviations": lambda rows, g: normal(rows, g) + 20 * time(rows),
    "mean falls by 20 deviations": lambda rows, g: normal(rows, g) - 20 * time(rows),
    "Cauchy tails": lambda rows, g: (torch.rand(rows, generator=g, dtype=torch.float64) - 0.5).mul(torch.pi).tan(),
    "jump x1000 half-way": lambda rows, g: normal(rows, g) * (1 + 999 * (time(rows) > 0.5)),
    "mean falls by 10 at 95%": lambda rows, g: normal(rows, g) - 10 * (time(rows) > 0.95),
    "30% zeros": lambda rows, g: normal(rows, g) * (torch.rand(rows, generator=g) < 0.7),
}


def token_costs(score: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Tokens of each row: 1, or 10 to about 75 at random, or up to 7 times more the higher the row ranks."""
    if kind == "rows":
        return torch.ones_like(score)
    uniform = torch.rand(len(score), generator=generator, dtype=torch.float64)
    if kind == "tokens":
        return (10 + 64 * uniform).floor()
    rank = score.argsort().argsort() / len(score)
    return (20 * (0.5 + uniform) * (2 * rank).exp()).floor()


def relative_error(gate: sj.Gate, score: Tensor, cost: Tensor, batch: int, rate: float) -> tuple[float, float]:
    """Achieved over asked for, minus 1; and the same difference in mean rows."""
    parts = zip(score.split(batch), cost.split(batch), strict=True)
    spent = sum(float(costs[gate(scores, costs).keep].sum()) for scores, costs in parts)
    total = float(cost.sum())
    return spent / (rate * total) - 1, (spent - rate * total) / (total / len(cost))


def measure(
    gates: dict[str, Callable[[float], sj.Gate]], rates: list[float], batches: list[int], seeds: int
) -> list[dict[str, Any]]:
    """One line for each price, rate, batch size, stream and kind of cost."""
    lines = []
    for name, gate in gates.items():
        for batch in batches:
            for rate in rates:
                for stream, draw in STREAMS.items():
                    for kind in ("rows", "tokens", "tokens by rank"):
                        errors = []
                        for seed in range(seeds):
                            generator = torch.Generator().manual_seed(seed)
                            score = draw(batch * BATCHES[batch], generator)
                            cost = token_costs(score, kind, generator)
                            errors.append(relative_error(gate(rate), score, cost, batch, rate))
                        worst = max(errors, key=lambda pair: abs(pair[0]))
                        line = {"price": name, "batch": batch, "rate": rate, "stream": stream, "cost": kind}
                        lines.append({**line, "relative_error": worst[0], "rows_off": worst[1]})
    return lines


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.03, 0.1, 0.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], choices=list(BATCHES))
    parser.add_argument("--prices", nargs="+", default=["rolling", "budget"], choices=["rolling", "budget"])
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[float], sj.Gate]] = {
        "rolling": lambda rate: sj.KondoGate(price=RollingQuantile(rate)),
        "budget": sj.BudgetGate,
    }
    chosen = {name: makers[name] for name in given.prices}
    lines = measure(chosen, given.rates, given.batches, given.seeds)
    for name in chosen:
        print(f"\n{name}: the largest relative error over streams and costs, in % (in mean rows)")
        for batch in given.batches:
            cells = []
            for rate in given.rates:
                own = [line for line in lines if (line["price"], line["batch"], line["rate"]) == (name, batch, rate)]
                worst = max(own, key=lambda line: abs(line["relative_error"]))
                error, rows = 100 * worst["relative_error"], worst["rows_off"]
                cells.append(f"{rate:g}: {error:+.2f} ({rows:+.1f}) {worst['stream']}, {worst['cost']}")
            print(f"batch {batch}: " + " | ".join(cells))
    if given.out is not None:
        write_json(given.out, {"setup": machine(), "seeds": given.seeds, "lines": lines})


if __name__ == "__main__":
    main()
